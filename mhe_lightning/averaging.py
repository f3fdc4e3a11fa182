"""The average of a run's last checkpoints: weights to use, without what training needs to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhe_lightning import run
from mhe_lightning.checkpoint import (
    RECORD,
    SUFFIX,
    TOKENIZER_HASH,
    AtomicCheckpointIO,
    checkpoints_in,
    complete_checkpoints,
    config_of,
    read_checkpoint,
    read_record,
    remove_checkpoint,
    step_of,
)
from mhe_lightning.pretrained import WITHOUT_WEIGHTS

AVERAGED = "averaged"
"""Key in a checkpoint's record of the optimizer steps that its weights are the average of."""

KEPT = ("epoch", "global_step", "pytorch-lightning_version")
"""What an average takes over from its newest checkpoint beside the record; no state of training."""


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """The average of checkpoints of one model, as a checkpoint to use but not to resume from.

    Weights are averaged in float64 and keep their dtype and their ties; other entries of the state, such as counters,
    are those of the checkpoint of the highest step. One checkpoint at a time is in memory, beside the sum.

    Source: Vaswani et al. 2017, section 6.1, which averages the last 5 checkpoints of the base models.

    Args:
        paths: the checkpoints, at least one; in the same order they give the same bits.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or of an unknown format.
        ValueError: there are none, or they differ in net, tokenizer, names, shapes or ties; the message names where.
    """
    if not paths:
        raise ValueError("paths (none) must be at least one checkpoint; train one with `fit`")
    average = _Average()
    for path in paths:
        average.add(path)
    return average.checkpoint()


def last_checkpoints(folder: Path, count: int) -> list[Path]:
    """The newest ``count`` complete checkpoints of a run's course, oldest first; all of them if there are fewer.

    What a signal left between two regular checkpoints is not one of them, so that a run that was interrupted gives
    those of one that was not.

    Args:
        folder: the run's ``checkpoints/``.
        count: how many, at least 1.
    """
    complete = complete_checkpoints(folder)
    newest = next(complete, None)
    if newest is None:
        return []
    # what was imported or converted has one checkpoint, and no experiment
    every = config_of(read_record(newest)).get("checkpoints", {}).get("every_n_steps", 1)
    regular = (path for path in complete if step_of(path) % every == 0)
    return [newest, *islice(regular, count - 1)][::-1]


def averaged_path(folder: Path, step: int) -> Path:
    """Where a run keeps the average of its checkpoints up to ``step``."""
    return folder / f"averaged-step={step:08d}{SUFFIX}"


def write_average(folder: Path, paths: Sequence[Path]) -> Path:
    """Write the average of ``paths`` to a run's ``checkpoints/``, in the place of those of earlier steps."""
    checkpoint = average_checkpoints(paths)
    step = checkpoint["global_step"]
    path = averaged_path(folder, step)
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    for other in checkpoints_in(folder, "averaged-step"):
        if step_of(other) < step:
            remove_checkpoint(other)
    return path


class _Average:
    """Sums checkpoints up, one by one, and keeps nothing else of them but what is not averaged of the newest."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sums: dict[str, Tensor] = {}
        self.newest: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.first: Path | None = None
        self.identity: dict[str, Any] = {}
        self.ties: dict[str, str] = {}

    def add(self, path: Path) -> None:
        checkpoint = read_checkpoint(path)
        state: dict[str, Any] = checkpoint["state_dict"]
        weights = {name: value for name, value in state.items() if _is_weight(value)}
        ties = _ties(weights)
        self._compare(path, _identity(checkpoint, ties))
        self.ties = ties
        for name in dict.fromkeys(ties.values()):
            if name in self.sums:
                self.sums[name] += weights[name].to(torch.float64)
            else:
                self.sums[name] = weights[name].to(torch.float64, copy=True)
        step: int = checkpoint["global_step"]
        if step >= max(self.steps, default=step):
            self.newest = {key: checkpoint[key] for key in (*KEPT, RECORD)}
            self.others = {name: value for name, value in state.items() if name not in weights}
            self.dtypes = {name: value.dtype for name, value in weights.items()}
        self.steps.append(step)

    def checkpoint(self) -> dict[str, Any]:
        mean = {name: (total / len(self.steps)).to(self.dtypes[name]) for name, total in self.sums.items()}
        state = {**self.others, **{name: mean[tied] for name, tied in self.ties.items()}}
        return {**self.newest, RECORD: {**self.newest[RECORD], AVERAGED: self.steps}, "state_dict": state}

    def _compare(self, path: Path, identity: dict[str, Any]) -> None:
        if self.first is None:
            self.first, self.identity = path, identity
        found = [
            f"{key.replace('init_args.', '')} is {theirs} there and {ours} here"
            for key, ours, theirs in run.differences(self.identity, identity)
            if not (key.startswith("model.net.") and key.rpartition(".")[2] in WITHOUT_WEIGHTS)
        ]
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise ValueError(
                f"{path} is not of the model of {self.first}, so they have no average: {'; '.join(found[:3])}{more}; "
                "average checkpoints of one run"
            )


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _ties(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each weight → the first name of the same memory, its own if it shares none."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
        for name, value in weights.items()
    }


def _identity(checkpoint: dict[str, Any], ties: dict[str, str]) -> dict[str, Any]:
    """What must be the same of checkpoints that are averaged, for `run.differences`."""
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in checkpoint["state_dict"].items()
    }
    return {
        "model.net": config_of(checkpoint)["model"]["init_args"]["net"],
        "tokenizer": checkpoint[RECORD].get(TOKENIZER_HASH),
        "state_dict": shapes,
        "ties": ties,
    }
