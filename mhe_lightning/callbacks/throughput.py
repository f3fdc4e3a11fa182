"""Tokens per second, without padding and without the time spent on evaluation and checkpoints, and what they use."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mhe_lightning.callbacks.matrix_rate import computing_dtype, matrix_rate
from mhe_lightning.callbacks.steps import is_logged
from mhe_lightning.distributed import all_reduce_sum


class Throughput(Callback):
    """Logs ``tokens_per_second``: tokens read over all ranks, padding left out, between two logged steps; and ``mfu``.

    The model FLOPs utilisation (Chowdhery et al. 2022, *PaLM*, appendix B) is the share of what the devices can do that
    training needs: tokens/s × ``training_flops_per_token`` / the sum over ranks of each one's `matrix_rate`, which is
    measured when training begins. What is recomputed in the backward pass, and padding, is not needed and not counted.

    Its state adds up training time over resumes, so that `results.json` can state all of them.

    Args:
        training_flops_per_token: operations of the matrix products that a step needs per token; None logs no ``mfu``.
    """

    def __init__(self, training_flops_per_token: float | None = None) -> None:
        self.training_flops_per_token = training_flops_per_token
        self.training_seconds = 0.0
        self._rate: float | None = None
        self._begun: float | None = None
        self._since_log = 0.0
        self._tokens_at_log = 0
        self._step_before = 0

    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_seconds = state_dict["training_seconds"]

    def mfu(self, tokens_per_second: float) -> float | None:
        """The utilisation at a speed; None where operations are not known, and before training."""
        if self.training_flops_per_token is None or self._rate is None:
            return None
        return tokens_per_second * self.training_flops_per_token / self._rate

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.training_flops_per_token is not None:
            own = matrix_rate(pl_module.device, computing_dtype(str(trainer.precision)))
            self._rate = float(all_reduce_sum(torch.tensor(own, device=pl_module.device)))
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
            speed = (tokens - self._tokens_at_log) / self._since_log
            pl_module.log("tokens_per_second", speed)
            if (mfu := self.mfu(speed)) is not None:
                pl_module.log("mfu", mfu)
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
