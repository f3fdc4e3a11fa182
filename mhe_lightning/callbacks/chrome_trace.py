"""Where the time of chosen steps goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.profiler import ProfilerActivity, profile

from mhe_lightning.files import write_text

PROFILE = "profile"
TOP = 15


class Profile(Callback):
    """Records some optimizer steps with torch.profiler: ``profile/rank-0000.trace.json.gz`` for each process.

    Open it in chrome://tracing or ui.perfetto.dev. The operators that took most time are printed, and those of each
    process are in ``profile/rank-0000.txt``. Steps that are recorded take longer than others.

    Args:
        first_step: the first of them, counted from 1; null records none. The first steps of all are not like others.
        n_steps: how many.
        stacks: record the lines of Python, too.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, first_step: int | None = None, n_steps: int = 3, stacks: bool = False) -> None:
        if first_step is not None and first_step < 1:
            raise ValueError(f"first_step ({first_step}) must be at least 1; null records none")
        if n_steps < 1:
            raise ValueError(f"n_steps ({n_steps}) must be at least 1")
        self.first_step = first_step
        self.n_steps = n_steps
        self.stacks = stacks
        self._profile: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.first_step is not None and trainer.global_step >= self.first_step:
            rank_zero_warn(
                f"profile.first_step ({self.first_step}) lies before step {trainer.global_step + 1}, with which this "
                "training goes on, so nothing is recorded"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._profile is None and trainer.global_step + 1 == self.first_step:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, with_stack=self.stacks)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.first_step is not None and trainer.global_step + 1 >= self.first_step + self.n_steps:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        on_gpu = pl_module.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(pl_module.device)
        recorded.stop()
        folder = Path(trainer.default_root_dir) / PROFILE
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{trainer.global_rank:04d}"
        path = folder / f"{name}.trace.json.gz"
        unfinished = folder / f".{os.getpid()}.{path.name}"
        recorded.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
        order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=50)
        write_text(folder / f"{name}.txt", table)
        if trainer.is_global_zero:
            print(f"{table}\ntrace: {path}", flush=True)
