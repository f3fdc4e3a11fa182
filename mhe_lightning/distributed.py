"""How a model is laid out for training, block by block, and the small collectives between its processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def parallelize(net: nn.Module, *, compile: bool = False, activation_checkpointing: bool = False) -> None:
    """Prepare ``net`` in place; calling it again changes nothing more.

    Args:
        net: a model with ``blocks``, its repeated layers, and a ``checkpoint_activations`` switch.
        compile: compile each block in place, so that parameter names stay as they are.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        ValueError: the model does not offer what is asked for.
    """
    if compile:
        blocks = getattr(net, "blocks", None)
        if blocks is None:
            raise ValueError(f"compile: {type(net).__name__} has no `blocks`, the layers to compile")
        for block in blocks:
            block.compile()
    if activation_checkpointing:
        if not hasattr(net, "checkpoint_activations"):
            raise ValueError(f"activation_checkpointing: {type(net).__name__} has no `checkpoint_activations` switch")
        net.checkpoint_activations = True  # type: ignore[assignment]


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def new_control_group() -> dist.ProcessGroup | None:
    """A group of all processes for what they say to each other on the CPU, so that no device is waited for.

    None in one process; a collective call in several.
    """
    if not is_distributed():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def all_reduce_sum(values: Tensor) -> Tensor:
    """``values`` summed over all ranks; as they are in one process."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def gather_rows(rows: dict[int, Any]) -> list[Any]:
    """What all ranks have by row number, each row once, in the order of the numbers; equal on all ranks.

    Negative numbers stand for no row and are left out.
    """
    if is_distributed():
        gathered: list[dict[int, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, rows)
        rows = {number: row for part in gathered for number, row in part.items()}
    return [rows[number] for number in sorted(rows) if number >= 0]
