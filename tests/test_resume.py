"""A run that is killed and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import pytest
import yaml

from conftest import logged, prepare
from mhe_lightning.checkpoint import newest_checkpoint, read_checkpoint
from processes import run

distributed = pytest.mark.distributed

CASES = [
    # ranks, workers, accumulation, log every, killed in step
    pytest.param(1, 0, 1, 1, 5, id="one rank"),
    pytest.param(1, 2, 1, 1, 8, id="two workers"),
    pytest.param(1, 0, 2, 1, 9, id="accumulation"),
    pytest.param(1, 0, 1, 3, 7, id="logging every third step"),
    pytest.param(2, 0, 1, 1, 7, id="two ranks", marks=distributed),
    pytest.param(2, 2, 2, 1, 10, id="two ranks, two workers, accumulation", marks=distributed),
]


@pytest.mark.parametrize(("ranks", "workers", "accumulate", "log_every", "killed_in_step"), CASES)
def test_losses_after_a_kill_equal_the_uninterrupted_runs(
    ranks, workers, accumulate, log_every, killed_in_step, tiny_config, tmp_path
):
    path = tiny_config(
        data={"num_workers": workers, "batch_size": 48},
        trainer={
            "max_steps": 12,
            "accumulate_grad_batches": accumulate,
            "strategy": "ddp" if ranks > 1 else "auto",
            "devices": ranks,
            "val_check_interval": 4 * accumulate,
            "log_every_n_steps": log_every,
        },
    )
    prepare(yaml.safe_load(path.read_text()))
    fit = ["fit", "--config", str(path)]
    log = tmp_path / "log"
    kill = [
        "--trainer.callbacks+=processes.KillAt",
        f"--trainer.callbacks.micro_batch={killed_in_step * accumulate - 1}",
    ]

    assert run([*fit, "--name", "whole"], ranks=ranks, log=log) == [0] * ranks, log.read_text()
    killed = run([*fit, "--name", "killed", *kill], ranks=ranks, log=log)
    assert all(code != 0 for code in killed), log.read_text()
    assert run([*fit, "--name", "killed", "--ckpt_path", "auto"], ranks=ranks, log=log) == [0] * ranks, log.read_text()

    runs = tmp_path / "runs"
    for column in ("train/loss", "val/loss", "tokens_seen", "lr"):
        assert logged(runs / "killed", column) == logged(runs / "whole", column)
    assert list(logged(runs / "whole", "train/loss")) == list(range(log_every, 13, log_every))
    checkpoint = read_checkpoint(newest_checkpoint(runs / "whole" / "checkpoints"))
    data = checkpoint["LanguageModelingData"]
    assert data["consumed"] > data["n_rows"], "the run must go over an epoch's border"
