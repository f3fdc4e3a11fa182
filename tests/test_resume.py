"""A run that is killed and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conftest import logged, prepare
from hub_fixtures import write_glue
from mhe_lightning.checkpoint import newest_checkpoint, read_checkpoint
from mhe_lightning.data import verify_certificate
from mhe_lightning.data.sampler import order_from
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
    kill = killed_in_step * accumulate - 1

    data = resumed_equals_uninterrupted(path, tmp_path, ranks=ranks, micro_batch=kill)

    assert list(logged(tmp_path / "runs" / "whole", "train/loss")) == list(range(log_every, 13, log_every))
    assert data["consumed"] > data["n_rows"], "the run must go over an epoch's border"


@pytest.mark.parametrize("workers", [0, 2])
def test_masked_language_models_resume_bit_for_bit(workers, tiny_config, tmp_path):
    path = tiny_config(data={"num_workers": workers, "batch_size": 48}, trainer={"max_steps": 12})
    config = yaml.safe_load(path.read_text())
    as_encoder(config, "MaskedLanguageModeling")
    config["data"]["class_path"] = "mhe_lightning.data.MaskedLanguageModelingData"
    config["data"]["init_args"]["corpus"]["tokenizer"] = "wordpiece"
    path.write_text(yaml.safe_dump(config))

    data = resumed_equals_uninterrupted(path, tmp_path, ranks=1, micro_batch=6)

    assert data["consumed"] > data["n_rows"], "rows must be masked afresh in the second epoch"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=distributed)])
def test_finetuning_on_batches_of_similar_length_resumes_bit_for_bit(ranks, tiny_config, tmp_path):
    path = tiny_config(trainer={"max_steps": 12, "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"})
    config = yaml.safe_load(path.read_text())
    as_encoder(config, "SequenceClassification")
    glue = {"task": "mrpc", "path": str(write_glue(tmp_path / "glue")), "tokenizer": "wordpiece", "tokenizer_size": 300}
    settings = {"max_length": 16, "batch_size": 8, "cache_dir": str(tmp_path / "prepared")}
    config["data"] = {"class_path": "mhe_lightning.data.GlueData", "init_args": {**glue, **settings}}
    path.write_text(yaml.safe_dump(config))
    assert run(["prepare", "--config", str(path)]) == [0]

    data = resumed_equals_uninterrupted(path, tmp_path, ranks=ranks, micro_batch=6)

    assert data["lengths"] is not None
    assert verify_certificate(data) == 12 * 8
    assert data["consumed"] > data["n_rows"], "the run must go over an epoch's border"


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), pytest.param(2, 0, marks=distributed)])
def test_translation_in_batches_by_tokens_resumes_bit_for_bit(ranks, workers, tiny_translation, tmp_path):
    trainer = {"max_steps": 24, "val_check_interval": 8, "devices": ranks, "accumulate_grad_batches": 2}
    trainer["strategy"] = "ddp" if ranks > 1 else "auto"
    path = tiny_translation(data={"num_workers": workers}, trainer=trainer)
    config = yaml.safe_load(path.read_text())
    config["checkpoints"] = {"every_n_steps": 4, "monitor": "val/score", "mode": "max"}
    path.write_text(yaml.safe_dump(config))
    assert run(["prepare", "--config", str(path)]) == [0]

    data = resumed_equals_uninterrupted(path, tmp_path, ranks=ranks, micro_batch=27, also=("val/bleu", "val/chrf"))

    assert verify_certificate(data) == 48
    assert data["consumed"] > order_from(data).epoch_length, "the run must go over an epoch's border"


def as_encoder(config: dict, task: str) -> None:
    """Make the tiny decoder's config one of an encoder with another task."""
    config["model"]["class_path"] = f"mhe_lightning.tasks.{task}"
    config["model"]["init_args"]["net"]["class_path"] = "mhe_lightning.models.Encoder"


def resumed_equals_uninterrupted(
    path: Path, tmp_path: Path, *, ranks: int, micro_batch: int, also: tuple[str, ...] = ()
) -> dict:
    """Compare a run with one that is killed and goes on; the data module's state at the end."""
    fit = ["fit", "--config", str(path)]
    log = tmp_path / "log"
    kill = ["--trainer.callbacks+=processes.KillAt", f"--trainer.callbacks.micro_batch={micro_batch}"]

    assert run([*fit, "--name", "whole"], ranks=ranks, log=log) == [0] * ranks, log.read_text()
    killed = run([*fit, "--name", "killed", *kill], ranks=ranks, log=log)
    assert all(code != 0 for code in killed), log.read_text()
    assert run([*fit, "--name", "killed", "--ckpt_path", "auto"], ranks=ranks, log=log) == [0] * ranks, log.read_text()

    runs = tmp_path / "runs"
    for column in ("train/loss", "val/loss", "tokens_seen", "lr", *also):
        assert logged(runs / "whole", column)
        assert logged(runs / "killed", column) == logged(runs / "whole", column)
    checkpoint = read_checkpoint(newest_checkpoint(runs / "whole" / "checkpoints"))
    return next(state for state in checkpoint.values() if isinstance(state, dict) and "consumed" in state)
