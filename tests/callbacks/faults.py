"""A callback that does to its process what happens to processes."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Literal

import torch
from lightning.pytorch import Callback


class FaultAt(Callback):
    """One rank comes to grief before a micro-batch.

    Args:
        kind: what happens: it sleeps for hours, with or without Python's lock, is killed, or fails.
        rank: whom it happens to.
        micro_batch: in which micro-batch, counted in this process.
        evaluation: whether that is one of a validation, not of the training.
    """

    def __init__(
        self,
        kind: Literal["sleep", "sleep with the lock", "kill", "memory", "bug"],
        rank: int,
        micro_batch: int,
        evaluation: bool = False,
    ) -> None:
        self.kind = kind
        self.rank = rank
        self.micro_batch = micro_batch
        self.evaluation = evaluation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.evaluation and batch_idx == self.micro_batch and trainer.global_rank == self.rank:
            self._happen()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.evaluation and batch_idx == self.micro_batch and trainer.global_rank == self.rank:
            self._happen()

    def _happen(self) -> None:
        if self.kind == "sleep":
            time.sleep(10_000)
        elif self.kind == "sleep with the lock":
            ctypes.PyDLL(None).sleep(10_000)
        elif self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        else:
            raise KeyError("a bug")


class SlowForward(Callback):
    """One rank computes slowly.

    Args:
        rank: which.
        seconds: by which each of its forward passes is longer.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank = rank
        self.seconds = seconds

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_rank == self.rank:
            pl_module.net.blocks[0].register_forward_pre_hook(lambda *_: time.sleep(self.seconds))
