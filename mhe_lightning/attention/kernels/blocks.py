"""Attention whose heads share keys and values, in plain torch, a block of queries or keys at a time.

What these functions take is a chunk of a batch, so small that its products stay near the processor. `Chunk` is what
both forms work on: shared scores (`shared_forward`, `shared_backward`), where all heads are re-weightings of one
exponential, and a softmax per head (`direct_forward`, `direct_backward`), which is right for numbers of any range.

Written with `B` batch rows, `T` queries, `S` keys, `n` heads of size `d`. All tensors of a call have one dtype, which
products are accumulated in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RANGE = 20.0
"""Largest ``|e_i · k_j| / √d`` of shared scores, whose exponentials are multiplied with others: products of two of
them, of what they are divided by and of a long row stay within float32 (e^±87)."""

CAUSAL_BLOCK = 128
"""Queries or keys of a block where half of the square on the diagonal is computed in vain; twice as many in long
sequences, where that is little beside the rest."""

BLOCK = 512
"""The same where nothing is in vain: larger products are faster."""

LONG = 1024
"""Queries that a sequence has at most not to be long."""

DIRECT_ROWS = 512
"""Rows, queries times heads, of a block of the direct form, whose scores are those of every head."""


@dataclass
class Chunk:
    """Rows of a batch.

    Args:
        q: queries, (B, T, d); what all heads share of them.
        k: keys, (B, S, d).
        v: values, (B, S, d).
        e: what each head adds to the queries, times the scale, (n, d).
        mask: boolean, True = may attend, broadcastable to (B, T, S).
        is_causal: query t sees keys 0 … t only.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    e: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float

    def __post_init__(self) -> None:
        self.r = self.k @ self.e.T  # (B, S, n), what a head adds to the scores of a key
        self.k_t = self.k.transpose(1, 2)

    @cached_property
    def scaled_q(self) -> Tensor:
        return self.q * self.scale

    @property
    def block(self) -> int:
        """Queries or keys to be worked on at once."""
        if not self.is_causal:
            return BLOCK
        return CAUSAL_BLOCK if self.q.shape[1] <= LONG else 2 * CAUSAL_BLOCK

    def out_of_range(self) -> Tensor | None:
        """Queries (B, T) that see a key whose ``r`` is too large for shared scores, boolean; None if there are none.

        Such keys are given r = 0, so that shared scores do no harm to the other queries, not to a bit of them.
        """
        if all(abs(float(end)) <= RANGE for end in self.r.aminmax()):
            return None
        bad = ~(self.r.abs() <= RANGE).all(-1)  # (B, S); NaN is bad
        self.r = self.r.masked_fill(bad.unsqueeze(-1), 0.0)
        seen = bad[:, None].expand(-1, self.q.shape[1], -1)
        if self.mask is not None:
            seen = seen & self.mask
        return (seen.tril() if self.is_causal else seen).any(-1)

    def query_blocks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, and the keys that any of them may see by causality."""
        T, S = self.q.shape[1], self.k.shape[1]
        for begin in range(0, T, size):
            end = min(begin + size, T)
            yield slice(begin, end), slice(0, min(end, S) if self.is_causal else S)

    def hide(self, scores: Tensor, queries: slice, keys: slice) -> Tensor:
        """-∞ in place of scores (B, …, queries, keys) of keys that a query may not see."""
        if self.is_causal and keys.stop > queries.start:
            s = slice(max(queries.start, keys.start), keys.stop)  # keys before are seen by all these queries
            t = slice(queries.start, min(queries.stop, keys.stop))  # queries after see all these keys
            later = torch.ones(t.stop - t.start, s.stop - s.start, dtype=torch.bool, device=scores.device)
            later = later.triu_(1 + t.start - s.start)
            scores[..., : t.stop - t.start, s.start - keys.start :].masked_fill_(later, -math.inf)
        if self.mask is not None:
            t = slice(None) if self.mask.shape[1] == 1 else queries
            s = slice(None) if self.mask.shape[2] == 1 else keys
            hidden = ~self.mask[:, t, s]
            scores.masked_fill_(hidden if scores.ndim == 3 else hidden[:, None], -math.inf)
        return scores


def shared_forward(chunk: Chunk, heads: Tensor, sums: Tensor, level: Tensor) -> None:
    """``H_i = E (w_i ⊙ v) / (E w_i)`` with ``E = exp(q kᵀ - level)`` of all heads and ``w_i = exp(e_i kᵀ)``.

    Args:
        chunk: its `out_of_range` is another's affair.
        heads: (B, T, n, d), written; 0 where no key is in view.
        sums: (B, T, n), written: ``E w_i``, 0 where no key is in view.
        level: (B, T, 1), written: the highest score in view, whatever the head.
    """
    w = chunk.r.exp()  # (B, S, n)
    wv = (w.unsqueeze(-1) * chunk.v.unsqueeze(2)).flatten(2)  # (B, S, n·d)
    for t, s in chunk.query_blocks(chunk.block):
        scores = chunk.hide(torch.bmm(chunk.scaled_q[:, t], chunk.k_t[:, :, s]), t, s)
        top = scores.amax(-1, keepdim=True)
        if chunk.mask is not None:
            top.masked_fill_(top == -math.inf, 0.0)  # no key in view: exp(-∞ - 0) is 0
        e = scores.sub_(top).exp_()  # (B, block, keys)
        torch.bmm(e, wv[:, s], out=heads[:, t].flatten(2))
        sums[:, t] = torch.bmm(e, w[:, s])
        level[:, t] = top
    heads.div_((sums if chunk.mask is None else sums.masked_fill(sums == 0, 1.0)).unsqueeze(-1))


def shared_backward(
    chunk: Chunk,
    grad: Tensor,
    heads: Tensor,
    sums: Tensor,
    level: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> Tensor:
    """Gradients from ``grad`` (B, T, n, d) and what `shared_forward` has found.

    Those by ``chunk.q``, ``k`` and ``v`` are written, that by ``chunk.e`` is returned.

    A block of keys at a time: what is as wide as all heads, (S, n·d), is then written once and never added to. Queries
    whose ``sums`` are 0 are left out.
    """
    T, S = chunk.q.shape[1], chunk.k.shape[1]
    w = chunk.r.exp()
    wv = w.unsqueeze(-1) * chunk.v.unsqueeze(2)  # (B, S, n, d)
    wv_t, w_t = wv.flatten(2).transpose(1, 2), w.transpose(1, 2)
    blind = sums == 0
    inverse = sums.reciprocal().masked_fill_(blind, 0.0)  # p_tij = exp(s_tj - level_t) w_ij inverse_ti
    level = level.masked_fill(blind[..., :1], math.inf)
    d_n = grad * heads
    d_z = d_n.sum(-1).mul_(inverse).neg_()  # (B, T, n)
    torch.mul(grad, inverse.unsqueeze(-1), out=d_n)
    d_n = d_n.flatten(2)  # (B, T, n·d)
    d_q.zero_()
    d_wv, d_w = torch.empty_like(wv), torch.empty_like(w)
    for begin in range(0, S, chunk.block):
        s = slice(begin, min(begin + chunk.block, S))
        t = slice(min(begin, T) if chunk.is_causal else 0, T)
        if t.start == T:  # more keys than queries: no query sees these
            for unseen in (d_k, d_wv, d_w):
                unseen[:, s].zero_()
            continue
        e = chunk.hide(torch.bmm(chunk.scaled_q[:, t], chunk.k_t[:, :, s]), t, s).sub_(level[:, t]).exp_()
        e_t = e.transpose(1, 2)
        torch.bmm(e_t, d_n[:, t], out=d_wv[:, s].flatten(2))
        torch.bmm(e_t, d_z[:, t], out=d_w[:, s])
        d_s = torch.bmm(d_z[:, t], w_t[:, :, s]).baddbmm_(d_n[:, t], wv_t[:, :, s]).mul_(e)
        torch.bmm(d_s.transpose(1, 2), chunk.scaled_q[:, t], out=d_k[:, s])
        d_q[:, t].baddbmm_(d_s, chunk.k[:, s])
    torch.mul(d_wv, chunk.v.unsqueeze(2), out=wv)
    d_r = d_w.add_(wv.sum(-1)).mul_(w)  # (B, S, n)
    torch.sum(d_wv.mul_(w.unsqueeze(-1)), 2, out=d_v)
    d_q.mul_(chunk.scale)
    return through_r(chunk, d_r, d_k)


def through_r(chunk: Chunk, d_r: Tensor, d_k: Tensor) -> Tensor:
    """The gradient by ``chunk.e`` from that by ``chunk.r``, (B, S, n); what k gets of it is added to ``d_k``."""
    d_k.baddbmm_(d_r, chunk.e.expand(len(d_k), -1, -1))
    return d_r.flatten(0, 1).T @ chunk.k.flatten(0, 1)


def direct_forward(chunk: Chunk, heads: Tensor) -> None:
    """``H_i = softmax((q + e_i) kᵀ) v``, for scores of any range, into ``heads`` (B, T, n, d)."""
    n = heads.shape[2]
    for t, s in chunk.query_blocks(max(1, DIRECT_ROWS // n)):
        p = _probabilities(chunk, _queries(chunk, t), t, s)
        heads[:, t] = torch.bmm(p.flatten(1, 2), chunk.v[:, s]).unflatten(1, (n, -1)).transpose(1, 2)


def direct_backward(chunk: Chunk, grad: Tensor, heads: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Tensor:
    """As `shared_backward`, of `direct_forward`; but adds to ``d_q``, ``d_k`` and ``d_v``."""
    n = grad.shape[2]
    v_t = chunk.v.transpose(1, 2)
    d_e = torch.zeros_like(chunk.e)
    means = (grad * heads).sum(-1).transpose(1, 2)  # (B, n, T)
    for t, s in chunk.query_blocks(max(1, DIRECT_ROWS // n)):
        q = _queries(chunk, t)
        p = _probabilities(chunk, q, t, s)
        g = grad[:, t].transpose(1, 2).flatten(1, 2)  # (B, n·block, d)
        d_v[:, s].baddbmm_(p.flatten(1, 2).transpose(1, 2), g)
        d_s = torch.bmm(g, v_t[:, :, s]).view_as(p).sub_(means[:, :, t].unsqueeze(-1)).mul_(p).flatten(1, 2)
        d_k[:, s].baddbmm_(d_s.transpose(1, 2), q.flatten(1, 2))
        d_queries = torch.bmm(d_s, chunk.k[:, s]).unflatten(1, (n, -1))  # (B, n, block, d)
        d_q[:, t] += d_queries.sum(1) * chunk.scale
        d_e += d_queries.sum((0, 2))
    return d_e


def _queries(chunk: Chunk, t: slice) -> Tensor:
    """The queries of each head, (B, n, block, d)."""
    return chunk.scaled_q[:, None, t] + chunk.e[:, None]


def _probabilities(chunk: Chunk, q: Tensor, t: slice, s: slice) -> Tensor:
    """Attention weights (B, n, block, keys); zeros where no key is in view."""
    scores = torch.bmm(q.flatten(1, 2), chunk.k_t[:, :, s]).unflatten(1, q.shape[1:3])
    p = chunk.hide(scores, t, s).softmax(-1)
    return p if chunk.mask is None else p.masked_fill_(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
