"""A run of several processes ends soon, on all of them, when one of them is lost; and says which."""

from __future__ import annotations

import time

import pytest
import yaml

from conftest import prepare
from processes import run

pytestmark = pytest.mark.distributed


@pytest.fixture
def two_ranks(tiny_config, tmp_path, monkeypatch):
    """Runs `fit` on two processes, one of which comes to grief; gives exit codes, seconds and output."""
    path = tiny_config(trainer={"devices": 2, "strategy": "ddp", "max_steps": 20})
    prepare(yaml.safe_load(path.read_text()))
    log = tmp_path / "log"

    def fit(kind: str, *options: str, rank: int = 1, micro_batch: int = 5) -> tuple[list[int], float, str]:
        fault = ["--trainer.callbacks+=callbacks.faults.FaultAt", f"--trainer.callbacks.kind={kind}"]
        fault += [f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.micro_batch={micro_batch}"]
        begun = time.monotonic()
        codes = run(["fit", "--config", str(path), *fault, *options], ranks=2, log=log)
        return codes, time.monotonic() - begun, log.read_text()

    return fit


def test_a_rank_that_hangs_is_named_and_ends_both(two_ranks, tmp_path):
    codes, seconds, output = two_ranks("sleep", "--watchdog.timeout_seconds=4")
    print(codes, seconds, output)
    assert 0


@pytest.mark.parametrize("kind", ["memory", "kill", "error"])
@pytest.mark.parametrize("rank", [0,1])
def test_x(two_ranks, tmp_path, kind, rank):
    codes, seconds, output = two_ranks(kind, rank=rank)
    print(codes, seconds, output)
    for p in (tmp_path/"runs"/"tiny"/"logs").iterdir():
        print(p, p.read_text())
    assert 0
