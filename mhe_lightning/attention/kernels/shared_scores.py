"""Attention of heads that share queries, keys, values *and scores*: MHE with added embeddings, as two operators.

``H_i = softmax((q + e_i) kᵀ · scale) v`` for n heads from one q, k and v. Since
``(q_t + e_i)·k_j = q_t·k_j + e_i·k_j``, one matrix of exponentials serves all heads:
``H_i = E (w_i ⊙ v) / (E w_i)`` with ``E = exp(q kᵀ)`` (T × S, once) and ``w_i = exp(e_i kᵀ)`` (n × S). All heads are
one product of width n·d: (n + 1) / 2n of the operations of multi-head attention and 1/n of its exponentials.

``torch.ops.mhe_lightning.shared_score_attention`` and ``…_backward`` are known to ``torch.compile``, ``torch.export``
and FLOP counting; under autocast they take its dtype. On a GPU they are Triton kernels; on a CPU, a chunk of a batch at
a time, a compiled kernel (`shared_scores_cpu`) or, in float64 and where nothing compiles, plain torch (`blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mhe_lightning.attention.kernels import blocks, shared_scores_cpu
from mhe_lightning.attention.kernels.blocks import Chunk

CHUNK = 1_600_000
"""Numbers of ``w_i ⊙ v`` in a chunk of a batch's rows, and of each thread a row at least."""


def shared_score_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_q: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The heads' outputs (B, T, n, d), ``H_i = softmax((q + e_i) kᵀ · scale + mask) v``.

    Exact for numbers of any range. What is kept for the backward pass is the arguments, the result and
    B·T·(n + 1) numbers. First derivatives only; without dropout, which would need a mask for each head.

    Args:
        q: queries that all heads share, (B, T, d).
        k: keys, (B, S, d).
        v: values, (B, S, d).
        e_q: what each head adds to the queries, (n, d).
        mask: boolean, True = may attend, broadcastable to (B, 1, T, S). A query that may attend to nothing gets 0.
        is_causal: query t sees keys 0 … t only; together with a mask, those that both allow.
        scale: of the scores; 1/√d if not given.

    Raises:
        ValueError: a mask that is not boolean, or has another shape.
    """
    if mask is not None:
        fits = mask.ndim == 4 and all(
            m in (1, s) for m, s in zip(mask.shape, (q.shape[0], 1, q.shape[1], k.shape[1]), strict=True)
        )
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be boolean and broadcast to "
                f"(B, 1, T, S) = {(q.shape[0], 1, q.shape[1], k.shape[1])}"
            )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v, e_q = (t.to(dtype) for t in (q, k, v, e_q))
    if not k.shape[1]:
        return q.new_zeros(*q.shape[:2], *e_q.shape)  # nothing to see
    heads: Tensor = _attention(q, k, v, e_q, mask, is_causal, scale)[0]
    return heads


@torch.library.custom_op("mhe_lightning::shared_score_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Heads (B, T, n, d), and B·T·(n + 1) numbers at most for the backward pass, which are the kernel's own affair."""
    heads, normalizer = _empty_results(q, e_q)
    for rows, chunk in _chunks(q, k, v, e_q, mask, is_causal, scale):
        found = heads[rows] if heads.dtype == chunk.q.dtype else torch.empty_like(heads[rows], dtype=chunk.q.dtype)
        direct = chunk.out_of_range()
        _kernel(chunk).shared_forward(chunk, found, *_sums_and_level(normalizer[rows]))
        if direct is not None:
            own = torch.empty_like(found)
            blocks.direct_forward(chunk, own)
            found.copy_(torch.where(direct[:, :, None, None], own, found))
        if found.dtype != heads.dtype:
            heads[rows] = found
    return heads, normalizer


@_attention.register_kernel("cuda")
def _attention_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from mhe_lightning.attention.kernels import shared_scores_triton

    with torch.cuda.device_of(q):  # where Triton launches
        return shared_scores_triton.forward(q, k, v, e_q, mask, is_causal, scale)


@_attention.register_fake
def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, e_q)


@torch.library.custom_op("mhe_lightning::shared_score_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_q: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Tensor,
    normalizer: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v and e_q, from that by the heads, ``grad`` (B, T, n, d)."""
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    d_e = torch.zeros_like(e_q, dtype=normalizer.dtype)
    for rows, chunk in _chunks(q, k, v, e_q, mask, is_causal, scale):
        own_grad, own_heads = (t[rows].to(chunk.q.dtype) for t in (grad, heads))
        direct = chunk.out_of_range()
        sums, level = _sums_and_level(normalizer[rows])
        if direct is not None:
            sums = sums.masked_fill(direct.unsqueeze(-1), 0.0)
        wanted = tuple(t[rows] for t in (d_q, d_k, d_v))
        found = tuple(t if t.dtype == chunk.q.dtype else t.new_empty(t.shape, dtype=chunk.q.dtype) for t in wanted)
        d_e += _kernel(chunk).shared_backward(chunk, own_grad, own_heads, sums, level, *found)
        if direct is not None:
            own_grad = own_grad.masked_fill(~direct[:, :, None, None], 0.0)
            d_e += blocks.direct_backward(chunk, own_grad, own_heads, *found)
        for t, own in zip(wanted, found, strict=True):
            if own is not t:
                t.copy_(own)
    return d_q, d_k, d_v, (d_e * scale).to(e_q.dtype)


@_attention_backward.register_kernel("cuda")
def _attention_backward_on_gpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e_q: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    heads: Tensor,
    normalizer: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mhe_lightning.attention.kernels import shared_scores_triton

    with torch.cuda.device_of(q):
        return shared_scores_triton.backward(grad, q, k, v, e_q, mask, is_causal, scale, heads, normalizer)


@_attention_backward.register_fake
def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_q, d_k, d_v, d_e = (t.new_empty(t.shape) for t in (q, k, v, e_q))
    return d_q, d_k, d_v, d_e


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, e_q, mask, ctx.is_causal, ctx.scale = inputs
    heads, normalizer = output
    ctx.save_for_backward(q, k, v, e_q, mask, heads, normalizer)
    ctx.mark_non_differentiable(normalizer)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, e_q, mask, heads, normalizer = ctx.saved_tensors
    found = _attention_backward(grad, q, k, v, e_q, mask, ctx.is_causal, ctx.scale, heads, normalizer)
    return *found, None, None, None


_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.mhe_lightning.shared_score_attention)
def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, e_q: torch.Size, *rest: Any, **more: Any) -> int:
    """Operations of the products; a causal mask saves nothing, as in the kernels that torch counts."""
    pairs, keys, (n, d) = 2 * q[0] * q[1] * k[1], 2 * k[0] * k[1], e_q
    return pairs * (d + n * d + n) + keys * n * d  # q kᵀ, E (w ⊙ v), E w; k eᵀ


@register_flop_formula(torch.ops.mhe_lightning.shared_score_attention_backward)
def _backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, e_q: torch.Size, *rest: Any, **more: Any
) -> int:
    pairs, keys, (n, d) = 2 * q[0] * q[1] * k[1], 2 * k[0] * k[1], e_q
    # q kᵀ again, by E and by w ⊙ v and w, by q and by k; k eᵀ again, by k and by e
    return pairs * (d + 2 * (n * d + n) + 2 * d) + keys * 3 * n * d


def _empty_results(q: Tensor, e_q: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, d), n = q.shape, e_q.shape[0]
    kept = (B, n, T) if q.is_cuda else (B, T, n + 1)
    return q.new_empty(B, T, n, d), q.new_empty(kept, dtype=_accumulator(q.dtype))


def _sums_and_level(normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """What plain torch keeps in it, see `blocks.shared_forward`."""
    return normalizer[..., :-1], normalizer[..., -1:]


def _kernel(chunk: Chunk) -> ModuleType:
    return shared_scores_cpu if shared_scores_cpu.applies(chunk) else blocks


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Iterator[tuple[slice, Chunk]]:
    """The batch's rows, some at a time. Autocast is off while they are worked on."""
    dtype = _accumulator(q.dtype)
    e = e_q.to(dtype) * scale
    size = max(torch.get_num_threads(), CHUNK // max(1, k.shape[1] * e_q.numel()))
    mask = None if mask is None else mask[:, 0]
    with torch.autocast(q.device.type, enabled=False):
        for begin in range(0, q.shape[0], size):
            rows = slice(begin, begin + size)
            own_mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
            yield rows, Chunk(q[rows].to(dtype), k[rows].to(dtype), v[rows].to(dtype), e, own_mask, is_causal, scale)
