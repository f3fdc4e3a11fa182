"""Progress as plain lines, for logs and files."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mhe_lightning.callbacks.steps import is_logged


class PlainProgress(Callback):
    """Prints a line per logged step and per evaluation; used where there is no terminal for a progress bar.

    Args:
        min_interval: seconds between two lines of training progress, so that fast runs do not flood a log.
    """

    def __init__(self, min_interval: float = 5.0) -> None:
        self.min_interval = min_interval
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step > 0 and is_logged(trainer) and time.monotonic() - self._last >= self.min_interval
        if not trainer.is_global_zero or not (due or step == trainer.max_steps):
            return
        self._last = time.monotonic()
        metrics = trainer.callback_metrics
        shown = [f"step {step}/{trainer.max_steps}"]
        for key, form in (("train/loss", ".4f"), ("lr", ".2e"), ("tokens_per_second", ",.0f")):
            if key in metrics:
                shown.append(f"{key} {float(metrics[key]):{form}}")
        print("  ".join(shown), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation(trainer, "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation(trainer, "test/")

    def _evaluation(self, trainer: Trainer, prefix: str) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
            shown = [f"{key} {value:.4f}" for key, value in sorted(metrics.items())]
            step = [f"step {trainer.global_step}"] if trainer.global_step else []  # unknown without training
            print("  ".join([*step, *shown]), flush=True)
