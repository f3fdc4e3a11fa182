"""A training step never waits for the device that it runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from mhe_lightning.attention import MHE
from mhe_lightning.callbacks import ExactResume, LossGuard, StepTimes, Throughput
from mhe_lightning.data.finetuning import pad_segments
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder, loss
from mhe_lightning.models.loss import IGNORE, linear_cross_entropy
from mhe_lightning.tasks import (
    ExtractiveQuestionAnswering,
    LanguageModeling,
    MaskedLanguageModeling,
    SequenceClassification,
    Translation,
)
from mhe_lightning.tasks.base import Task

VOCABULARY, LENGTH, ROWS, STEPS = 17, 8, 4, 4
SIZES = {"width": 8, "n_heads": 2, "n_layers": 2, "max_length": LENGTH, "dropout": 0.1}
aten = torch.ops.aten
COUNTED = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten.repeat_interleave,
    aten._unique2,
)
"""Operators whose results, or their shapes, the host reads from the device."""
READ = (Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


class Operators(TorchDispatchMode):
    """Refuses operators that wait, also those within others and in the backward pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func.overloadpacket in COUNTED
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            waits = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if waits:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Refuses what brings numbers to the host, or from there without being asked not to wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READ or (func is torch.tensor and kwargs.get("device") is not None):
            raise AssertionError(f"{getattr(func, '__qualname__', func)} waits for the device")
        return func(*args, **kwargs)


class NoWaits(Callback):
    """Ends the training with an error if a step but the first, which allocates, waits; on a GPU torch says so."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._modes: list[Any] = []
        if batch_idx == 0:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            return
        self._modes = [Operators(), Calls()]
        for mode in self._modes:
            mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        while self._modes:
            self._modes.pop().__exit__(None, None, None)
        self.steps += 1

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_batch_end(trainer, pl_module, None, None, 0)


def sequences() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in (8, 3, 5, 2)]
    return pad_segments(rows, [2] * ROWS)


def with_ignored_targets() -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[0, 5:] = IGNORE
    return {"tokens": tokens, "targets": targets}


def decoder() -> tuple[Task, dict[str, Any]]:
    return LanguageModeling(Decoder(VOCABULARY, MHE, **SIZES), STEPS), with_ignored_targets()


def masked() -> tuple[Task, dict[str, Any]]:
    batch = with_ignored_targets()
    places = (batch["targets"].flatten() != IGNORE).nonzero().flatten()
    return MaskedLanguageModeling(Encoder(VOCABULARY, MHE, **SIZES), STEPS), {**batch, "masked": places}


def classifier(problem: str, net: type = Encoder, **settings: Any) -> tuple[Task, dict[str, Any]]:
    task = SequenceClassification(
        net(VOCABULARY, MHE, **SIZES), STEPS, problem, 3 if problem == "classes" else 1, 0, ["accuracy"], **settings
    )
    return task, {**sequences(), "labels": torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)}


def choice() -> tuple[Task, dict[str, Any]]:
    task, batch = classifier("choice")
    return task, {**batch, "candidates": torch.tensor([[0, 1, 2], [3, -1, -1]]), "right": torch.arange(ROWS) > 0}


def questions() -> tuple[Task, dict[str, Any]]:
    task = ExtractiveQuestionAnswering(Encoder(VOCABULARY, MHE, **SIZES), STEPS, unanswerable=False)
    return task, {**sequences(), "starts": torch.zeros(ROWS, dtype=torch.long), "ends": torch.ones(ROWS).long()}


def translation() -> tuple[Task, dict[str, Any]]:
    task = Translation(EncoderDecoder(VOCABULARY, MHE, **SIZES), STEPS, tokenizer=object(), end_token=0)  # type: ignore[arg-type]
    batch = with_ignored_targets()
    sources = sequences()
    return task, {**batch, "tokens": sources["tokens"], "padding": sources["padding"], "target_tokens": batch["tokens"]}


CASES = {
    "language modelling": decoder,
    "masked tokens": masked,
    "classes": lambda: classifier("classes"),
    "value, mean": lambda: classifier("value", pooling="mean"),
    "classes, decoder": lambda: classifier("classes", Decoder, pooling="last"),
    "choice": choice,
    "question answering": questions,
    "translation": translation,
}
cases = pytest.mark.parametrize("case", CASES)


def train(case: str, folder: Any, accelerator: str, *callbacks: Callback) -> int:
    """Steps that were taken without waiting."""
    task, batch = CASES[case]()
    batch = {**batch, "rows": torch.arange(ROWS)}
    watch = NoWaits()
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=STEPS,
        logger=False,
        log_every_n_steps=100,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, *callbacks],
    )
    trainer.fit(task, DataLoader([batch] * STEPS, batch_size=None, pin_memory=accelerator == "gpu"))
    return watch.steps


@cases
def test_a_step_reads_nothing_back(case, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "_selects", lambda device: False)  # as on a GPU
    assert train(case, tmp_path, "cpu", Throughput(), StepTimes(), ExactResume(0)) == STEPS


@cases
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch's own check of synchronisation needs one")
def test_a_step_on_a_gpu_does_not_synchronise(case, tmp_path):
    assert train(case, tmp_path, "gpu", Throughput(), StepTimes(), ExactResume(0), LossGuard()) == STEPS


@pytest.mark.parametrize("wait", ["item", "tolist", "nonzero", "mask", "copy"])
def test_what_would_wait_is_noticed(wait, tmp_path, monkeypatch):
    step = LanguageModeling.training_step

    def waiting(self, batch, batch_idx):
        found = step(self, batch, batch_idx)
        {
            "item": found.item,
            "tolist": found.tolist,
            "nonzero": batch["tokens"].nonzero,
            "mask": lambda: batch["tokens"][batch["tokens"] > 0],
            "copy": lambda: torch.tensor(1, device=found.device),
        }[wait]()
        return found

    monkeypatch.setattr(loss, "_selects", lambda device: False)
    monkeypatch.setattr(LanguageModeling, "training_step", waiting)
    with pytest.raises(AssertionError, match="waits for the device"):
        train("language modelling", tmp_path, "cpu")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_loss_that_does_not_count_its_targets_is_the_same(smoothing, with_bias, monkeypatch):
    draw = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((11, 6), (9, 6), (9,)))
    targets = torch.randint(9, (11,), generator=draw)
    targets[[0, 4, 10]] = IGNORE
    found = []
    for selects in (True, False):
        monkeypatch.setattr(loss, "_selects", lambda device, selects=selects: selects)
        inputs = [t.clone().requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))]
        value = linear_cross_entropy(
            inputs[0],
            inputs[1],
            targets,
            bias=inputs[2] if with_bias else None,
            label_smoothing=smoothing,
            chunk_size=4,
        )
        value.backward()
        found.append([value.detach(), *(t.grad for t in inputs)])
    for counted, uncounted in zip(*found, strict=True):
        torch.testing.assert_close(uncounted, counted, rtol=1e-12, atol=1e-12)


def test_what_is_not_predicted_spoils_nothing(monkeypatch):
    monkeypatch.setattr(loss, "_selects", lambda device: False)
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    hidden[1] = torch.nan
    hidden.requires_grad_()
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([2, IGNORE, 0, 5])).backward()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[1].any()
