"""What the callbacks that report on training share."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_logged(trainer: Trainer) -> bool:
    """Whether the optimizer step that has just ended is one of those that are logged."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined] # set by Lightning's logger connector
    return trainer.global_step % every == 0
