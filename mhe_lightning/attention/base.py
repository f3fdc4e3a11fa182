"""What every attention shares: argument checks, masks, causality and the one call to SDPA.

A variant states only how queries are made (`query`), what a KV cache stores (`key_value`) and how the heads become
the output (`merge`). Tensors are written with the paper's symbols: `B` batch, `T` queries, `S` keys, `n` heads of
size `d`, width `D = n·d`, and `g` key-value heads (n, 1, or anything between that divides n).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mhe_lightning.attention.cache import KVCache, StaticKVCache, causal_keys
from mhe_lightning.attention.folding import GroupedQuery
from mhe_lightning.attention.products import Linear
from mhe_lightning.attention.tensor_parallel import share, split_rows
from mhe_lightning.attention.unpadded import Unpadded


class Attention(nn.Module):
    """Base of all variants: ``A_i = softmax(Q_i K_iᵀ / √d + mask)``, ``H_i = A_i V_i``, ``output = merge(H)``.

    Args:
        width: model width D, of the input, the context and the output.
        n_heads: number of heads n; it must divide ``width``.
        dropout: probability of dropping an attention weight, in training.
        bias: whether the projections have biases.

    Raises:
        ValueError: an argument is out of range.
    """

    positionwise = True
    """Whether queries, keys and values of a token are made from that token alone, wherever it is: then they may be made
    of real tokens without the padding between them, and of the last positions only. A variant for which this does not
    hold says so."""

    _shares_key_value = False
    """Whether one projection makes the keys and values of all heads."""

    def __init__(self, *, width: int, n_heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        check_divides("n_heads", n_heads, "width", width)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout ({dropout}) must be in [0, 1); 0 switches it off")
        self.width = width
        self.n_heads = n_heads
        self.head_dim = width // n_heads
        self.dropout = dropout
        self.w_o = Linear(width, width, bias=bias)
        self.mesh: DeviceMesh | None = None

    def query(self, x: Tensor) -> Tensor:
        """Queries of all heads, (B, n, T, d), from ``x`` (B, T, D); (B, 1, T, d) where all heads share one."""
        raise NotImplementedError(f"{type(self).__name__} must define query(x)")

    def key_value(self, context: Tensor) -> tuple[Tensor, ...]:
        """Exactly what a KV cache stores: ``(K, V)``, each (B, g, S, d), or ``(K,)`` in a variant where V = K."""
        raise NotImplementedError(f"{type(self).__name__} must define key_value(context)")

    def merge(self, heads: Tensor) -> Tensor:
        """Output (B, T, D) from the heads' outputs (B, n, T, d): ``[H_1 … H_n] W_O``."""
        return self.w_o(heads.transpose(1, 2).flatten(2))

    def folded(self) -> GroupedQuery:
        """The grouped-query attention that computes the same, exactly, with as few heads of keys and values as can be.

        Raises:
            NotImplementedError: the variant has none, or does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define folded(), if it is a grouped-query attention")

    def parallelize(self, mesh: DeviceMesh) -> None:
        """Split the heads over the processes of ``mesh`` (tensor parallelism), in place; outputs stay as they are.

        Each process computes its heads from the whole input. What all heads share is on every process, with the same
        gradient on each.

        Raises:
            ValueError: the heads cannot be divided among the processes, or there is dropout.
        """
        if self.n_heads % mesh.size():
            raise ValueError(
                f"n_heads ({self.n_heads}) must be a multiple of tensor_parallel ({mesh.size()}), whose processes "
                "divide the heads among them"
            )
        if self.dropout:
            raise ValueError(
                f"dropout ({self.dropout}) of attention weights must be 0 with tensor_parallel ({mesh.size()}): the "
                "processes' heads would all drop the same weights"
            )
        self._split_projections(mesh)
        split_rows(self.w_o, mesh)
        self.mesh = mesh

    def compute_as_on_gpu(self) -> None:
        """Take the operations that a GPU would, on a CPU's tensors, where only these are counted: its kernels drop
        weights by themselves."""
        self.dropout = 0.0

    def _split_projections(self, mesh: DeviceMesh) -> None:
        """Split over ``mesh`` what belongs to one head each."""
        raise NotImplementedError(f"{type(self).__name__} must define _split_projections(mesh)")

    def _inputs(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What queries are made from, then what keys and values are: ``x``, or ``context`` if there is one.

        Where each process computes its own heads from them, their gradients are summed. A projection that all heads
        share is the same on all processes: what it makes of its input is summed instead.
        """
        if self.mesh is None:
            return x, x, context
        own = share(x, self.mesh)
        if self._shares_key_value:
            return own, x, context
        return own, own, None if context is None else share(context, self.mesh)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KVCache | None = None,
        unpadded: Unpadded | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Attend from ``x`` to ``context`` (to ``x`` itself without one).

        Args:
            x: (B, T, D), the queries' side; (M, D) with ``unpadded``.
            context: (B, S, D), the keys' side, for cross-attention.
            mask: boolean, True = may attend, broadcastable to (B, n, T, S). Key padding (B, S) is passed as
                ``padding[:, None, None, :]``. A query that may attend to nothing gets zero from every head.
            is_causal: query t sees keys 0 … t, counted from the start of the cache if there is one.
            cache: keys and values of earlier calls. In self-attention those of ``x`` are appended, and S is the
                length after that; in cross-attention the context's are computed at the first call and kept.
                With a `StaticKVCache` S is its ``max_length`` in every call, and without ``is_causal`` the mask alone
                says which keys are seen: it has to hide those that are not written yet (`StaticKVCache.visible`).
            unpadded: where the rows of ``x`` are in (B, T), if it holds real tokens alone; in self-attention without a
                cache. The mask has to hide the padding's keys.
            last: only the last so many positions of ``x`` ask, all if not given; of a mask with T rows theirs are
                taken. Keys and values are still those of all. Not together with ``unpadded``.

        Returns:
            (B, T, D); (B, ``last``, D); (M, D) with ``unpadded``.

        Raises:
            ValueError: a shape or dtype does not fit, or the cache is full, or it is static and used with a context,
                or with neither mask nor causality, or ``unpadded`` is used with a context, a cache or no mask.
        """
        if unpadded is not None:
            _check_unpadded(x, context, mask, cache)
            x = x[None]  # as one sequence: a token's projections are its own affair
        self._check_inputs(x, context)
        B, T = x.shape[:2] if unpadded is None else (unpadded.batch, unpadded.length)
        before = 0 if last is None else T - last  # positions that do not ask
        if last is not None and (not 0 <= before < T or (before and unpadded is not None)):
            raise ValueError(f"last ({last}) must be from 1 to the {T} positions of x, which are not unpadded")
        past: int | Tensor = 0
        if isinstance(cache, StaticKVCache):
            _check_static(context, mask, is_causal)
            past, S = cache.position, cache.max_length
        elif context is None:
            past = 0 if cache is None else cache.length
            S = past + T
        else:
            S = context.shape[1]
        if mask is not None:
            if self.mesh is not None and mask.ndim == 4 and mask.shape[1] > 1:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}, one for each head; heads that are divided among "
                    f"{self.mesh.size()} processes take one mask for all"
                )
            mask = as_4d(mask, (B, self.n_heads, T, S))
        queries, x, context = self._inputs(x, context)
        if before:
            queries, past = queries[:, before:], past + before
            mask = mask[:, :, before:] if mask is not None and mask.shape[2] > 1 else mask
        q, stored = self._projected(queries, x, context, cache)
        if unpadded is None:
            return self.merge(self._attend(q, stored[0], stored[-1], mask, is_causal, past))
        q, *keys_values = (unpadded.spread_heads(rows) for rows in (q, *stored))
        heads = self._attend(q, keys_values[0], keys_values[-1], mask, is_causal, past)
        return self.merge(unpadded.gather_heads(heads))[0]

    @torch.no_grad()
    def weights(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The attention distributions ``A_i`` of all heads, to look at: without dropout, cache and gradient.

        Unlike `forward` this holds all of them in memory. Heads that share one distribution (SHA's) are views of it.

        Args:
            x: as in `forward`.
            context: as in `forward`.
            mask: as in `forward`.
            is_causal: as in `forward`.

        Returns:
            (B, n, T, S), float64 if ``x`` is, else float32. A query that may attend to nothing has a row of zeros.

        Raises:
            ValueError: a shape or dtype does not fit, or the heads are divided among processes.
        """
        if self.mesh is not None:
            raise ValueError(f"the heads are divided among {self.mesh.size()} processes; load the model into one")
        self._check_inputs(x, context)
        c = x if context is None else context
        shape = (x.shape[0], self.n_heads, x.shape[1], c.shape[1])
        visible = visible_keys(mask, shape, is_causal, x.device)
        q, k = self.query(x), self.key_value(c)[0]  # (B, n or 1, T, d), (B, g, S, d)
        if q.shape[1] > 1:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) / math.sqrt(self.head_dim)  # (B, n or 1, T, S)
        if visible is None:
            return scores.softmax(-1).expand(shape)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0).expand(shape)

    def _projected(
        self, queries: Tensor, x: Tensor, context: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `_attend` takes for queries, and the keys and values, those in the cache included."""
        if context is None:
            q, new = self._project(queries, x)
            return q, new if cache is None else cache.append(*new)
        if cache is None or cache.length == 0:
            q, new = self._project(queries, context)
            return q, new if cache is None else cache.append(*new)
        if cache.length != context.shape[1]:
            raise ValueError(
                f"the cache holds {cache.length} keys but the context has {context.shape[1]}; "
                "use a new KVCache for a new context"
            )
        cache.check_batch(context.shape[0])
        return self._queries(queries), cache.stored()

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`_queries` of ``x`` and `key_value` of ``context``: a variant may make them in one product."""
        return self._queries(x), self.key_value(context)

    def _queries(self, x: Tensor) -> Tensor:
        """What `_attend` makes the heads' queries from: these themselves, if a variant has no use for less."""
        return self.query(x)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, past: int | Tensor = 0
    ) -> Tensor:
        """Heads' outputs (B, n, T, d); scores are scaled by 1/√d.

        Args:
            q: what `_queries` gives.
            k: keys, (B, g, S, d).
            v: values, (B, g, S, d).
            mask: boolean, True = may attend, of four dimensions that broadcast to (B, n, T, S).
            is_causal: query t sees keys up to past + t only.
            past: keys before the first query's own.
        """
        if is_causal and (mask is not None or isinstance(past, Tensor) or past):
            # else SDPA's own causality, which needs no mask in memory but counts from the first key
            mask, is_causal = with_causality(mask, q.shape[2], k.shape[2], past, q.device), False
            mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
        if mask is not None and mask.shape[1] > q.shape[1]:
            q = q.expand(-1, mask.shape[1], -1, -1)  # a mask per head makes different heads of one shared query
        # SDPA has no fast form for what `few_rows` leaves with strides
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        shape = q.shape
        alike = not is_causal and (mask is None or mask.shape[1:3] == (1, 1))
        if alike and k.shape[1] < q.shape[1] and not torch.is_grad_enabled():
            # heads that share keys and values are further queries to them, which are then read once for all
            q = q.reshape(shape[0], k.shape[1], -1, shape[3])  # (B, g, (n / g)·T, d)
        heads = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return heads.reshape(*shape[:3], v.shape[3])

    def _split_heads(self, projected: Tensor) -> Tensor:
        """(B, T, h·d) → (B, h, T, d)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _check_inputs(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, T, {self.width})")
        if context is not None and (
            context.ndim != 3 or context.shape[-1] != self.width or context.shape[0] != x.shape[0]
        ):
            raise ValueError(
                f"context has shape {tuple(context.shape)}; it must be ({x.shape[0]}, S, {self.width}), "
                "the batch size and the width of x; project a context of another width first"
            )

    def extra_repr(self) -> str:
        return f"width={self.width}, n_heads={self.n_heads}, dropout={self.dropout}"


def takes_parts(attention: nn.Module) -> bool:
    """Whether an attention, which may be a user's own, takes ``unpadded`` and ``last`` as `Attention.forward` does."""
    return isinstance(attention, Attention) and attention.positionwise and type(attention).forward is Attention.forward


class AttentionFactory(Protocol):
    """What a model needs to build its layers' attention: one new instance per call, keyword arguments only.

    The classes of this package are factories, and so is ``functools.partial`` of one. On the command line it is a
    class path (``--model.net.attention=mhe_lightning.attention.MHE``) or a YAML file (``configs/attention/*.yaml``).
    """

    def __call__(self, *, width: int, n_heads: int) -> Attention: ...


def check_divides(name: str, divisor: int, of: str, number: int) -> None:
    """Raise ``ValueError`` with a remedy unless ``divisor`` is a positive divisor of a positive ``number``."""
    if number < 1:
        raise ValueError(f"{of} ({number}) must be at least 1")
    if divisor < 1 or number % divisor:
        near = [h for h in range(1, min(number, 256) + 1) if number % h == 0]
        near = sorted(sorted(near, key=lambda h: abs(h - divisor))[:4])
        remedy = ", ".join(map(str, near[:-1])) + f" or {near[-1]}" if len(near) > 1 else str(near[0])
        raise ValueError(f"{name} ({divisor}) must divide {of} ({number}); try {remedy}")


def as_4d(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """``mask`` with four dimensions.

    Raises:
        ValueError: it is not boolean, or does not broadcast to ``shape`` = (B, n, T, S).
    """
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}; it must be torch.bool with True = may attend "
            "(for an additive mask pass `additive == 0`)"
        )
    fits = mask.ndim <= 4 and all(m in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must broadcast to (B, n, T, S) = {shape}; "
            "key padding (B, S) is passed as padding[:, None, None, :]"
        )
    return mask[(None,) * (4 - mask.ndim)]


def _check_unpadded(x: Tensor, context: Tensor | None, mask: Tensor | None, cache: KVCache | None) -> None:
    """Raise ``ValueError`` where a batch without padding cannot be attended to."""
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; with unpadded it must be (M, D), the real tokens alone")
    if context is not None or cache is not None or mask is None:
        raise ValueError(
            "unpadded is for self-attention without a cache, with a mask that hides the padding's keys; pad the batch "
            "otherwise"
        )


def _check_static(context: Tensor | None, mask: Tensor | None, is_causal: bool) -> None:
    """Raise ``ValueError`` where a `StaticKVCache` cannot be used."""
    if context is not None:
        raise ValueError(
            "a StaticKVCache is for self-attention but a context was given; use a KVCache, whose shapes do not change "
            "in cross-attention either"
        )
    if mask is None and not is_causal:
        raise ValueError(
            "a StaticKVCache attends to its whole buffer, and nothing says which keys are written; "
            "pass is_causal=True, or a mask made with its visible()"
        )


def visible_keys(
    mask: Tensor | None,
    shape: tuple[int, int, int, int],
    is_causal: bool,
    device: torch.device,
    past: int | Tensor = 0,
) -> Tensor | None:
    """Which keys each query may attend to, boolean, (B or 1, n or 1, T or 1, S or 1); None where nothing is hidden.

    Args:
        mask: boolean, True = may attend, broadcastable to ``shape``.
        shape: (B, n, T, S).
        is_causal: query t sees keys up to past + t only.
        device: of the result, where there is no mask.
        past: keys of earlier calls; as a tensor, () on ``device``, it is not read back from there.

    Raises:
        ValueError: the mask is not boolean or does not broadcast to ``shape``.
    """
    if mask is not None:
        mask = as_4d(mask, shape)
    if is_causal:
        mask = with_causality(mask, shape[2], shape[3], past, device)
    return None if mask is None else mask[(None,) * (4 - mask.ndim)]


def with_causality(mask: Tensor | None, T: int, S: int, past: int | Tensor, device: torch.device) -> Tensor | None:
    """``mask`` and "query t sees keys up to past + t", as one boolean mask; None where nothing is hidden."""
    if isinstance(past, Tensor):
        causal = causal_keys(T, S, past)
    elif T == 1 and past == S - 1:
        return mask  # the newest token sees all that is cached
    else:
        # scaled_dot_product_attention(is_causal=True) aligns the first query with the first key, which is wrong here
        causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=past)
    return causal if mask is None else mask & causal
