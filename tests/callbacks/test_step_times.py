"""What steps wait for, and who holds up the others."""

from __future__ import annotations

import json

import pytest
import yaml

from conftest import logged, prepare
from mhe_lightning.callbacks import StepTimes
from mhe_lightning.callbacks.step_times import Times, straggler
from processes import run

EVEN = Times(data=0.001, forward=0.1, whole=0.3)


def test_equal_ranks_have_no_straggler():
    assert straggler([EVEN] * 4, percent=50) is None
    assert straggler([EVEN], percent=50) is None


@pytest.mark.parametrize(("times", "cause"), [(Times(0.2, 0.1, 0.5), "data"), (Times(0.001, 0.2, 0.5), "compute")])
def test_the_slowest_rank_and_its_cause_are_named(times, cause):
    found = straggler([EVEN, EVEN, times, EVEN], percent=50)

    assert found is not None
    assert found[:2] == (2, cause)
    assert found[2].startswith(f"rank 2 holds up the others by its {cause}")


def test_of_two_ranks_the_slower_one_is_the_straggler():
    found = straggler([EVEN, Times(0.001, 0.16, 0.4)], percent=50)

    assert found is not None
    assert found[0] == 1


def test_what_costs_little_of_a_step_is_no_straggler():
    assert straggler([EVEN, Times(0.001, 0.2, whole=10.0)], percent=50) is None


def test_a_single_process_logs_its_wait_for_data(tiny_config, tmp_path, command):
    code, _, err = command("fit", "--config", str(tiny_config()))

    assert code == 0, err
    waits = {step: float(value) for step, value in logged(tmp_path / "runs" / "tiny", "data_wait").items()}
    assert list(waits) == list(range(1, 9))
    assert all(0 < share < 1 for share in waits.values())
    results = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    assert 0 < results["step_times"]["data_wait"] < 1


@pytest.mark.distributed
def test_a_slow_rank_is_reported(tiny_config, tmp_path):
    path = tiny_config(trainer={"devices": 2, "strategy": "ddp", "max_steps": 8, "log_every_n_steps": 2})
    prepare(yaml.safe_load(path.read_text()))
    slow = ["--trainer.callbacks+=callbacks.faults.SlowForward", "--trainer.callbacks.rank=1"]
    slow += ["--trainer.callbacks.seconds=0.5"]

    assert run(["fit", "--config", str(path), *slow], ranks=2, log=tmp_path / "log") == [0, 0]

    folder = tmp_path / "runs" / "tiny"
    results = json.loads((folder / "results.json").read_text())
    assert results["step_times"]["straggler_reports"] == {"rank 1, compute": 3}, "at the second logged step and after"
    assert "rank 1 holds up the others by its compute" in (folder / "logs" / "rank-0000.log").read_text()


def test_a_share_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"straggler_percent \(0\) must be positive"):
        StepTimes(straggler_percent=0)
