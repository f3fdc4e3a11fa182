"""The form that every variant has: grouped-query attention, which other libraries serve."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class GroupedQuery(NamedTuple):
    """Weights of a grouped-query attention, head by head, in float64: n heads of queries over g of keys and values.

    With ``Q_i = x W_Qᵢᵀ + b_Qᵢ``, ``K_j = c W_Kⱼᵀ + b_Kⱼ``, ``V_j`` likewise and j = ⌊ig/n⌋, the output is
    ``Σ_i softmax(Q_i K_jᵀ / √d) V_j W_Oᵢᵀ + b_O``.

    Args:
        w_q: (n, d, D).
        b_q: (n, d).
        w_k: (g, d, D).
        b_k: (g, d).
        w_v: (g, d, D).
        b_v: (g, d).
        w_o: (D, n, d).
        b_o: (D,).
    """

    w_q: Tensor
    b_q: Tensor
    w_k: Tensor
    b_k: Tensor
    w_v: Tensor
    b_v: Tensor
    w_o: Tensor
    b_o: Tensor

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, g."""
        return self.w_k.shape[0]

    def with_kv_heads(self, g: int) -> GroupedQuery:
        """The same attention with each head of keys and values repeated, so that there are ``g``; n makes it MHA."""
        times, rest = divmod(g, self.n_kv_heads)
        if rest or g > self.w_q.shape[0]:
            raise ValueError(
                f"{self.n_kv_heads} heads of keys and values cannot be repeated to {g} under {self.w_q.shape[0]} of "
                "queries; choose a multiple that divides the latter"
            )
        w_k, b_k, w_v, b_v = (t.repeat_interleave(times, 0) for t in (self.w_k, self.b_k, self.w_v, self.b_v))
        return self._replace(w_k=w_k, b_k=b_k, w_v=w_v, b_v=b_v)


def heads_of(projection: nn.Linear, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weight (h, d, D) and bias (h, d; zeros where it has none) of a projection to h heads, in float64."""
    weight = projection.weight.detach().double().unflatten(0, (-1, head_dim))
    return weight, _bias(projection).unflatten(0, (-1, head_dim))


def output_of(projection: nn.Linear, head_dim: int) -> tuple[Tensor, Tensor]:
    """Weight (D, n, d) and bias (D,; zeros where it has none) of an output projection, in float64."""
    return projection.weight.detach().double().unflatten(1, (-1, head_dim)), _bias(projection)


def _bias(projection: nn.Linear) -> Tensor:
    if projection.bias is None:
        return torch.zeros(projection.out_features, dtype=torch.float64, device=projection.weight.device)
    return projection.bias.detach().double()
