"""A step whose loss is not a number, or far too high, ends the run or is left out, and is named by its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from conftest import logged, prepare
from mhe_lightning.callbacks import LossGuard
from mhe_lightning.callbacks.loss_guard import _Step
from mhe_lightning.checkpoint import checkpoints_in, newest_checkpoint, read_checkpoint
from mhe_lightning.data.sampler import order_from
from mhe_lightning.errors import RunError
from processes import run

distributed = pytest.mark.distributed


@pytest.fixture
def fit(tiny_config, capfd):
    """Runs `fit` on a prepared corpus; gives the exit codes and what was printed."""

    def run_fit(*options: str, name: str = "tiny", ranks: int = 1, **trainer) -> tuple[list[int], str]:
        strategy = "ddp" if ranks > 1 else "auto"
        path = tiny_config(trainer={"max_steps": 12, "devices": ranks, "strategy": strategy, **trainer})
        prepare(yaml.safe_load(path.read_text()))
        capfd.readouterr()
        codes = run(["fit", "--config", str(path), "--name", name, *options], ranks=ranks)
        return codes, "".join(capfd.readouterr())

    return run_fit


def poison(*micro_batches: int, **settings) -> list[str]:
    options = ["--trainer.callbacks+=poison.PoisonAt", f"--trainer.callbacks.micro_batches={list(micro_batches)}"]
    return [*options, *(f"--trainer.callbacks.{name}={value}" for name, value in settings.items())]


def rows_of(run_folder: Path, step: int, batch_size: int = 8) -> list[int]:
    """The rows of a step by the order that the run's seed defines."""
    checkpoint = read_checkpoint(newest_checkpoint(run_folder / "checkpoints"))
    state = next(state for state in checkpoint.values() if isinstance(state, dict) and "consumed" in state)
    return order_from(state).share((step - 1) * batch_size, batch_size, 0, 1)[0].tolist()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=distributed)])
def test_a_loss_that_is_not_a_number_stops_all_ranks_and_names_the_rows_of_each(ranks, fit, tmp_path):
    codes, log = fit(*poison(6, rank=ranks - 1), ranks=ranks)

    assert codes == [1] * ranks, log
    folder = tmp_path / "runs/tiny"
    rows = rows_of(folder, 7)
    share = len(rows) // ranks
    by_rank = {str(rank): rows[rank * share : (rank + 1) * share] for rank in range(ranks)}
    assert log.count(f"error: step 7: the loss is nan; rows by rank: {json.dumps(by_rank)}") == ranks
    assert "Traceback" not in log
    assert newest_checkpoint(folder / "checkpoints").name == "step=00000006.ckpt"


def test_a_gradient_that_is_not_a_number_stops_the_run(fit, tmp_path):
    codes, log = fit(*poison(5, gradients="true"))

    assert codes == [1], log
    assert "error: step 6: the norm of the gradient is nan, at a loss of " in log
    assert newest_checkpoint(tmp_path / "runs/tiny/checkpoints").name == "step=00000004.ckpt"


def test_weights_that_are_not_finite_are_never_saved(fit, tmp_path):
    codes, log = fit(*poison(5, gradients="true"), gradient_clip_val=None)  # nobody sees the gradient

    assert codes == [1], log
    assert "error: weights are NaN or infinite after step 6, so no checkpoint of it is written" in log
    for path in checkpoints_in(tmp_path / "runs/tiny/checkpoints"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["state_dict"].values())
    assert newest_checkpoint(tmp_path / "runs/tiny/checkpoints").name == "step=00000004.ckpt"


def test_a_spike_stops_the_run(fit):
    codes, log = fit(*poison(9, factor=3.0), "--guard.spike", "5", "--guard.window", "4")

    assert codes == [1], log
    assert "error: step 10: the loss is " in log
    assert "standard deviations above " in log


def test_without_a_spike_option_a_high_loss_is_trained_on(fit):
    codes, log = fit(*poison(9, factor=3.0))

    assert codes == [0], log


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=distributed)])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(ranks, fit, tmp_path):
    every_step = ["--checkpoints.every_n_steps", "1", "--checkpoints.keep", "12", "--guard.on_bad_loss", "skip"]
    codes, log = fit(*every_step, *poison(6, rank=ranks - 1), ranks=ranks)

    assert codes == [0] * ranks, log
    folder = tmp_path / "runs/tiny"
    before, after, later = (read_checkpoint(folder / f"checkpoints/step={step:08d}.ckpt") for step in (6, 7, 8))
    weights = {key: value for key, value in before["state_dict"].items() if key != "tokens_seen"}
    assert all(torch.equal(after["state_dict"][key], value) for key, value in weights.items())
    moments = [before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"]]
    assert all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])
    assert any(not torch.equal(later["state_dict"][key], value) for key, value in weights.items())
    (entry,) = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 7
    assert sorted(row for rows in entry["rows"].values() for row in rows) == sorted(rows_of(folder, 7))


def test_a_run_that_skipped_steps_resumes_bit_for_bit(fit, tmp_path):
    guard = ["--guard.on_bad_loss", "skip", "--guard.spike", "5", "--guard.window", "4", "--checkpoints.every_n_steps"]
    guard += ["4", *poison(2, 9, factor=3.0)]
    kill = ["--trainer.callbacks+=processes.KillAt", "--trainer.callbacks.micro_batch=10"]

    assert fit(*guard, name="whole")[0] == [0]
    assert fit(*guard, *kill, name="killed")[0] != [0]
    codes, log = fit(*guard, "--ckpt_path", "auto", name="killed")

    assert codes == [0], log
    assert "step=00000008.ckpt" in log
    runs = tmp_path / "runs"
    assert logged(runs / "killed", "train/loss") == logged(runs / "whole", "train/loss")
    skipped = [(runs / name / "skipped.jsonl").read_text() for name in ("whole", "killed")]
    assert skipped[0] == skipped[1]
    assert [json.loads(line)["step"] for line in skipped[0].splitlines()] == [10]  # a window of 4 is not full at 3


def test_a_run_that_only_skips_stops(fit):
    codes, log = fit(*poison(*range(12)), "--guard.on_bad_loss", "skip")

    assert codes == [1], log
    assert "error: step 11: the loss is nan, as of 10 steps before it" in log


def test_skipping_without_a_norm_is_refused(fit):
    codes, log = fit("--guard.on_bad_loss", "skip", gradient_clip_val=None)

    assert codes == [2], log
    assert "needs trainer.gradient_clip_val" in log


@pytest.mark.parametrize(
    ("settings", "named"), [({"spike": 0.0}, r"guard.spike \(0.0\)"), ({"window": 1}, r"guard.window \(1\)")]
)
def test_arguments_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        LossGuard(**settings)


def test_steps_between_logged_ones_are_not_looked_at_on_a_device_that_would_be_waited_for(tmp_path, monkeypatch):
    guard, model = LossGuard(), BoringModel()
    model.step_checks = []
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=4, logger=False)
    guard.on_train_start(trainer, model)
    looked_at = []
    monkeypatch.setattr(guard, "_settle", lambda: looked_at.append(trainer.global_step + 1))
    loss = torch.zeros((), device="meta")  # has no value to be read
    for step in range(8):
        monkeypatch.setattr(Trainer, "global_step", step)
        model.step_checks[0](loss, loss)
    assert looked_at == [4, 8]
    assert [step.number for step in guard._unsettled] == list(range(1, 9))


def test_steps_that_were_not_looked_at_are_before_a_checkpoint():
    guard = LossGuard(spike=3.0, window=2)
    guard._unsettled = [_Step(number, torch.tensor(float(number)), None, []) for number in (1, 2)]
    assert guard.state_dict()["losses"] == [1.0, 2.0]
    guard._unsettled = [_Step(3, torch.tensor(float("inf")), None, [torch.tensor([4, 7])])]
    with pytest.raises(RunError, match=r'step 3: the loss is inf; rows by rank: {"0": \[4, 7\]}'):
        guard.state_dict()
