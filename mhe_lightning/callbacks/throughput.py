"""Tokens per second, without padding and without the time spent on evaluation and checkpoints."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mhe_lightning.callbacks.steps import is_logged


class Throughput(Callback):
    """Logs ``tokens_per_second``: targets trained on over all ranks, between two logged steps.

    Its state adds up training time over resumes, so that `results.json` can state both.
    """

    def __init__(self) -> None:
        self.training_seconds = 0.0
        self._begun: float | None = None
        self._since_log = 0.0
        self._tokens_at_log = 0
        self._step_before = 0

    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_seconds = state_dict["training_seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tokens_at_log = int(pl_module.tokens_seen)  # type: ignore[arg-type]
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self._step_before
        if not stepped or not is_logged(trainer):
            return  # in the steps between nothing here waits for a device
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._pause()
        tokens = int(pl_module.tokens_seen)  # type: ignore[arg-type]
        if self._since_log > 0:
            pl_module.log("tokens_per_second", (tokens - self._tokens_at_log) / self._since_log)
        self._tokens_at_log, self._since_log = tokens, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step
        if self._begun is None:
            self._begun = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause()

    def _pause(self) -> None:
        """Stop the clock; the next batch starts it again."""
        if self._begun is not None:
            seconds = time.perf_counter() - self._begun
            self.training_seconds += seconds
            self._since_log += seconds
            self._begun = None
