"""The manifests, as far as they can be checked without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker/kubernetes"
MANIFESTS = {
    (path.name, document["kind"], document["metadata"]["name"]): document
    for path in sorted(FOLDER.glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
}


def jobs(document: dict) -> dict[str, dict]:
    """The jobs of a manifest by name: their specs."""
    if document["kind"] == "Job":
        return {document["metadata"]["name"]: document["spec"]}
    if document["kind"] == "JobSet":
        return {job["name"]: job["template"]["spec"] for job in document["spec"]["replicatedJobs"]}
    return {}


JOBS = {(key[0], name): spec for key, document in MANIFESTS.items() for name, spec in jobs(document).items()}


@pytest.fixture(params=JOBS, ids="/".join)
def job(request) -> dict:
    return JOBS[request.param]


@pytest.fixture
def pod(job) -> dict:
    return job["template"]["spec"]


@pytest.fixture
def container(pod) -> dict:
    (container,) = pod["containers"]
    return container


def test_there_is_a_job_for_one_node_and_one_for_many():
    assert {kind for _, kind, _ in MANIFESTS} == {"PersistentVolumeClaim", "Job", "JobSet"}


def test_what_is_mounted_is_a_volume_and_every_volume_is_mounted(pod, container):
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_claims_are_among_the_volumes_of_the_folder(pod):
    claims = {name for _, kind, name in MANIFESTS if kind == "PersistentVolumeClaim"}
    claimed = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claimed == claims


def test_everything_that_is_written_has_a_volume_over_a_read_only_root(container):
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    written = {"/app/runs", "/app/prepared", "/cache", "/tmp", "/dev/shm"}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == written


def test_nothing_runs_as_root_or_may_become_it(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_user_is_that_of_the_image(pod):
    context = pod["securityContext"]
    dockerfile = (FOLDER.parent / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile


def test_the_command_line_is_one_that_mhe_takes(container, command):
    verb, *arguments = container["args"]
    if verb == "fit":
        code, out, err = command(verb, *arguments, "--print_config")
        assert (code, err) == (0, "")
        assert yaml.safe_load(out)["trainer"]["strategy"]["class_path"].endswith("DDPStrategy")
    else:
        assert verb == "prepare"
        assert len(arguments) == 1
        assert (FOLDER.parents[1] / arguments[0].removeprefix("--config=")).is_file()


def test_a_pod_that_is_told_to_end_has_time_to_save(pod):
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_pods_are_made_anew_by_their_job_so_that_its_failure_policy_sees_exit_codes(pod):
    assert pod["restartPolicy"] == "Never"


def trained(job: dict) -> list[str]:
    return job["template"]["spec"]["containers"][0]["args"]


@pytest.fixture(params=[key for key, spec in JOBS.items() if trained(spec)[0] == "fit"], ids="/".join)
def training(request) -> dict:
    return JOBS[request.param]


def test_training_goes_on_where_it_was(training):
    assert "--ckpt_path=auto" in trained(training)


def test_exit_code_143_is_neither_success_nor_counted_as_a_crash(training):
    (rule,) = [
        rule for rule in training["podFailurePolicy"]["rules"] if rule.get("onExitCodes", {}).get("values") == [143]
    ]
    assert rule["onExitCodes"]["containerName"] == "mhe"
    if training["completions"] == 1:
        assert rule["action"] == "Ignore"
    else:  # all must begin again together
        assert rule["action"] == "FailJob"
        policy = MANIFESTS["many-nodes.yaml", "JobSet", "mhe"]["spec"]["failurePolicy"]
        assert policy["rules"] == [
            {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
        ]


def test_a_process_is_started_for_each_gpu_of_each_node(training):
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in trained(training)[1:])
    limits = training["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(options["trainer.devices"]) == limits["nvidia.com/gpu"]
    assert int(options.get("trainer.num_nodes", 1)) == training["completions"] == training["parallelism"]


def test_the_workers_of_a_jobset_find_the_first_of_them_by_its_name():
    jobset = MANIFESTS["many-nodes.yaml", "JobSet", "mhe"]
    prepare, worker = jobset["spec"]["replicatedJobs"]
    (container,) = worker["template"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    name = jobset["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-{worker['name']}-0-0.{name}"
    assert [str(port["containerPort"]) for port in container["ports"]] == [environment["MASTER_PORT"]]
    assert worker["dependsOn"] == [{"name": prepare["name"], "status": "Complete"}]
    assert worker["template"]["spec"]["completionMode"] == "Indexed"


def test_what_the_workers_train_on_is_what_was_prepared():
    prepare, worker = (JOBS["many-nodes.yaml", name] for name in ("prepare", "worker"))
    assert trained(prepare)[1] in trained(worker)
