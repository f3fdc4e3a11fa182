"""What memory did before it ran out."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mhe_lightning.callbacks.failures import is_out_of_memory
from mhe_lightning.callbacks.logs import LOGS
from mhe_lightning.callbacks.run_record import peak_memory_bytes
from mhe_lightning.files import write_text

HISTORY_ENTRIES = 100_000
"""Allocations that torch's snapshot goes back, its own default's order."""


class MemoryTimeline(Callback):
    """Writes ``logs/rank-0000.memory.csv`` when a process runs out of memory: what it used in the micro-batches before.

    Bytes: on a GPU what tensors occupy there, else what is resident of the process. Where the host kills the process
    for the memory it takes, nothing can be written.

    Args:
        micro_batches: how many of the last ones are kept; 0 keeps none.
        snapshot: record each allocation on the GPU, and write ``logs/rank-0000.memory.pickle`` beside it, to look at
            on pytorch.org/memory_viz. This slows training down.

    Raises:
        ValueError: the number is negative.
    """

    def __init__(self, micro_batches: int = 1000, snapshot: bool = False) -> None:
        if micro_batches < 0:
            raise ValueError(f"micro_batches ({micro_batches}) must not be negative; 0 keeps none")
        self.micro_batches = micro_batches
        self.snapshot = snapshot
        self._rows: deque[list[Any]] = deque(maxlen=micro_batches)
        self._row: list[Any] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._used = _used_on(pl_module.device)
        if self.snapshot and pl_module.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.micro_batches:
            self._row = [trainer.global_step + 1, batch_idx, round(time.time(), 3), self._used()]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if self.micro_batches:
            self._row.append(self._used())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.micro_batches:
            self._rows.append([*self._row, self._used()])
            self._row = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_out_of_memory(exception):
            return
        folder = Path(trainer.default_root_dir) / LOGS
        name = f"rank-{trainer.global_rank:04d}.memory"
        if self.micro_batches:
            rows = [
                ",".join(map(str, row)) for row in [*self._rows, (*self._row, *[""] * (len(COLUMNS) - len(self._row)))]
            ]
            write_text(folder / f"{name}.csv", "\n".join([",".join(COLUMNS), *rows]) + "\n")
            print(f"memory by micro-batch: {folder / name}.csv; peak {peak_memory_bytes():,} bytes", file=sys.stderr)
        if self.snapshot and pl_module.device.type == "cuda":
            folder.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}.pickle"))
            print(f"memory by allocation: {folder / name}.pickle, for pytorch.org/memory_viz", file=sys.stderr)


COLUMNS = ("step", "micro_batch", "time", "bytes_before", "bytes_after_forward", "bytes_after")


def _used_on(device: torch.device) -> Any:
    """A function that gives the bytes in use, without waiting for the device."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    return _resident


def _resident() -> int | str:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux
        return ""
