"""Attention whose heads have keys and values of their own (MHA), or share them in groups (GQA) or all (MQA, SHA)."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.base import Attention, check_divides
from mhe_lightning.attention.folding import GroupedQuery, heads_of, output_of
from mhe_lightning.attention.products import Linear, linear
from mhe_lightning.attention.tensor_parallel import share, split_columns


class GQA(Attention):
    """Grouped-query attention: n query heads, ``n_kv_heads`` = g heads of keys and values.

    ``Q_i = x W_Q^i``, ``K_i = c W_K^⌊ig/n⌋``, ``V_i = c W_V^⌊ig/n⌋``: n²d² + 2gnd² parameters besides ``W_O``, and
    2gd numbers per token in a KV cache. g = n is MHA, g = 1 is MQA.

    Source: Ainslie et al. 2023, *GQA*, arXiv 2305.13245.

    Args:
        width: model width D.
        n_heads: query heads n; must divide ``width``.
        n_kv_heads: key-value heads g; must divide ``n_heads``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, n_kv_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        check_divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
        self.n_kv_heads = n_kv_heads
        self._shares_key_value = n_kv_heads == 1
        self.w_q = Linear(width, width, bias=bias)
        self.w_k = Linear(width, n_kv_heads * self.head_dim, bias=bias)
        self.w_v = Linear(width, n_kv_heads * self.head_dim, bias=bias)

    def _split_projections(self, mesh: DeviceMesh) -> None:
        if not self._shares_key_value and self.n_kv_heads % mesh.size():
            raise ValueError(
                f"n_kv_heads ({self.n_kv_heads}) must be a multiple of tensor_parallel ({mesh.size()}), or 1, which "
                "every process keeps"
            )
        split_columns(self.w_q, mesh)
        if not self._shares_key_value:
            split_columns(self.w_k, mesh)
            split_columns(self.w_v, mesh)

    def query(self, x: Tensor) -> Tensor:
        return self._split_heads(self.w_q(x))  # (B, n, T, d)

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        k, v = self.w_k(context), self.w_v(context)
        if self.mesh is not None and self._shares_key_value:
            k, v = share(k, self.mesh), share(v, self.mesh)
        return self._split_heads(k), self._split_heads(v)  # (B, g, S, d) each

    def folded(self) -> GroupedQuery:
        q, k, v = (heads_of(projection, self.head_dim) for projection in (self.w_q, self.w_k, self.w_v))
        return GroupedQuery(*q, *k, *v, *output_of(self.w_o, self.head_dim))


class MHA(GQA):
    """Multi-head attention: every head has its own queries, keys and values. 3n²d² parameters besides ``W_O``.

    Source: Vaswani et al. 2017, *Attention Is All You Need*, arXiv 1706.03762.

    Args:
        width: model width D.
        n_heads: heads n; must divide ``width``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, n_kv_heads=n_heads, dropout=dropout, bias=bias)


class MQA(GQA):
    """Multi-query attention: n query heads over one head of keys and values. n²d² + 2nd² parameters besides ``W_O``.

    Source: Shazeer 2019, *Fast Transformer Decoding*, arXiv 1911.02150.

    Args:
        width: model width D.
        n_heads: query heads n; must divide ``width``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, n_kv_heads=1, dropout=dropout, bias=bias)


class SHA(Attention):
    """One head for all: ``H = softmax(x W_Q (c W_K)ᵀ / √d) c W_V`` feeds all n blocks of ``W_O``.

    This is MHE without its head embeddings, the reference that MHE adds 3nd parameters to: 3nd² besides ``W_O``.
    Attention is computed once, and ``[H … H] W_O = H Σ_i W_O^i`` likewise.

    Args:
        width: model width D.
        n_heads: blocks n of ``W_O``; sets the head size d = D/n.
        dropout: probability of dropping an attention weight, in training; the one head has one dropout mask.
        bias: whether the projections have biases.
    """

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__(width=width, n_heads=n_heads, dropout=dropout, bias=bias)
        self.w_q = Linear(width, self.head_dim, bias=bias)
        self.w_k = Linear(width, self.head_dim, bias=bias)
        self.w_v = Linear(width, self.head_dim, bias=bias)

    def parallelize(self, mesh: DeviceMesh) -> None:
        """One head cannot be divided: every process computes it as it does without ``mesh``."""

    def query(self, x: Tensor) -> Tensor:
        return self.w_q(x).unsqueeze(1)  # (B, 1, T, d)

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        return self.w_k(context).unsqueeze(1), self.w_v(context).unsqueeze(1)  # (B, 1, S, d) each

    def merge(self, heads: Tensor) -> Tensor:
        if heads.shape[1] > 1:  # a mask per head was given: the heads differ
            return super().merge(heads)
        blocks = self.w_o.weight.unflatten(1, (self.n_heads, self.head_dim))  # (D, n, d)
        return linear(heads.squeeze(1), blocks.sum(1), self.w_o.bias)

    def folded(self) -> GroupedQuery:
        (w_q, b_q), k, v = (heads_of(projection, self.head_dim) for projection in (self.w_q, self.w_k, self.w_v))
        n = self.n_heads
        return GroupedQuery(w_q.repeat(n, 1, 1), b_q.repeat(n, 1), *k, *v, *output_of(self.w_o, self.head_dim))
