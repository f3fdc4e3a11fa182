"""What a net holds: its parameters by part, and what a KV cache of it stores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from mhe_lightning.attention import Attention
from mhe_lightning.models.layers import FeedForward

PARTS = ("embeddings", "attention_qkv", "attention_output", "feed_forward", "norms", "head", "other")


class Count(NamedTuple):
    """Parameters of a part."""

    weights: int
    biases: int

    @property
    def total(self) -> int:
        return self.weights + self.biases


def count_parameters(net: nn.Module) -> dict[str, Count]:
    """Parameters of each part of ``net``, weights and biases apart, each counted once.

    A tied output projection counts as embedding, head embeddings as weights.

    Returns:
        ``embeddings``, ``attention_qkv``, ``attention_output``, ``feed_forward``, ``norms``, ``head`` (what maps
        hidden states to predictions), ``other``.
    """
    counts = {part: [0, 0] for part in PARTS}
    counted: set[int] = set()

    def count(part: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if id(parameter) not in counted:
                counted.add(id(parameter))
                counts[part][name.rpartition(".")[2] == "bias"] += parameter.numel()

    for module in net.modules():
        if isinstance(module, nn.Embedding):
            count("embeddings", module)  # before a head that is tied to one
    for name, module in net.named_modules():
        if name.rpartition(".")[2] == "head":
            count("head", module)
    for module in net.modules():
        if isinstance(module, Attention):
            count("attention_output", module.w_o)
            count("attention_qkv", module)
        elif isinstance(module, FeedForward):
            count("feed_forward", module)
        elif isinstance(module, nn.LayerNorm):
            count("norms", module)
    count("other", net)
    return {part: Count(*both) for part, both in counts.items()}


def parameters_by_part(net: nn.Module) -> dict[str, int]:
    """Weights and biases of each part together, their ``total``, and the total ``without_embeddings``."""
    counts = {part: count.total for part, count in count_parameters(net).items()}
    total = sum(counts.values())
    return {**counts, "total": total, "without_embeddings": total - counts["embeddings"]}


def attention_weights(net: nn.Module) -> int:
    """Parameters of all attention sublayers with their output projections, biases left out."""
    counts = count_parameters(net)
    return counts["attention_qkv"].weights + counts["attention_output"].weights


class CacheSize(NamedTuple):
    """Numbers that the KV caches of all layers store for one sequence."""

    per_token: int
    """For each token that is generated or continued from."""

    per_source_token: int
    """For each token of the source, in an encoder–decoder; else 0."""


def cache_size(net: nn.Module) -> CacheSize | None:
    """What decoding with ``net`` caches; None for a net that does not decode."""
    if not hasattr(net, "new_caches"):
        return None
    blocks = list(getattr(net, "decoder_blocks", None) or net.blocks)  # type: ignore[arg-type]
    across = [block.cross_attention for block in blocks if hasattr(block, "cross_attention")]
    return CacheSize(sum(_stored(block.attention) for block in blocks), sum(map(_stored, across)))


@torch.no_grad()
def _stored(attention: Attention) -> int:
    weight = attention.w_o.weight
    one = torch.zeros(1, 1, attention.width, dtype=weight.dtype, device=weight.device)
    return sum(stored.numel() for stored in attention.key_value(one))
