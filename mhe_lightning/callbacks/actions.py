"""What the trainer does at each moment, as it tells its profiler: each hook of each callback, and more."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler

Listener = Callable[[str, bool], None]
"""Called with the name of an action and whether it begins or has ended."""


class Actions(Profiler):
    """Stands before the trainer's own profiler, to which it passes everything on.

    The trainer has no hooks around its wait for data, nor between the callbacks of a hook.

    Args:
        inner: the trainer's own profiler.
    """

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self.listeners: list[Listener] = []

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        for listener in self.listeners:
            listener(action_name, True)

    def stop(self, action_name: str) -> None:
        for listener in self.listeners:
            listener(action_name, False)
        self.inner.stop(action_name)

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)


def actions_of(trainer: Trainer) -> Actions:
    """The trainer's actions, to listen to."""
    # the attribute is set by Lightning's own set-up
    if not isinstance(trainer.profiler, Actions):  # type: ignore[attr-defined]
        trainer.profiler = Actions(trainer.profiler)  # type: ignore[attr-defined]
    actions: Actions = trainer.profiler  # type: ignore[attr-defined]
    return actions
