"""Multi-head-embedding attention: one shared projection, and one small vector per head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.base import Attention
from mhe_lightning.attention.folding import GroupedQuery, heads_of, output_of
from mhe_lightning.attention.tensor_parallel import own_part, share, split


class MHE(Attention):
    """Attention with head embeddings: n heads from one shared Q, K, V projection.

    With ``q = x W_Q``, ``k = c W_K``, ``v = c W_V`` of width d and embeddings ``e^Q, e^K, e^V`` of shape (n, d):

    * ``add``:      ``Q_i = q + e^Q_i``, ``K_i = k + e^K_i``, ``V_i = v + e^V_i``
    * ``multiply``: ``Q_i = q ⊙ (1 + e^Q_i)``, likewise K and V

    3nd² + 3nd parameters besides ``W_O``: 3nd more than a single head. Keys and values are never made per head:

    * multiply: ``Q_i·K_i = (q ⊙ (1 + e^Q_i) ⊙ (1 + e^K_i))·k`` and ``A_i V_i = (A_i v) ⊙ (1 + e^V_i)``.
    * add: ``(q + e^Q_i)·(k_j + e^K_i)`` has one term with ``e^K``, the same for every key j, so the softmax drops it;
      and ``A_i V_i = A_i v + e^V_i`` since the rows of ``A_i`` sum to one.

    Both are exact, and store 2d numbers per token in a KV cache. In ``add`` the key embedding therefore has an exact
    zero gradient (zero, not None, so that distributed data-parallel training finds a gradient for it) and stays as
    initialised; it is kept because it is one of the paper's parameters. With attention dropout the rows of ``A_i`` no
    longer sum to one: the value embedding is added *outside* the dropout, which is the same in expectation. A query
    that may attend to nothing gets zero from the attention, hence ``e^V_i`` in ``add``.

    Source: Xue & Aletras 2023, *Pit One Against Many*, Findings of EMNLP, arXiv 2310.07911.

    Args:
        width: model width D.
        n_heads: heads n; must divide ``width``.
        combine: how a head embedding meets the shared projection, "add" or "multiply".
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
        embedding_std: standard deviation of the normal distribution that the head embeddings start from.
    """

    def __init__(
        self,
        *,
        width: int,
        n_heads: int,
        combine: Literal["add", "multiply"] = "add",
        dropout: float = 0.0,
        bias: bool = True,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        if combine not in ("add", "multiply"):
            raise ValueError(f"combine ({combine!r}) must be 'add' or 'multiply'")
        if embedding_std < 0:
            raise ValueError(f"embedding_std ({embedding_std}) must not be negative; 0.02 is the default")
        self.combine = combine
        self.w_q = nn.Linear(width, self.head_dim, bias=bias)
        self.w_k = nn.Linear(width, self.head_dim, bias=bias)
        self.w_v = nn.Linear(width, self.head_dim, bias=bias)
        self.e_q = nn.Parameter(torch.randn(n_heads, self.head_dim) * embedding_std)
        self.e_k = nn.Parameter(torch.randn(n_heads, self.head_dim) * embedding_std)
        self.e_v = nn.Parameter(torch.randn(n_heads, self.head_dim) * embedding_std)

    def _split_projections(self, mesh: DeviceMesh) -> None:
        """Each head embedding belongs to a head; the projections stay whole, for the d numbers that each makes of a
        token are all that processes have to sum gradients of (other variants sum those of all D)."""
        self.e_q, self.e_k, self.e_v = (split(e, mesh, 0) for e in (self.e_q, self.e_k, self.e_v))

    def _inputs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return x, x, context

    def _project(self, projection: nn.Module, x: Tensor) -> Tensor:
        """(B, T, D) → (B, 1, T, d), what all heads share."""
        projected = projection(x)
        return (projected if self.mesh is None else share(projected, self.mesh)).unsqueeze(1)

    def query(self, x: Tensor) -> Tensor:
        q = self._project(self.w_q, x)
        e_q, e_k = own_part(self.e_q), own_part(self.e_k)  # (n, d)
        if self.combine == "add":
            bias = e_q + 0 * e_k  # e^K cancels in the softmax; this gives it its zero gradient
            return q + bias.unsqueeze(1).to(q.dtype)  # (B, n, T, d)
        # (1 + e^Q)(1 + e^K) - 1: rounded to bf16 apart from the 1, which would swallow most of it
        scale = e_q + e_k + e_q * e_k
        return torch.addcmul(q, q, scale.unsqueeze(1).to(q.dtype))

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        return self._project(self.w_k, context), self._project(self.w_v, context)  # (B, 1, S, d) each

    def merge(self, heads: Tensor) -> Tensor:
        e_v = own_part(self.e_v).unsqueeze(1).to(heads.dtype)  # (n, 1, d)
        return super().merge(heads + e_v if self.combine == "add" else torch.addcmul(heads, heads, e_v))

    def folded(self) -> GroupedQuery:
        """MHE is multi-query attention (see above): ``W_Q`` tiled with ``e^Q`` in its bias, or scaled; ``e^V`` in
        ``b_O`` or ``W_O``."""
        (w_q, b_q), k, v = (heads_of(projection, self.head_dim) for projection in (self.w_q, self.w_k, self.w_v))
        w_o, b_o = output_of(self.w_o, self.head_dim)
        e_q, e_k, e_v = (e.detach().double() for e in (self.e_q, self.e_k, self.e_v))
        if self.combine == "add":
            w_q = w_q.expand(self.n_heads, -1, -1)
            return GroupedQuery(w_q, b_q + e_q, *k, *v, w_o, b_o + torch.einsum("ond,nd->o", w_o, e_v))
        scale = (1 + e_q) * (1 + e_k)  # (n, d)
        return GroupedQuery(w_q * scale[:, :, None], b_q * scale, *k, *v, w_o * (1 + e_v), b_o)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, combine={self.combine!r}"
