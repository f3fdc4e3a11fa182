"""Attention whose values are its keys."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.base import Attention
from mhe_lightning.attention.folding import GroupedQuery, heads_of, output_of
from mhe_lightning.attention.products import Linear
from mhe_lightning.attention.tensor_parallel import split_columns


class SKV(Attention):
    """Shared key-value attention: ``V_i = K_i = c W_KV^i``.

    2n²d² parameters besides ``W_O``, and nd numbers per token in a KV cache. The bias of ``W_KV`` cancels in the
    softmax as a key's bias and acts as a value's bias.

    Source: Kitaev et al. 2020, *Reformer* (shared projections), arXiv 2001.04451; compared in arXiv 2310.07911.

    Args:
        width: model width D.
        n_heads: heads n; must divide ``width``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        self.w_q = Linear(width, width, bias=bias)
        self.w_kv = Linear(width, width, bias=bias)

    def _split_projections(self, mesh: DeviceMesh) -> None:
        split_columns(self.w_q, mesh)
        split_columns(self.w_kv, mesh)

    def query(self, x: Tensor) -> Tensor:
        return self._split_heads(self.w_q(x))  # (B, n, T, d)

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        return (self._split_heads(self.w_kv(context)),)  # (B, n, S, d), both K and V

    def folded(self) -> GroupedQuery:
        q, kv = heads_of(self.w_q, self.head_dim), heads_of(self.w_kv, self.head_dim)
        return GroupedQuery(*q, *kv, *kv, *output_of(self.w_o, self.head_dim))
