"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhe_lightning.checkpoint import (
    SUFFIX,
    checkpoints_in,
    damage,
    remove_checkpoint,
    remove_unfinished,
    set_aside,
    step_of,
)
from mhe_lightning.distributed import new_control_group
from mhe_lightning.signals import END_SIGNALS
from mhe_lightning.strategies import Sharded


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step=….ckpt`` to resume from and ``best-step=….ckpt`` to use.

    At SIGTERM or SIGUSR1, to any rank, the step is finished and saved, and `SIGTERMException` ends training on all
    ranks.

    At most ``keep`` + 1 checkpoints are left (and one more while writing). What a signal left between two regular ones
    goes before these, so that a run that was interrupted ends with the files of one that was not.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step is always saved.
        keep: how many of the newest to keep.
        monitor: the metric that decides which checkpoint is the best; null keeps no best one.
        mode: whether its lowest ("min") or highest ("max") value is the best.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        keep: int = 2,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps ({every_n_steps}) must be at least 1")
        if keep < 1:
            raise ValueError(f"keep ({keep}) must be at least 1: a run that keeps none cannot be resumed")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.best: float | None = None
        self._step_before = 0
        self._saved_step = 0
        self._due = False
        self._ending = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # nothing new to save yet
        interval = trainer.val_check_batch
        if isinstance(interval, int) and interval % trainer.accumulate_grad_batches:
            raise ValueError(
                f"trainer.val_check_interval ({interval}) counts micro-batches and must be a multiple of "
                f"trainer.accumulate_grad_batches ({trainer.accumulate_grad_batches}): a checkpoint between two steps "
                "would lose the gradients gathered so far"
            )
        self._leave_later_behind(trainer)
        self._group = new_control_group()
        END_SIGNALS.defer()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self._step_before  # never in the middle of an accumulation
        self._ending = stepped and END_SIGNALS.agreed(self._group)
        self._due = stepped and (self._ending or trainer.global_step % self.every_n_steps == 0)
        # a validation belongs to its step: a run that goes on from this checkpoint does not repeat it
        if self._due and not _validation_follows(trainer):
            self._save_newest(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step:
            self._save_newest(trainer)
        self._finish_saving(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._save_best(trainer)
        if self._due:
            self._save_newest(trainer)

    def _leave_later_behind(self, trainer: Trainer) -> None:
        """Where a run goes on from an earlier checkpoint, set those aside of the course that it leaves: `auto` would
        return to them, and pruning would take them for the newest. What is damaged serves nobody and is removed."""
        folder = self._folder(trainer)
        later = [p for kind in ("step", "best-step", "averaged-step") for p in checkpoints_in(folder, kind)]
        if trainer.is_global_zero:
            for path in later:
                if step_of(path) > trainer.global_step:
                    remove_checkpoint(path) if damage(path) else set_aside(path)
            remove_unfinished(folder)
        trainer.strategy.barrier()
        if not checkpoints_in(folder, "best-step"):
            self.best = None

    def _save_best(self, trainer: Trainer) -> None:
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        if self.monitor is not None and value is None:
            found = ", ".join(sorted(key for key in trainer.callback_metrics if "/" in key))
            rank_zero_warn(
                f"checkpoints.monitor ({self.monitor}) is not among the metrics {found}, so no best checkpoint is "
                "kept; set it to one of them, and checkpoints.mode with it"
            )
        if value is None or math.isnan(float(value)) or not self._is_best(float(value)):
            return
        self.best = float(value)
        path = self._folder(trainer) / f"best-step={trainer.global_step:08d}{SUFFIX}"
        trainer.save_checkpoint(path, weights_only=False)
        self._prune(trainer)

    def _is_best(self, value: float) -> bool:
        if self.best is None:
            return True
        return value < self.best if self.mode == "min" else value > self.best

    def _save_newest(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._folder(trainer) / f"step={trainer.global_step:08d}{SUFFIX}", weights_only=False)
        self._saved_step = trainer.global_step
        self._due = False
        self._prune(trainer)
        if self._ending:
            self._finish_saving(trainer)
            raise SIGTERMException

    def _finish_saving(self, trainer: Trainer) -> None:
        if isinstance(trainer.strategy, Sharded):
            trainer.strategy.finish_saving()
            self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        """Remove what is too old, of the complete ones: one that is still being written counts for nothing yet."""
        if not trainer.is_global_zero:
            return
        folder = self._folder(trainer)
        earlier = checkpoints_in(folder)[:-1]
        earlier.sort(key=lambda path: (step_of(path) % self.every_n_steps == 0, step_of(path)))
        for path in [*earlier[: max(0, len(earlier) + 1 - self.keep)], *checkpoints_in(folder, "best-step")[:-1]]:
            remove_checkpoint(path)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"


def _validation_follows(trainer: Trainer) -> bool:
    """Whether the batch that has just ended is followed by a validation."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
