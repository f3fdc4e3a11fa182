"""The compose file, as far as it can be checked without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=COMPOSE["services"])
def service(request) -> dict:
    return COMPOSE["services"][request.param]


def test_the_command_line_is_one_that_mhe_takes(service, command):
    code, out, err = command(*service["command"], "--print_config")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["ckpt_path"] == "auto"


def test_the_root_is_read_only_and_what_is_written_has_a_place(service):
    assert service["read_only"] is True
    mounted = {volume.partition(":")[2] for volume in service["volumes"]}
    assert mounted | set(service["tmpfs"]) == {"/app/runs", "/app/prepared", "/cache", "/tmp"}


def test_build_arguments_are_those_of_the_dockerfile(service):
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    for name, value in service["build"]["args"].items():
        assert f"ARG {name}={value.partition(':-')[2].rstrip('}')}\n" in dockerfile


def test_the_nodes_differ_in_their_rank_alone():
    node0, node1 = (COMPOSE["services"][name] for name in ("node0", "node1"))
    assert [node["environment"].pop("NODE_RANK") for node in (node0, node1)] == ["0", "1"]
    assert node0 == node1
    assert node0["environment"]["MASTER_ADDR"] == "node0"
