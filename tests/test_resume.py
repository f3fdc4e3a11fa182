"""A run that is killed and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import logged
from processes import run

CASES = {
    "plain": dict(ranks=1, workers=0, accumulate=1),
    "workers": dict(ranks=1, workers=2, accumulate=1),
    "accumulation": dict(ranks=1, workers=0, accumulate=2),
    "two ranks": dict(ranks=2, workers=0, accumulate=1),
    "two ranks, workers, accumulation": dict(ranks=2, workers=2, accumulate=2),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=_marks) for case, _marks in
    [(name, [pytest.mark.distributed] if c["ranks"] > 1 else []) for name, c in CASES.items()]])
@pytest.mark.parametrize("killed_after", [5, 9])
def test_losses_after_a_kill_equal_the_uninterrupted_runs(case, killed_after, tiny_config, tmp_path):
    settings = CASES[case]
    path = tiny_config(
        data={"num_workers": settings["workers"], "batch_size": 40},
        trainer={
            "max_steps": 12,
            "accumulate_grad_batches": settings["accumulate"],
            "strategy": "ddp" if settings["ranks"] > 1 else "auto",
            "devices": settings["ranks"],
            "val_check_interval": 3 * settings["accumulate"],
        },
    )
    fit = ["fit", "--config", str(path)]
    log = tmp_path / "log"
    kill = [
        "--trainer.callbacks+=processes.KillAt",
        f"--trainer.callbacks.micro_batch={killed_after * settings['accumulate']}",
    ]

    assert run([*fit, "--name", "whole"], ranks=settings["ranks"], log=log) == [0] * settings["ranks"], log.read_text()
    killed = run([*fit, "--name", "killed", *kill], ranks=settings["ranks"], log=log)
    assert all(code != 0 for code in killed), log.read_text()
    resumed = run([*fit, "--name", "killed", "--ckpt_path", "auto"], ranks=settings["ranks"], log=log)
    assert resumed == [0] * settings["ranks"], log.read_text()

    runs = tmp_path / "runs"
    for column in ("train/loss", "val/loss", "tokens_seen", "lr"):
        assert logged(runs / "killed", column) == logged(runs / "whole", column)
    assert list(logged(runs / "whole", "train/loss")) == list(range(1, 13))
