"""Multi-head-embedding attention: one shared projection, and one small vector per head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.base import Attention
from mhe_lightning.attention.folding import GroupedQuery, heads_of, output_of
from mhe_lightning.attention.kernels.shared_scores import shared_score_attention
from mhe_lightning.attention.products import is_plain
from mhe_lightning.attention.tensor_parallel import own_part, share, split

Form = Literal["auto", "shared_scores", "shared_kv"]

WORTHWHILE = 768
"""Heads times queries from which on a CPU is faster with shared scores: fewer are not worth weighting the values of
every key for each head, nor what an operator costs by itself."""


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

    ``add`` also shares its *scores*: ``(q_t + e^Q_i)·k_j = q_t·k_j + e^Q_i·k_j``, so that one matrix of exponentials
    is re-weighted for every head (`mhe_lightning.attention.kernels.shared_scores`). The results are the same up to
    rounding; it is faster where there are many heads and queries. ``form`` "auto" takes it on a CPU where their product
    is `WORTHWHILE`, and scores of each head over shared keys and values ("shared_kv") otherwise, on other devices and
    in ``torch.export``. "shared_scores" takes it on a GPU too, where it is a Triton kernel. Neither ever takes it where
    it does not apply: with attention dropout in training, with a mask for each head, and behind cached keys.

    Source: Xue & Aletras 2023, *Pit One Against Many*, Findings of EMNLP, arXiv 2310.07911.

    Args:
        width: model width D.
        n_heads: heads n; must divide ``width``.
        combine: how a head embedding meets the shared projection, "add" or "multiply".
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
        embedding_std: standard deviation of the normal distribution that the head embeddings start from.
        form: how ``add`` is computed, "auto", "shared_scores" or "shared_kv" (see above).
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
        form: Form = "auto",
    ) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        if combine not in ("add", "multiply"):
            raise ValueError(f"combine ({combine!r}) must be 'add' or 'multiply'")
        if embedding_std < 0:
            raise ValueError(f"embedding_std ({embedding_std}) must not be negative; 0.02 is the default")
        if form not in ("auto", "shared_scores", "shared_kv"):
            raise ValueError(f"form ({form!r}) must be 'auto', 'shared_scores' or 'shared_kv'")
        if form == "shared_scores" and combine != "add":
            raise ValueError(f"form ('shared_scores') is for combine 'add', not {combine!r}; use 'auto'")
        self.combine = combine
        self.form = form
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

    def compute_as_on_gpu(self) -> None:
        super().compute_as_on_gpu()
        if self.form == "auto":
            self.form = "shared_kv"

    def _inputs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return x, x, context

    def query(self, x: Tensor) -> Tensor:
        return self._of_heads(self._shared(self.w_q(x)))

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        return self._shared(self.w_k(context)), self._shared(self.w_v(context))  # (B, 1, S, d) each

    def merge(self, heads: Tensor) -> Tensor:
        e_v = own_part(self.e_v).to(heads.dtype)  # (n, d)
        weight: Tensor = self.w_o.weight
        bias: Tensor | None = self.w_o.bias
        if heads.shape[0] * heads.shape[2] < self.width or not is_plain(self.w_o):
            e_v = e_v.unsqueeze(1)
            return super().merge(heads + e_v if self.combine == "add" else torch.addcmul(heads, heads, e_v))
        # the same with fewer numbers to go through: those of W_O instead of those of all tokens
        e_v = e_v.flatten()
        if self.combine == "add":
            constant = weight @ e_v.to(weight.dtype)  # Σ_i e^V_i W_O^i
            bias = constant if bias is None else bias + constant.to(bias.dtype)
        else:
            weight = torch.addcmul(weight, weight, e_v.to(weight.dtype))
        return F.linear(heads.transpose(1, 2).flatten(2), weight, bias)

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        projections = (self.w_q, self.w_k, self.w_v)
        fused = x is context and x.shape[0] * x.shape[1] >= self.width and self.mesh is None and not self._is_another
        biases = {p.bias is None for p in projections}
        if not fused or len(biases) > 1 or not all(map(is_plain, projections)):
            return super()._project(x, context)
        # one product of width 3d: x is read once, and its gradient written once
        weight = torch.cat([p.weight for p in projections])
        bias = torch.cat([p.bias for p in projections]) if self.w_q.bias is not None else None
        q, k, v = F.linear(x, weight, bias).unsqueeze(1).chunk(3, -1)
        return q, (k, v)

    @property
    def _is_another(self) -> bool:
        """Whether a subclass makes queries, keys or values in a way of its own, which is to be taken then."""
        return type(self).query is not MHE.query or type(self).key_value is not MHE.key_value

    def _queries(self, x: Tensor) -> Tensor:
        # (B, 1, T, d), before the embeddings
        return self.query(x) if self._is_another else self._shared(self.w_q(x))

    def _shared(self, projected: Tensor) -> Tensor:
        """(B, T, d) → (B, 1, T, d), what all heads share."""
        return (projected if self.mesh is None else share(projected, self.mesh)).unsqueeze(1)

    def _of_heads(self, q: Tensor) -> Tensor:
        """The heads' queries (B, n, T, d) from what they share."""
        if self.combine == "add":
            return q + self._added_queries().unsqueeze(1).to(q.dtype)
        e_q, e_k = own_part(self.e_q), own_part(self.e_k)  # (n, d)
        # (1 + e^Q)(1 + e^K) - 1: rounded to bf16 apart from the 1, which would swallow most of it
        scale = e_q + e_k + e_q * e_k
        return torch.addcmul(q, q, scale.unsqueeze(1).to(q.dtype))

    def _added_queries(self) -> Tensor:
        """(n, d), ``e^Q`` where it is added; ``e^K`` cancels in the softmax, and gets its zero gradient here."""
        return own_part(self.e_q) + 0 * own_part(self.e_k)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, past: int | Tensor = 0
    ) -> Tensor:
        if self._is_another:
            return super()._attend(q, k, v, mask, is_causal, past)
        if not self._shares_scores(q, mask, past):
            return super()._attend(self._of_heads(q), k, v, mask, is_causal, past)
        e_q = self._added_queries().to(q.dtype)
        heads = shared_score_attention(q[:, 0], k[:, 0], v[:, 0], e_q, mask, is_causal)  # (B, T, n, d)
        return heads.transpose(1, 2)

    def _shares_scores(self, q: Tensor, mask: Tensor | None, past: int | Tensor) -> bool:
        """Whether shared scores apply, and are to be taken."""
        if self.combine != "add" or self.form == "shared_kv" or (self.training and self.dropout):
            return False
        if isinstance(past, Tensor) or past or (mask is not None and mask.shape[1] > 1):
            return False
        if self.form == "shared_scores":
            return True
        if q.device.type != "cpu" or torch.compiler.is_exporting():
            return False
        return self.n_heads > 1 and self.n_heads * q.shape[2] >= WORTHWHILE

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
        form = "" if self.form == "auto" else f", form={self.form!r}"
        return f"{super().extra_repr()}, combine={self.combine!r}{form}"
