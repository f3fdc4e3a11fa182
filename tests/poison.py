"""Steps that go wrong where a test says so, also when a resumed run comes by them again."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback


class PoisonAt(Callback):
    """Multiplies the loss of some micro-batches, counted over all resumes from 0, or their gradients alone.

    Args:
        micro_batches: which.
        factor: for their loss.
        gradients: a factor for the gradient of the first parameter instead.
        rank: the rank that it happens on.
    """

    def __init__(
        self, micro_batches: Sequence[int], factor: float = float("nan"), gradients: bool = False, rank: int = 0
    ) -> None:
        self.micro_batches = micro_batches
        self.factor = factor
        self.gradients = gradients
        self.rank = rank

    def on_train_start(self, trainer, pl_module) -> None:
        accumulate = pl_module.accumulate

        def poisoned(loss, *args):
            return accumulate(loss if self.gradients or not self._hits(trainer) else loss * self.factor, *args)

        pl_module.accumulate = poisoned

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.gradients and self._hits(trainer):
            next(pl_module.parameters()).grad.mul_(self.factor)

    def _hits(self, trainer) -> bool:
        return trainer.global_rank == self.rank and trainer.datamodule.micro_batches in self.micro_batches
