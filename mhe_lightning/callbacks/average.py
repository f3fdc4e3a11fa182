"""The average of the last checkpoints, at the end of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mhe_lightning.averaging import last_checkpoints, write_average


class AverageCheckpoints(Callback):
    """Writes ``checkpoints/averaged-step=….ckpt`` when training has ended: weights alone, to use.

    It reads checkpoint files only, so that a run that was killed and resumed gives the same bits.

    Source: Vaswani et al. 2017, section 6.1 (the last 5 checkpoints).

    Args:
        last: how many of the newest checkpoints to average; 0 averages none.
        keep: how many checkpoints the run keeps; linked to ``checkpoints.keep``.

    Raises:
        ValueError: ``last`` is negative, or more than the run keeps.
    """

    def __init__(self, last: int = 0, *, keep: int) -> None:
        if last < 0:
            raise ValueError(f"averaging.last ({last}) must not be negative; 0 averages none")
        if last > keep:
            raise ValueError(
                f"averaging.last ({last}) must be at most checkpoints.keep ({keep}), or the first of them are gone at "
                f"the end; set --checkpoints.keep {last}"
            )
        self.last = last
        self.path: Path | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.last == 0:
            return
        try:
            if trainer.is_global_zero:
                self._write(trainer)
        finally:  # the other ranks wait also where this one fails
            trainer.strategy.barrier()

    def _write(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir) / "checkpoints"
        paths = last_checkpoints(folder, self.last)
        if len(paths) < self.last:
            rank_zero_info(f"averaging.last ({self.last}): of {len(paths)} checkpoints, for the run has no more")
        if paths:
            self.path = write_average(folder, paths)
