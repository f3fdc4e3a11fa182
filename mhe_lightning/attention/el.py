"""Attention to the context as it is, without key and value projections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.base import Attention
from mhe_lightning.attention.folding import GroupedQuery, heads_of, output_of
from mhe_lightning.attention.products import Linear
from mhe_lightning.attention.tensor_parallel import split_columns


class ELAttention(Attention):
    """EL-attention as a trained variant: ``Q_i = x W_Q^i`` attends to ``K_i = V_i =`` the i-th d-wide slice of ``c``.

    n²d² parameters besides ``W_O``, and nd numbers per token in a KV cache. This is our reading of the count n²d²
    given in arXiv 2310.07911; it is not the lossless rewrite of MHA's inference in Yan et al. 2021 (arXiv 2105.04779),
    which gave the name.

    Args:
        width: model width D.
        n_heads: heads n; must divide ``width``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        self.w_q = Linear(width, width, bias=bias)

    def _split_projections(self, mesh: DeviceMesh) -> None:
        split_columns(self.w_q, mesh)

    def query(self, x: Tensor) -> Tensor:
        return self._split_heads(self.w_q(x))  # (B, n, T, d)

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        slices = self._split_heads(context)  # (B, n, S, d), both K and V
        return (slices if self.mesh is None else slices.chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()],)

    def folded(self) -> GroupedQuery:
        """Keys and values that are slices of the context are projections by blocks of the identity."""
        w_q, b_q = heads_of(self.w_q, self.head_dim)
        slices = torch.eye(self.width, dtype=torch.float64, device=w_q.device).unflatten(0, (-1, self.head_dim))
        none = torch.zeros_like(b_q)
        return GroupedQuery(w_q, b_q, slices, none, slices, none, *output_of(self.w_o, self.head_dim))
