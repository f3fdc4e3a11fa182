"""What a model costs."""

from __future__ import annotations

from torch import nn

from mhe_lightning.attention import Attention
from mhe_lightning.models.layers import FeedForward

PARTS = ("embeddings", "attention_qkv", "attention_output", "feed_forward", "norms", "head", "other")


def parameters_by_part(net: nn.Module) -> dict[str, int]:
    """Parameters of each part of ``net``, each counted once (a tied output projection counts as embedding).

    Returns:
        ``embeddings``, ``attention_qkv``, ``attention_output``, ``feed_forward``, ``norms``, ``head`` (what maps
        hidden states to predictions), ``other``, their ``total``, and the total ``without_embeddings``.
    """
    counts = dict.fromkeys(PARTS, 0)
    counted: set[int] = set()

    def count(part: str, module: nn.Module) -> None:
        for parameter in module.parameters():
            if id(parameter) not in counted:
                counted.add(id(parameter))
                counts[part] += parameter.numel()

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
    total = sum(counts.values())
    return {**counts, "total": total, "without_embeddings": total - counts["embeddings"]}
