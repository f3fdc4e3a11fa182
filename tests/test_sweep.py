"""A sweep runs variants × seeds × a grid; killed and started again it gives the table of one that was not."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

import processes
from conftest import ROOT
from mhe_lightning import sweep as engine
from mhe_lightning.cli import main
from mhe_lightning.experiment import Experiments
from mhe_lightning.sweep import Children, Sweep, best_point, make_runs, parse_grid
from mhe_lightning.verbs import sweep as verb

ATTENTION = ROOT / "configs" / "attention"
STEPS = 8


def sweep_of(tmp_path: Path, *arguments: str, **changes) -> Sweep:
    """Two attentions and two seeds."""
    attentions = {name: ATTENTION / f"{name}.yaml" for name in ("mha", "sha")}
    return Sweep(**{"root": tmp_path, "arguments": arguments, "attentions": attentions, "seeds": (1, 2), **changes})


@pytest.fixture(scope="module")
def experiments() -> Experiments:
    return Experiments()


@pytest.fixture
def sweep(tiny_config, command, experiments, tmp_path, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """`sweep` of the tiny decoder into tmp_path/sweep."""
    path = tiny_config(trainer={"max_steps": STEPS})
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(verb, "Experiments", lambda: experiments)  # made once for all tests

    def run(*options: str, attentions: Iterable[str] = ("sha",), seeds: Iterable[int] = (1,)):
        chosen = ["--attentions", *attentions, "--seeds", *map(str, seeds)]
        return command("sweep", "--config", str(path), *chosen, "--root", str(tmp_path / "sweep"), *options)

    return run


class Trainings:
    """Stands for the processes of a sweep: leaves what `fit` and `test` would.

    `ppl` has perplexities of the validation by the name of the run, `fail` the exit codes of runs that fail.
    """

    def __init__(self) -> None:
        self.configs: dict[str, dict] = {}
        self.calls: list[tuple[str, str]] = []
        self.ppl: dict[str, float] = {}
        self.fail: dict[str, int] = {}

    def __call__(self, arguments: list[str], log: Path) -> int:
        options = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
        name, folder = options["name"], Path(options["trainer.default_root_dir"]) / options["name"]
        self.calls.append((arguments[0], name))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("a line\nerror: a reason\n")
        if name in self.fail:
            return self.fail[name]
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = self.configs[name]
        path = folder / "results.json"
        if arguments[0] == "fit":
            (folder / "config.yaml").write_text(yaml.safe_dump({**config, "ckpt_path": None}))
            checkpoint(folder, STEPS)
            metrics = {"val/loss": 1.0, "val/ppl": self.ppl.get(name, 3.0)}
            results = {"steps": STEPS, "finished": "now", "metrics": metrics}
        else:
            entry = {
                "checkpoint": f"elsewhere/step={STEPS:08d}.ckpt",
                "metrics": {"test/ppl": 4.0},
                "data": config["data"],
            }
            results = {**json.loads(path.read_text()), "evaluations": {"test": entry}}
        path.write_text(json.dumps(results))
        return 0


def checkpoint(folder: Path, step: int) -> Path:
    """A file that passes for a complete checkpoint."""
    path = folder / "checkpoints" / f"step={step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(b"weights").hexdigest())
    return path


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    stub = Trainings()
    resolve = engine.resolve

    def seen(experiments, arguments):
        config = resolve(experiments, arguments)
        stub.configs[config["name"]] = config
        return config

    monkeypatch.setattr(engine, "resolve", seen)
    monkeypatch.setattr(Children, "__call__", lambda self, arguments, log: stub(list(arguments), log))
    return stub


def manifest_of(root: Path) -> dict:
    return json.loads((root / "sweep.json").read_text(encoding="utf-8"))


# Which runs


def test_a_grid_has_options_with_values_and_numbers_in_one_form():
    grid = parse_grid(["model.lr=1e-3,2e-3", "--data.batch_size=16, 032", "model.betas=[0.9,0.95],[0.9,0.98]"])

    assert grid == {
        "model.lr": ("0.001", "0.002"),
        "data.batch_size": ("16", "32"),
        "model.betas": ("[0.9,0.95]", "[0.9,0.98]"),
    }


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["model.lr"], "try model.lr=1e-3,2e-3"),
        (["=1"], "must be an option"),
        (["model.lr="], "empty value"),
        (["model.lr=1e-3,"], "empty value"),
        (["model.lr=1e-3,0.001"], "0.001 twice"),
        (["model.lr=1", "model.init_args.lr=2"], "given twice"),
        (["seed_everything=1,2"], "--seeds"),
        (["model.net.attention=a.yaml,b.yaml"], "--attentions"),
        (["model.init_args.net.init_args.attention=a.yaml"], "--attentions"),
        (["name=a,b"], "name"),
    ],
)
def test_a_wrong_grid_is_refused_with_the_remedy(texts, named):
    with pytest.raises(ValueError, match=named):
        parse_grid(texts)


@pytest.mark.parametrize(
    ("arguments", "changes", "named"),
    [
        (["--model.lr", "1e-3"], {"grid": {"model.init_args.lr": ("1", "2")}}, "leave one of them out"),
        (["--seed_everything=3"], {}, "--seeds"),
        (["--trainer.default_root_dir", "x"], {}, "--root"),
        (["--name", "x"], {}, "name"),
        ([], {"seeds": (1, 1)}, "seed 1 is given twice"),
        ([], {"seeds": ()}, "at least one"),
        ([], {"mode": "equal"}, "equal_parameters"),
        ([], {"split": "val", "score": "best"}, "split 'test'"),
        ([], {"mode": "equal_flops"}, "reference"),
    ],
)
def test_a_wrong_sweep_is_refused_with_the_remedy(arguments, changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        sweep_of(tmp_path, *arguments, **changes)


def test_runs_are_named_by_attention_grid_point_and_seed_and_keep_seeds_together(tmp_path, experiments):
    sweep = sweep_of(tmp_path, grid=parse_grid(["model.lr=1e-3,2e-3", "data.batch_size=16"]))

    runs = make_runs(sweep, experiments)

    assert [run.name for run in runs] == [
        f"{attention}-lr={lr}-batch_size=16-seed{seed}"
        for seed in (1, 2)
        for lr in ("0.001", "0.002")
        for attention in ("mha", "sha")
    ]
    assert runs[1].arguments == (
        "--name=sha-lr=0.001-batch_size=16-seed1",
        f"--trainer.default_root_dir={tmp_path}",
        "--seed_everything=1",
        f"--model.net.attention={ATTENTION / 'sha.yaml'}",
        "--model.lr=0.001",
        "--data.batch_size=16",
    )


def test_names_without_a_grid_and_of_values_that_are_paths(tmp_path, experiments):
    assert make_runs(sweep_of(tmp_path), experiments)[0].name == "mha-seed1"
    paths = sweep_of(tmp_path, grid=parse_grid(["data.path=a/b,c d"]))
    assert [run.name for run in make_runs(paths, experiments)][::2][:2] == ["mha-path=a_b-seed1", "mha-path=c_d-seed1"]
    with pytest.raises(ValueError, match="two points"):
        make_runs(sweep_of(tmp_path, grid=parse_grid(["data.path=a/b,a:b"])), experiments)


def test_attention_and_seed_stand_for_those_of_the_run(tmp_path, experiments):
    runs = make_runs(sweep_of(tmp_path, "--init_from", "books/{attention}-seed{seed}"), experiments)

    assert [run.arguments[1] for run in runs] == [f"books/{a}-seed{s}" for s in (1, 2) for a in ("mha", "sha")]


def test_sizes_of_other_modes_go_to_the_runs(tmp_path, experiments, monkeypatch):
    asked = []

    def match(experiments, arguments, overlay, *, reference, mode, spend):
        asked.append((list(arguments), overlay.stem, reference.stem, mode, spend))
        return {} if overlay == reference else {"model.net.ff_width": 96}

    monkeypatch.setattr("mhe_lightning.sweep.runs.match", match)
    changes = {"mode": "equal_parameters", "spend": "feed_forward", "reference": ATTENTION / "mha.yaml"}
    runs = make_runs(sweep_of(tmp_path, "--x=1", grid=parse_grid(["model.lr=1,2"]), **changes), experiments)

    assert "--model.net.ff_width=96" not in runs[0].arguments
    assert all("--model.net.ff_width=96" in run.arguments for run in runs if run.attention == "sha")
    assert asked == [(["--x=1"], name, "mha", "equal_parameters", "feed_forward") for name in ("mha", "sha")]
    with pytest.raises(ValueError, match=r"ff_width is what mode equal_parameters adjusts"):
        make_runs(sweep_of(tmp_path, grid=parse_grid(["model.net.ff_width=64,96"]), **changes), experiments)


# What is done


def test_a_dry_run_prints_the_runs_and_leaves_nothing(sweep, tmp_path, trainings):
    code, out, err = sweep("--grid", "model.lr=1e-3,2e-3", "--dry_run", attentions=["mha", "sha"])

    assert code == 0, err
    assert "[2/4] sha-lr=0.001-seed1  (not begun)" in out
    assert "--model.net.attention=configs/attention/sha.yaml --model.lr=0.001" in out
    assert not trainings.calls
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.nett.width", "3"], "nett"),
        (["--seed", "3"], "did you mean --seeds?"),
        (["--model.lr", "fast"], "model.lr"),
        (["--grid", "model.lr=fast"], "model.lr"),
        (["--grid", "model.speed=1,2"], "speed"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps (-1)"),
        (["--trainer.max_time", "00:01:00:00"], "trainer.max_time"),
        (["--trainer.max_steps", "6"], "val_check_interval (4) must divide"),
        (["--score", "averaged"], "--averaging.last"),
        (["--score", "newest"], "newest"),
        (["--task", "3"], "task (3) must be from 1 to 2"),
        (["--init_from", "nowhere/{attention}"], "nowhere/mha"),
        (["--mode", "equal_flops", "--reference", "none"], "none"),
    ],
)
def test_a_bad_option_is_found_before_anything_runs(options, named, sweep, trainings, tmp_path):
    code, _, err = sweep(*options, attentions=["mha", "sha"])

    assert code == 2
    assert named in err
    assert "Traceback" not in err
    assert not trainings.calls
    assert not (tmp_path / "sweep").exists()


def test_finished_runs_are_skipped_and_the_others_trained_and_tested(sweep, trainings, tmp_path):
    root = tmp_path / "sweep"
    both = ["mha", "sha"]
    code, out, err = sweep(attentions=both)
    assert code == 0, err
    assert trainings.calls == [(kind, f"{name}-seed1") for kind in ("fit", "test") for name in ("mha", "sha")]
    assert "[2/2] sha-seed1  val/ppl 3.00  " in out
    assert "test/ppl 4.00" in out
    assert f"compare: python train.py compare {root}" in out

    path = root / "sha-seed1" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": STEPS - 1}))
    trainings.calls = []
    code, out, _ = sweep(attentions=both)
    assert code == 0
    assert "[1/2] mha-seed1  val/ppl 3.00  finished earlier" in out
    assert "test/ppl 4.00  tested earlier" in out
    assert trainings.calls == [("fit", "sha-seed1"), ("test", "sha-seed1")]


def test_a_run_is_finished_with_its_last_step_its_record_and_its_validation(tmp_path):
    config = {"trainer": {"max_steps": STEPS}}
    whole = {"steps": STEPS, "finished": "now", "metrics": {"val/loss": 1.0}}
    assert not engine.is_finished(tmp_path, config)
    for changes, finished in (
        ({}, True),
        ({"steps": STEPS - 1}, False),
        ({"steps": STEPS + 1}, False),
        ({"metrics": {"train/loss": 1.0}}, False),
    ):
        (tmp_path / "results.json").write_text(json.dumps({**whole, **changes}))
        assert engine.is_finished(tmp_path, config) is finished
    (tmp_path / "results.json").write_text('{"steps": ')
    assert not engine.is_finished(tmp_path, config)


def test_a_test_of_another_checkpoint_or_other_data_is_made_anew(sweep, trainings, tmp_path):
    assert sweep()[0] == 0
    path = tmp_path / "sweep" / "sha-seed1" / "results.json"
    for change in ({"checkpoint": "step=00000004.ckpt"}, {"data": {"class_path": "another"}}):
        results = json.loads(path.read_text())
        results["evaluations"]["test"].update(change)
        path.write_text(json.dumps(results))
        trainings.calls = []
        assert sweep()[0] == 0
        assert trainings.calls == [("test", "sha-seed1")]


def test_a_failed_run_is_told_and_the_others_go_on(sweep, trainings):
    trainings.fail = {"mha-seed1": 1}
    code, _, err = sweep(attentions=["mha", "sha"])

    assert code == 1
    assert trainings.calls == [("fit", "mha-seed1"), ("fit", "sha-seed1"), ("test", "sha-seed1")]
    assert "mha-seed1 failed: `fit`, exit code 1" in err
    assert "    a line" in err
    assert "1 failed: mha-seed1" in err


def test_a_refused_config_is_not_tried_with_other_seeds_and_the_others_go_on(sweep, trainings):
    trainings.fail = {"mha-seed1": 2}
    code, _, err = sweep(attentions=["mha", "sha"], seeds=[1, 2])

    assert code == 1
    assert trainings.calls == [
        ("fit", "mha-seed1"),
        ("fit", "sha-seed1"),
        ("fit", "sha-seed2"),
        ("test", "sha-seed1"),
        ("test", "sha-seed2"),
    ]
    assert "a reason" in err
    assert "2 failed: mha-seed1, mha-seed2" in err


@pytest.mark.parametrize("attentions", [["mha"], ["mha", "sha", "mqa"]], ids=["all of them", "two for one reason"])
def test_a_config_that_no_run_can_have_ends_the_sweep(attentions, sweep, trainings):
    trainings.fail = {f"{name}-seed1": 2 for name in attentions}
    code, _, err = sweep(attentions=attentions)

    assert code == 2
    assert trainings.calls == [("fit", f"{name}-seed1") for name in attentions[:2]]
    assert "a reason" in err


def test_the_best_point_on_validation_alone_is_tested(sweep, trainings, tmp_path):
    grid = ["--grid", "model.lr=1e-3,2e-5"]
    trainings.ppl = {
        "mha-lr=0.001-seed1": 2.0,
        "mha-lr=0.001-seed2": 9.0,
        "mha-lr=2e-05-seed1": 4.0,
        "mha-lr=2e-05-seed2": 4.0,
        "sha-lr=2e-05-seed1": float("nan"),
    }
    code, out, err = sweep(*grid, attentions=["mha", "sha"], seeds=[1])
    assert code == 0, err
    assert [name for kind, name in trainings.calls if kind == "test"] == ["mha-lr=0.001-seed1", "sha-lr=0.001-seed1"]

    code, out, err = sweep(*grid, attentions=["mha", "sha"], seeds=[2])
    assert code == 0, err
    tested = [name for kind, name in trainings.calls if kind == "test"]
    assert tested[2:] == ["mha-lr=2e-05-seed1", "sha-lr=0.001-seed2", "mha-lr=2e-05-seed2"]
    assert "chosen for mha: model.lr=2e-05" in out
    assert manifest_of(tmp_path / "sweep")["chosen"] == {"mha": {"model.lr": 2e-5}, "sha": {"model.lr": 1e-3}}


def test_nothing_is_chosen_before_all_points_are_trained(sweep, trainings, tmp_path):
    trainings.fail = {"sha-lr=0.002-seed1": 1}
    code, out, _ = sweep("--grid", "model.lr=1e-3,2e-3", attentions=["mha", "sha"])

    assert code == 1
    assert "chosen for sha: when all its runs are finished" in out
    assert list(manifest_of(tmp_path / "sweep")["chosen"]) == ["mha"]


def test_means_decide_equals_take_the_first_and_diverged_is_worst():
    nan, inf = float("nan"), float("inf")
    assert best_point([[1.0, 4.0], [2.0, 2.0]], higher_is_better=False) == 1
    assert best_point([[1.0, 4.0], [2.0, 2.0]], higher_is_better=True) == 0
    assert best_point([[2.0], [2.0]], higher_is_better=True) == 0
    assert best_point([[nan], [-5.0]], higher_is_better=True) == 1
    assert best_point([[inf], [5.0]], higher_is_better=False) == 1
    assert best_point([[nan], [nan]], higher_is_better=False) == 0


@pytest.mark.parametrize("options", [["--split", "val"], ["--score", "none"]])
def test_without_a_test_split_nothing_is_tested(options, sweep, trainings):
    assert sweep(*options)[0] == 0
    assert {kind for kind, _ in trainings.calls} == {"fit"}


def test_a_task_trains_its_run_alone(sweep, trainings):
    code, out, err = sweep("--task", "2", attentions=["mha", "sha"])

    assert code == 0, err
    assert trainings.calls == [("fit", "sha-seed1")]
    assert "[2/2] sha-seed1" in out


def test_the_manifest_says_what_was_run_and_grows_by_attentions_and_seeds(sweep, trainings, tmp_path):
    assert sweep("--split", "val")[0] == 0
    first = manifest_of(tmp_path / "sweep")
    assert first["format_version"] == 1
    assert first["mode"] == "equal_architecture"
    assert first["attentions"] == {"sha": {"class_path": "mhe_lightning.attention.SHA"}}
    assert first["runs"] == {"sha-seed1": {"attention": "sha", "seed": 1, "settings": {}, "sizes": {}}}
    assert first["config"]["trainer"]["max_steps"] == STEPS
    assert first["chosen"] == {"sha": {}}

    assert sweep("--split", "val", attentions=["mha"], seeds=[1, 2])[0] == 0
    second = manifest_of(tmp_path / "sweep")
    assert second["seeds"] == [1, 2]
    assert list(second["attentions"]) == ["sha", "mha"]
    assert list(second["runs"]) == ["sha-seed1", "mha-seed1", "mha-seed2"]
    assert second["config"] == first["config"]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ([], ["--model.lr", "0.5"], "model.init_args.lr was 0.01, now 0.5"),
        ([], ["--grid", "model.lr=1,2"], "grid.model.lr was None, now ['1', '2']"),
        ([], ["--data.num_workers", "1"], "num_workers was 0, now 1"),
    ],
)
def test_another_sweep_in_the_same_root_is_refused(first, second, named, sweep, trainings, tmp_path):
    assert sweep("--split", "val", *first)[0] == 0
    before = manifest_of(tmp_path / "sweep")
    code, _, err = sweep("--split", "val", *second, seeds=[7])

    assert code == 2
    assert named in err
    assert "--root" in err
    assert manifest_of(tmp_path / "sweep") == before


def test_an_overlay_that_has_changed_is_refused(sweep, trainings, tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("class_path: mhe_lightning.attention.GQA\ninit_args: {n_kv_heads: 1}\n")
    assert sweep("--split", "val", attentions=[str(overlay)])[0] == 0
    overlay.write_text("class_path: mhe_lightning.attention.GQA\ninit_args: {n_kv_heads: 2}\n")
    code, _, err = sweep("--split", "val", attentions=[str(overlay)], seeds=[7])

    assert code == 2
    assert "attentions.mine.init_args.n_kv_heads was 1, now 2" in err


def test_the_scored_checkpoint_may_change(sweep, trainings):
    assert sweep("--score", "none")[0] == 0
    code, out, err = sweep("--score", "last")

    assert code == 0, err
    assert "score: was none, now last" in out
    assert [kind for kind, _ in trainings.calls] == ["fit", "test"]


def test_a_folder_with_another_run_is_refused(sweep, trainings, tmp_path):
    assert sweep()[0] == 0
    path = tmp_path / "sweep" / "sha-seed1" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"]["cache_dir"] = "elsewhere"
    config["trainer"]["default_root_dir"] = "moved"
    path.write_text(yaml.safe_dump(config))
    assert sweep()[0] == 0

    config["model"]["init_args"]["lr"] = 0.5
    path.write_text(yaml.safe_dump(config))
    code, _, err = sweep()

    assert code == 2
    assert "model.init_args.lr was 0.5, now 0.01" in err


def test_a_run_killed_before_its_results_goes_on_from_the_checkpoint_before(tmp_path):
    config = {"trainer": {"max_steps": STEPS}}
    assert engine.begin_from(tmp_path, config) == "auto"
    earlier = checkpoint(tmp_path, STEPS // 2)
    assert engine.begin_from(tmp_path, config) == "auto"
    checkpoint(tmp_path, STEPS)
    assert engine.begin_from(tmp_path, config) == str(earlier)


def test_a_slurm_script_has_a_task_per_run_and_scores_after_them(sweep, tmp_path):
    code, out, err = sweep("--trainer.gradient_clip_val", "0.5", "--slurm", seeds=[1, 2], attentions=["mha", "sha"])
    assert code == 0, err
    path = tmp_path / "sweep.sh"
    path.write_text(out)
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "sbatch"
    stub.write_text(f'#!/bin/bash\n{{ echo "$@"; cat; }} >> {tmp_path}/submitted\necho "77;cluster"\n')
    stub.chmod(0o755)

    assert subprocess.run(["bash", "-n", path]).returncode == 0
    subprocess.run(["bash", path], check=True, env={**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"})

    submitted = (tmp_path / "submitted").read_text()
    array, scoring = submitted.split("--dependency=")
    assert "--array=1-4 " in array
    assert f"{sys.executable} -m mhe_lightning sweep --config" in array
    assert "--trainer.gradient_clip_val 0.5" in array
    assert '--task "$SLURM_ARRAY_TASK_ID"' in array
    assert scoring.startswith("afterok:77 ")
    assert "--task" not in scoring
    assert "--slurm" not in submitted


@pytest.mark.parametrize(
    ("seconds", "told"), [(12.4, "12 s"), (130, "2 min 10 s"), (3600, "1 h"), (11100, "3 h 5 min"), (90000, "1 d 1 h")]
)
def test_durations_have_two_units(seconds, told):
    assert engine.duration(seconds) == told


# Signals


def forked(args: list[str], log: Path) -> multiprocessing.Process:
    """`train.py` with ``args`` in a process of its own."""
    child = multiprocessing.get_context("fork").Process(target=processes._child, args=(args, {}, log))
    child.start()
    return child


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], *, timeout: float = 120.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_ends_the_sweep_and_its_child(number, code, tiny_config, tmp_path, monkeypatch, capfd):
    stub = tmp_path / "python"
    traps = "trap 'echo saved; exit 143' TERM\ntrap 'echo requeued, saved; exit 143' USR1\n"
    stub.write_text(f"#!/bin/bash\n{traps}echo begun\nwhile :; do sleep 0.05; done\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.chdir(ROOT)
    log = tmp_path / "sweep" / "sha-seed1.log"
    options = ["--config", str(tiny_config()), "--attentions", "sha", "--seeds", "1", "--root", str(tmp_path / "sweep")]

    sweep = forked(["sweep", *options], tmp_path / "log")
    wait_until(lambda: log.is_file() and "begun" in log.read_text())
    (child,) = children_of(sweep.pid)
    os.kill(sweep.pid, number)
    sweep.join(60)

    assert sweep.exitcode == code, (tmp_path / "log").read_text()
    wait_until(lambda: is_gone(child), timeout=10)
    if number != signal.SIGKILL:
        assert "saved" in log.read_text()
        assert ("requeued" in log.read_text()) == (number == signal.SIGUSR1)
        assert "the same command goes on" in capfd.readouterr().err


# To the digit


def table_of(folder: Path) -> dict:
    """All that a run has recorded but how long it took."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        timings = ("tokens_per_second", "mfu", "data_wait")
        rows = [{key: row[key] for key in sorted(row) if key not in timings} for row in csv.DictReader(file)]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {
        "rows": rows,
        "metrics": {key: value for key, value in results["metrics"].items() if key.startswith("val/")},
        "test": results["evaluations"]["test"]["metrics"],
        "checkpoint": Path(results["evaluations"]["test"]["checkpoint"]).name,
        **{key: results[key] for key in ("steps", "tokens_seen", "parameters", "data", "seed")},
    }


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sweep_killed_at_random_and_started_again_gives_the_table_of_one_that_was_not(
    tiny_config, prose, tmp_path, monkeypatch
):
    steps = 120
    corpus = {"path": str(prose), "tokenizer_size": 300, "validation_fraction": 0.1, "test_fraction": 0.1}
    path = tiny_config(trainer={"max_steps": steps, "val_check_interval": 40}, data={"corpus": corpus})
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ["mhe_add-seed1", "sha-seed1"]
    command = ["sweep", "--config", str(path), "--attentions", "mhe_add", "sha", "--seeds", "1"]
    command += ["--checkpoints.every_n_steps", "20"]
    log = tmp_path / "log"

    def uninterrupted(root: Path) -> None:
        with monkeypatch.context() as patch:  # children that need not import everything
            patch.setattr(Children, "__call__", lambda self, args, log: processes.run(list(args), log=log)[0])
            main([*command, "--root", str(root)])

    uninterrupted(tmp_path / "whole")

    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    name, rows = draw.choice(names), draw.randint(1, steps // 2)
    told = f"killed in {name} at row {rows} (seed {seed})"
    metrics = tmp_path / "killed" / name / "metrics.csv"
    sweep = forked([*command, "--root", str(tmp_path / "killed")], log)
    wait_until(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") > rows)
    (child,) = children_of(sweep.pid)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.join(60)
    wait_until(lambda: is_gone(child), timeout=10)
    assert not (tmp_path / "killed" / name / "results.json").exists(), f"the kill came after the training: {told}"

    uninterrupted(tmp_path / "killed")

    for run in names:
        whole, killed = (table_of(tmp_path / root / run) for root in ("whole", "killed"))
        assert len(whole["rows"]) == steps
        assert killed == whole, told
