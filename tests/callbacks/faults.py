"""Callbacks that do to their process what happens to processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Literal

import torch
from lightning.pytorch import Callback


class FaultAt(Callback):
    """One rank comes to grief before a micro-batch.

    Args:
        micro_batch: the micro-batch, counted in this process.
        rank: whom it happens to.
        kind: what happens: it sleeps, it runs out of memory, it is killed, it is stopped, or it holds Python's lock.
    """

    def __init__(self, micro_batch: int, rank: int, kind: Literal["sleep", "memory", "kill", "error"]) -> None:
        self.micro_batch = micro_batch
        self.rank = rank
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.micro_batch and trainer.global_rank == self.rank:
            self._happen()

    def _happen(self) -> None:
        if self.kind == "sleep":
            time.sleep(10_000)
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        elif self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise KeyError("a bug")
