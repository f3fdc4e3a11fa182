"""How a model is laid out for training: compilation and activation checkpointing, block by block."""

from __future__ import annotations

from torch import nn


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
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"compile: {type(net).__name__} has no `blocks`, the ModuleList of layers to compile")
        for block in blocks:
            block.compile()
    if activation_checkpointing:
        if not hasattr(net, "checkpoint_activations"):
            raise ValueError(f"activation_checkpointing: {type(net).__name__} has no `checkpoint_activations` switch")
        net.checkpoint_activations = True  # type: ignore[assignment]
