"""Losses that are not numbers, or far above those before: the run stops, or leaves the step out."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mhe_lightning.distributed import is_distributed
from mhe_lightning.errors import RunError
from mhe_lightning.files import write_text

SKIPPED = "skipped.jsonl"

MOST_IN_A_ROW = 10
"""A run that would skip more steps than these one after another stops: it learns nothing."""


class LossGuard(Callback):
    """Watches each step's loss and gradient norm, which are equal on all ranks, before the optimizer takes the step.

    A step is bad if its loss or norm is NaN or infinite or, with ``spike``, its loss is far above those before. The
    rows of a bad step are named. A checkpoint with weights that are not finite is never written, so the newest one is
    from before.

    "stop" ends the run. On a GPU it looks when a step is logged and before a checkpoint, so that the steps between do
    not wait for the device. "skip" leaves the weights and the optimizer's state as they are, counts the step, and adds
    its rows to ``skipped.jsonl``; on a GPU every step waits for the device. More than 10 bad steps in a row stop it.

    Args:
        on_bad_loss: "stop" or "skip".
        spike: a loss this many standard deviations above the mean of the last ``window`` good ones is bad; null checks
            for NaN and infinity only.
        window: losses that a spike is measured by; until there are so many, none is a spike.

    Raises:
        ValueError: an argument is out of range; or, when training begins, "skip" without clipping by the norm.
    """

    def __init__(
        self, on_bad_loss: Literal["stop", "skip"] = "stop", spike: float | None = None, window: int = 100
    ) -> None:
        if spike is not None and spike <= 0:
            raise ValueError(f"guard.spike ({spike}) must be positive, a number of standard deviations; try 6")
        if window < 2:
            raise ValueError(f"guard.window ({window}) must be at least 2, for a standard deviation; try 100")
        self.on_bad_loss = on_bad_loss
        self.spike = spike
        self.window = window
        self._losses: deque[float] = deque(maxlen=window)
        self._in_a_row = 0
        self._rows: list[Tensor] = []
        self._unsettled: list[_Step] = []

    def state_dict(self) -> dict[str, Any]:
        self._settle()  # no checkpoint after a bad step, and none without a loss in its window
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self._in_a_row = state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clips_by_norm = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value"
        if self.on_bad_loss == "skip" and not clips_by_norm:
            raise ValueError(
                "guard.on_bad_loss (skip) needs trainer.gradient_clip_val, with the algorithm 'norm': the gradient's "
                "norm says whether a step with a finite loss would spoil the weights; try 1.0"
            )
        self._trainer, self._module = trainer, pl_module
        self._path = Path(trainer.default_root_dir) / SKIPPED
        self._rows, self._unsettled = [], []
        self._forget_later(trainer)
        cast(Any, pl_module).step_checks.append(self._check)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, dict) and "rows" in batch:
            self._rows.append(batch["rows"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not _all_finite(pl_module):
            raise RunError(
                f"weights are NaN or infinite after step {trainer.global_step}, so no checkpoint of it is written; "
                f"{_REMEDY}, and set --trainer.gradient_clip_val 1.0"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()
        cast(Any, pl_module).step_checks.remove(self._check)

    def _check(self, loss: Tensor, norm: Tensor | None) -> None:
        """Takes the losses as they come, and looks at them when that costs nothing, or must be."""
        step = self._trainer.global_step + 1
        self._unsettled.append(_Step(step, loss, norm, self._rows))
        self._rows = []
        logged = step % self._trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self.on_bad_loss == "skip" or loss.device.type == "cpu" or logged:
            self._settle()

    def _settle(self) -> None:
        """Judge the steps whose losses were not yet looked at, in one transfer."""
        steps, self._unsettled = self._unsettled, []
        if not steps:
            return
        pairs = [
            torch.stack([step.loss, step.loss if step.norm is None else step.norm.to(step.loss)]) for step in steps
        ]
        for step, (loss, norm) in zip(steps, torch.stack(pairs).tolist(), strict=True):
            what = self._what_is_wrong(loss, norm)
            if what is None:
                self._losses.append(loss)
                self._in_a_row = 0
            else:
                self._react(step, loss, norm, what)

    def _what_is_wrong(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}, at a loss of {loss:.4f}"
        if self.spike is None or len(self._losses) < self.window:
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
        if loss <= mean + self.spike * deviation:
            return None
        above = (loss - mean) / deviation if deviation else math.inf
        return (
            f"the loss is {loss:.4f}, {above:.1f} standard deviations above {mean:.4f}, the mean of {self.window} steps"
        )

    def _react(self, step: _Step, loss: float, norm: float, what: str) -> None:
        rows = _of_all_ranks([int(row) for rows in step.rows for row in rows])
        self._in_a_row += 1
        if self.on_bad_loss == "stop" or self._in_a_row > MOST_IN_A_ROW:
            in_a_row = f", as of {MOST_IN_A_ROW} steps before it" if self.on_bad_loss == "skip" else ""
            raise RunError(f"step {step.number}: {what}{in_a_row}; rows by rank: {json.dumps(rows)}; {_REMEDY}")
        for parameter in self._module.parameters():
            parameter.grad = None  # the optimizer passes by what has none: no moment, no decay, no count
        if self._trainer.is_global_zero:
            print(f"step {step.number} is skipped: {what}", flush=True)
            entry = {"step": step.number, "why": what, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
            self._write([*self._skipped(), entry])

    def _forget_later(self, trainer: Trainer) -> None:
        """A run that goes on from a checkpoint comes by the later steps again."""
        if trainer.is_global_zero and self._path.is_file():
            self._write([entry for entry in self._skipped() if entry["step"] <= trainer.global_step])

    def _skipped(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def _write(self, entries: list[dict[str, Any]]) -> None:
        write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in entries))


_REMEDY = (
    "the newest checkpoint is from before: go on with --ckpt_path auto and --guard.on_bad_loss skip, which leaves such "
    "steps out, or with a lower --model.lr"
)


class _Step(NamedTuple):
    number: int
    loss: Tensor
    norm: Tensor | None
    rows: list[Tensor]


def _of_all_ranks(rows: list[int]) -> dict[str, list[int]]:
    """Every rank's rows; a collective call where there are several."""
    if not is_distributed():
        return {"0": rows}
    gathered: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    return {str(rank): part for rank, part in enumerate(gathered)}


def _all_finite(module: LightningModule) -> bool:
    """Whether all weights are finite, on all ranks; a collective call where there are several."""
    parts = (getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in module.parameters())
    finite = [part.detach().isfinite().all() for part in parts if part.numel()]
    bad = torch.tensor(0, device=module.device) if not finite else (~torch.stack(finite)).sum().to(module.device)
    if is_distributed():
        dist.all_reduce(bad)
    return int(bad) == 0
