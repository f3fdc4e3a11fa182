"""Some runs of each kind of the fault campaign, and that it would find what is wrong."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def modules():
    """The campaign's two modules."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fault_campaign
        import fault_injection
    finally:
        sys.path.remove(str(BENCHMARKS))
    return fault_campaign, fault_injection


@pytest.fixture(scope="module")
def campaign(modules, tmp_path_factory):
    return modules[0].Campaign(tmp_path_factory.mktemp("faults"), seed=1, overlay=None)


STEP, SAVED = "step: before the optimizer", "checkpoint: before its checksum"
RUNS = {
    # ranks, data workers, (kind, place, nth, rank) one after another, what is done to the newest checkpoint before each
    "killed in a step, then in a damaged run": (
        (1, 0),
        [("SIGKILL", STEP, 14, 0), ("SIGKILL", "checkpoint: half written", 2, 0)],
        [None, "byte flipped"],
    ),
    "killed between a checkpoint and its checksum": ((1, 0), [("SIGKILL", SAVED, 2, 0)], []),
    "killed with a data worker": ((1, 2), [("dead data worker", STEP, 9, 0)], []),
    "terminated with its group": ((1, 2), [("SIGTERM to the group", STEP, 9, 0)], []),
    "not a number": ((1, 0), [("NaN", STEP, 9, 0)], []),
    "one of two ranks killed": ((2, 0), [("SIGKILL", "validation", 1, 1)], []),
    "one of two ranks terminated": ((2, 0), [("SIGTERM", STEP, 9, 1)], []),
}


@pytest.mark.parametrize(
    ("shape", "faults", "damages"),
    [pytest.param(*run, id=name, marks=[pytest.mark.distributed] * (run[0][0] > 1)) for name, run in RUNS.items()],
)
def test_a_run_with_faults_ends_as_one_without(shape, faults, damages, campaign, modules, request):
    name = f"run{len(request.node.callspec.id)}-{faults[0][0].split()[0]}-{shape[0]}"
    found = campaign.undergo(name, *shape, [modules[1].Fault(*fault) for fault in faults], damages)

    assert found["problems"] == []
    struck = [attempt["codes"] for attempt in found["attempts"]][:-1]
    assert len(struck) == len(faults)
    assert all(set(codes) != {0} for codes in struck)
    assert [attempt["damaged"] for attempt in found["attempts"]][: len(damages)] == damages


def test_a_run_on_a_full_disk_ends_as_one_without(campaign, modules):
    if not modules[0].can_mount():
        pytest.skip("only root can mount a small file system here")
    fault = modules[1].Fault("full disk", STEP, 6, free=60_000)
    found = campaign.undergo("full", 1, 0, [fault])

    assert found["problems"] == []
    assert found["attempts"][0]["codes"] == [1]


def test_what_is_wrong_is_found(campaign, modules, monkeypatch):
    """A run that goes on with other rows, and one that has no regard for damage."""
    expected, _ = campaign.reference(1, 0)
    wrong = {**expected, "weights": {key: value + 1 for key, value in expected["weights"].items()}}
    wrong["metrics.csv"] = expected["metrics.csv"][:-1]
    assert modules[0]._different(expected, expected) == []
    assert modules[0]._different(expected, wrong) == ["metrics.csv", "weights"]

    monkeypatch.setattr(modules[0], "newest_whole", lambda folder: 8)
    found = campaign.undergo("wrong", 1, 0, [modules[1].Fault("SIGTERM", STEP, 14)])
    assert found["problems"] == [
        "SIGTERM lost steps: 8 is saved of 14",
        "went on from step 14, the newest whole checkpoint is of step 8",
    ]


@pytest.mark.parametrize("kind", ["cut short", "byte flipped", "checksum changed", "checksum lost", "empty"])
def test_damage_is_damage(kind, modules, tmp_path):
    from mhe_lightning.checkpoint import AtomicCheckpointIO, damage

    path = tmp_path / "step=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"numbers": list(range(100))}, path)
    assert damage(path) is None
    modules[0].harm(path, kind, random.Random(1))
    assert damage(path) is not None
