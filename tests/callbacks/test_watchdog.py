"""A run of several processes ends soon, on all of them, when one of them is lost; and says which."""

from __future__ import annotations

import os
import re
import select
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import prepare
from mhe_lightning.callbacks import Watchdog
from mhe_lightning.callbacks.failures import LESS_MEMORY
from processes import run


@dataclass
class Ended:
    """What is left of a run."""

    codes: list[int]
    seconds: float
    output: str
    folder: Path

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank:04d}.log").read_text(encoding="utf-8")


@pytest.fixture
def fit(tiny_config, tmp_path, capfd):
    """Runs `fit` on some processes, one of which comes to grief, and waits until all are gone."""

    def start(
        kind: str,
        *options: str,
        ranks: int = 2,
        rank: int = 1,
        micro_batch: int = 5,
        workers: int = 0,
        verb: str = "fit",
    ) -> Ended:
        trainer = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_steps": 20}
        path = tiny_config(trainer=trainer, data={"num_workers": workers})
        prepare(yaml.safe_load(path.read_text()))
        log = tmp_path / "log"
        fault = ["--trainer.callbacks+=callbacks.faults.FaultAt", f"--trainer.callbacks.kind={kind}"]
        fault += [f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.micro_batch={micro_batch}"]
        begun = time.monotonic()
        reading, writing = os.pipe()  # open as long as a process is left that came from here
        codes = run(["fit", "--config", str(path), *fault, *options], ranks=ranks, log=log)
        os.close(writing)
        gone, _, _ = select.select([reading], [], [], 20)
        os.close(reading)
        assert gone, "a process is left running"
        seconds = time.monotonic() - begun
        return Ended(codes, seconds, "".join((*capfd.readouterr(), log.read_text())), tmp_path / "runs" / "tiny")

    return start


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_all_end(fit, rank):
    ended = fit("sleep", "--watchdog.timeout_seconds=8", rank=rank, workers=1)

    assert ended.codes == [1, 1]
    assert ended.seconds < 60
    named = rf"rank {rank} \(host .*, process \d+\) has been in step 6, forward pass \(\[Callback\]FaultAt"
    assert re.search(named, ended.output), ended.output
    assert "faults.py" in ended.log(rank)
    for each in (0, 1):
        assert re.search(named, ended.log(each))
        assert "most recent call first" in ended.log(each), "where in Python each of them was"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_holds_pythons_lock_ends_too(fit, monkeypatch):
    monkeypatch.setattr("mhe_lightning.callbacks.watch.LATEST", 5.0)

    ended = fit("sleep with the lock", "--watchdog.timeout_seconds=8")

    assert ended.codes == [1, 1]
    assert re.search(r"rank 1 \(host .*\) has been in .* for 8 s; the others wait in step 6", ended.log(0))
    assert "most recent call first" in ended.output


@pytest.mark.slow
@pytest.mark.distributed
def test_out_of_memory_on_one_rank_ends_all_with_the_remedy(fit):
    ended = fit("memory")

    assert ended.codes == [1, 1]
    assert ended.seconds < 60
    for text in (ended.output, ended.log(0), ended.log(1)):
        assert re.search(r"rank 1 \(.*\) failed at step 6: out of memory \(OutOfMemoryError: CUDA out of memory", text)
        assert LESS_MEMORY in text
    timeline = (ended.folder / "logs" / "rank-0001.memory.csv").read_text().splitlines()
    assert len(timeline) == 1 + 5 + 1, "a header, five whole micro-batches and the one that failed"
    assert f"{ended.folder / 'logs' / 'rank-0001.memory.csv'}" in ended.output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all_and_is_told_apart_from_what_follows_from_it(fit, rank):
    ended = fit("bug", rank=rank)

    assert ended.codes == [1, 1]
    assert ended.seconds < 60
    verdicts = {line.partition("; see")[0] for line in ended.output.splitlines() if line.startswith("rank ")}
    assert len(verdicts) == 1, "the other rank's lost connection is not the cause"
    assert re.fullmatch(rf"rank {rank} \(.*\) failed at step 6: KeyError: 'a bug'", verdicts.pop())
    assert "Traceback" in ended.log(rank)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_missed(fit, rank):
    ended = fit("kill", rank=rank, workers=1)

    assert ended.codes[rank] == -9
    assert ended.codes[1 - rank] == 1
    assert ended.seconds < 60
    assert re.search(rf"rank {rank} \(.*\) is gone, last seen in .*: killed, or crashed", ended.log(1 - rank))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs_is_named_where_weights_are_sharded(fit):
    overlay = ["--config", str(Path(__file__).parents[2] / "configs" / "strategy" / "fsdp.yaml")]

    ended = fit("sleep", "--watchdog.timeout_seconds=20", *overlay, "--trainer.devices=2")

    assert ended.codes == [1, 1]
    assert re.search(r"rank 1 \(.*\) has been in step 6, forward pass \(\[Callback\]FaultAt", ended.output), (
        ended.output
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hang_in_the_validation_is_named(fit):
    ended = fit("sleep", "--watchdog.timeout_seconds=8", "--trainer.callbacks.evaluation=true", micro_batch=1)

    assert ended.codes == [1, 1]
    assert re.search(r"rank 1 \(.*\) has been in the validation, after batch 0", ended.output), ended.output


@pytest.mark.slow
def test_a_hang_of_a_single_process_is_named(fit):
    ended = fit("sleep", "--watchdog.timeout_seconds=8", ranks=1, rank=0)

    assert ended.codes == [1]
    assert re.search(r"the run \(.*\) has been in step 6, forward pass \(\[Callback\]FaultAt", ended.output)
    assert "most recent call first" in ended.output


@pytest.mark.slow
@pytest.mark.distributed
def test_pauses_that_are_short_enough_and_an_end_alarm_nobody(fit):
    ended = fit("sleep", "--watchdog.timeout_seconds=8", micro_batch=1000)

    assert ended.codes == [0, 0]
    for rank in (0, 1):
        assert "has been in" not in ended.log(rank)
        assert "is gone" not in ended.log(rank)


@pytest.mark.parametrize(("argument", "value"), [("timeout_seconds", 0), ("port", -1), ("port", 65536)])
def test_numbers_out_of_range_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"{argument} \\({value}\\) must be"):
        Watchdog(**{argument: value})
