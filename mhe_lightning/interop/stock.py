"""A trained model as one of the classes that other libraries have in stock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.attention.folding import GroupedQuery

ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
"""Our name of an activation → that of transformers."""


class NoStockClassError(ValueError):
    """No class of the library computes what a model does; the message says why."""


@dataclass(frozen=True)
class StockModel:
    """A model in the layout of a class of Hugging Face transformers.

    Args:
        architecture: the class, such as ``GPT2LMHeadModel``.
        auto_class: the ``Auto*`` class that loads it.
        pipeline: what it is for, in the Hub's words.
        config: of ``config.json``, without what every model has.
        tensors: name → weights, contiguous; tied ones once.
        generation: of ``generation_config.json``; none for a model that generates nothing.
        notes: what its user must know, a sentence each.
    """

    architecture: str
    auto_class: str
    pipeline: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    generation: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())


class Layout:
    """Collects the tensors of a stock model.

    Args:
        like: a weight of the model, whose dtype all tensors get. Folding is computed in float64 and rounded once.
    """

    def __init__(self, like: Tensor) -> None:
        self.dtype = like.dtype
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Add a tensor."""
        assert name not in self.tensors, name
        self.tensors[name] = tensor.detach().to("cpu", self.dtype).clone(memory_format=torch.contiguous_format)

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Add a projection, (out, in); without a bias it gets zeros."""
        self.put(f"{name}.weight", weight)
        self.put(f"{name}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias)

    def norm(self, name: str, norm: nn.LayerNorm) -> None:
        """Add a layer norm; without a bias it gets zeros."""
        assert norm.weight is not None
        self.put(f"{name}.weight", norm.weight)
        self.put(f"{name}.bias", norm.weight.new_zeros(norm.weight.shape) if norm.bias is None else norm.bias)


def folded(attention: Attention) -> GroupedQuery:
    """The weights of a grouped-query attention that computes what ``attention`` does.

    Raises:
        NoStockClassError: there is none.
    """
    try:
        return attention.folded()
    except NotImplementedError as error:
        raise NoStockClassError(f"no stock class computes {type(attention).__name__}: {error}") from error


def stacked(attention: GroupedQuery, which: str) -> tuple[Tensor, Tensor]:
    """Some of queries, keys and values ("qkv") as one projection, in this order: weight (out, D) and bias (out,)."""
    weights = [getattr(attention, f"w_{one}").flatten(0, 1) for one in which]
    return torch.cat(weights), torch.cat([getattr(attention, f"b_{one}").flatten() for one in which])
