"""Shared-score MHE-ADD on a GPU: all heads from one matrix of exponentials (Triton).

The scores of head i are ``s_tj + r_ij`` with ``s = scale·q kᵀ`` and ``r = scale·e kᵀ``, hence with ``w = exp(r)`` and
``E = exp(s − max)``, once for all heads::

    H_i = E (w_i ⊙ v) / (E w_i)

a product of width n·d where multi-head attention has n products of two times d, and one exponential for a group of
heads where it has one for each. Source: identity 3 of MHE-ADD (Xue & Aletras 2023, arXiv 2310.07911, gives the heads).

Range. Maxima are taken over the keys that a row may see, with running rescaling. ``w`` is relative to nothing: it is a
function of one key alone, so no key can change what a row makes of another, nor through rounding. Where |r| is so large
that products of two exponentials may leave the dtype's range (40 octaves, that is a factor of 10¹², in float32 and
bfloat16; 4 in float16), the key is added head by head, with a running maximum of ``s + r_i``: exact in every range, at
the speed of ordinary attention for tiles with such keys.

Rounding. Sums are in float32. E, ``w ⊙ v`` and, backward, ``c·dH`` (see ``shared_scores_triton_backward``) are rounded
to the inputs' dtype for the matrix units; ``w`` and ``c·D``, whose sums are subtracted or divided by, are kept in two
parts.

Memory besides inputs and outputs: ``w ⊙ v`` (B·S·n·d numbers); backward also ``c·dH`` (B·T·n·d) and ds for as many
queries at a time as ``WORKSPACE`` holds.

Not run on a GPU yet: the kernels were run in Triton's interpreter and compiled for compute capabilities 8.0 and 9.0, so
that sizes of tiles rest on counts of registers and shared memory, not on times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mhe_lightning.attention.kernels import shared_scores_triton_backward as backward_kernels
from mhe_lightning.attention.kernels.shared_scores_triton_common import weigh_values
from mhe_lightning.attention.kernels.shared_scores_triton_forward import forward_kernel

WORKSPACE = 64 * 2**20
"""Bytes that ds, the gradient of the shared scores, may take at a time (one tile of queries at least)."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the kernels' tiles.

    Args:
        dim: columns per head: the head dimension padded to a power of two.
        group: heads that share a tile of exponentials; a power of two.
        slots: columns for the sums of a group: three for each head.
        long: rows whose sums stay in registers: queries forward, keys backward.
        short: rows that are looped over.
        edge: queries, and keys, in a tile of ds.
        chunk: of the width n·d, how much is loaded at a time for ds.
        warps: warps of the kernels with a group's sums.
        stages: tiles in flight.
    """

    dim: int
    group: int
    slots: int
    long: int
    short: int
    edge: int
    chunk: int
    warps: int
    stages: int


def choose_tiles(n_heads: int, head_dim: int, dtype: torch.dtype, shared_memory: int) -> Tiles:
    """The sizes of tiles for a shape and a device.

    The sums of a group, long × group·dim in float32, live in registers, of which there are 64k: on compute capability
    9.0 128 × 256 numbers take half. Of 64 keys the tiles take (64 + 256 + 16)·64·2 B = 43 kB of shared memory a stage,
    the tiles of ds and k for its products 48 kB: three stages fit its 227 kB (for dim 128, 51 and 64 kB: 203 in all).
    Before 9.0 the matrix units take both operands from registers, which leaves room for 64 × 128 sums; and float32 has
    no matrix unit at full precision, so that operands live in registers too. Every group makes scores anew, so of the
    group sizes that fit the cheapest is that of least groups·(1 + size).

    Args:
        n_heads: heads n.
        head_dim: head dimension d.
        dtype: of q, k and v.
        shared_memory: bytes that a block may take on the device: 227 kB from compute capability 9.0 on.
    """
    dim = max(16, triton.next_power_of_2(head_dim))
    exact = dtype == torch.float32
    small = shared_memory < 220_000
    most = max(1, (64 if exact else 128 if small else 256) // dim)
    sizes = [size for size in (1, 2, 4, 8, 16) if size <= most]
    group = min(sizes, key=lambda size: (triton.cdiv(n_heads, size) * (1 + size), size))
    slots = max(16, triton.next_power_of_2(3 * group))
    if exact:
        return Tiles(dim, group, slots, long=32, short=32, edge=32, chunk=32, warps=4, stages=1)
    if small:
        return Tiles(dim, group, slots, long=64, short=64, edge=64, chunk=64, warps=4, stages=2)
    return Tiles(dim, group, slots, long=128, short=64, edge=128, chunk=64, warps=8, stages=3)


def _tiles(q: Tensor, e_q: Tensor) -> Tiles:
    memory = 227 * 1024  # the interpreter has no limit
    if q.is_cuda:
        memory = triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"]
    n, d = e_q.shape
    return choose_tiles(n, d, q.dtype, memory)


@dataclass(frozen=True)
class _Weighed:
    """What ``weigh_values`` makes of the keys (shapes there)."""

    r: Tensor
    penalty: Tensor
    values: Tensor
    weights: Tensor


def _weigh(k: Tensor, v: Tensor, e_q: Tensor, scale: float, tiles: Tiles) -> _Weighed:
    (B, S, d), n = k.shape, e_q.shape[0]
    groups = triton.cdiv(n, tiles.group)
    weighed = _Weighed(
        r=k.new_empty(B, n, S, dtype=torch.float32),
        penalty=k.new_empty(B, S, dtype=torch.float32),
        values=k.new_empty(B, S, n, d),
        weights=k.new_zeros(B, S, groups, tiles.slots),
    )
    # float16: w·v and E·w must keep the digits of the largest product that may be of interest (2^15 is its range)
    spread, largest = (4.0, 2.0**11) if k.dtype == torch.float16 else (40.0, 2.0**60)
    weigh_values[(triton.cdiv(S, tiles.short), B)](
        k, v, e_q, weighed.r, weighed.penalty, weighed.values, weighed.weights,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), e_q.stride(0), S, scale,
        SPREAD=spread, LARGEST=largest, HEADS=n, HEAD_DIM=d, GROUP=tiles.group, SLOTS=tiles.slots,
        KEYS=tiles.short, DIM=tiles.dim, num_warps=4,
    )  # fmt: skip
    return weighed


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; on a GPU shared scores need one of "
            "float32, bfloat16 and float16 for all: convert them, or compute by shared keys and values"
        )
    if q.shape[-1] > 128:
        raise ValueError(
            f"head dimension {q.shape[-1]} is more than 128, the most that shared scores take on a GPU; compute by "
            "shared keys and values"
        )


def _by_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels take any strides, but over the last dimension."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _mask_arguments(mask: Tensor | None, q: Tensor) -> tuple[Tensor, int, int, int]:
    """The mask as bytes with its strides over batch, queries and keys: 0 where it broadcasts."""
    if mask is None:
        return q, 0, 0, 0  # never read
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return mask.view(torch.uint8), strides[0], strides[2], strides[3]


def forward(
    q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Every head's attention over shared keys and values.

    Args:
        q: shared queries (B, T, d), float32, bfloat16 or float16.
        k: shared keys (B, S, d), as v of the dtype of q.
        v: shared values (B, S, d).
        e_q: head embeddings (n, d), added to the queries; of any of the dtypes.
        mask: boolean, broadcastable to (B, 1, T, S), True = may attend; it is read through its strides.
        is_causal: whether query t sees keys 0 to t only.
        scale: factor of the scores.

    Returns:
        The heads (B, T, n, d), contiguous, zero in a row without a visible key; and the normalizer (B, n, T) in
        float32, the logarithm of the sum of exponentials over visible keys, -inf in such a row.

    Raises:
        ValueError: a dtype or a head dimension that the kernels have not.
    """
    (B, T, d), S, n = q.shape, k.shape[1], e_q.shape[0]
    _check(q, k, v)
    q, k, v, e_q = _by_rows(q, k, v, e_q)
    tiles = _tiles(q, e_q)
    weighed = _weigh(k, v, e_q, scale, tiles)
    heads = q.new_empty(B, T, n, d)
    normalizer = q.new_empty(B, n, T, dtype=torch.float32)
    mask_bytes, *mask_strides = _mask_arguments(mask, q)
    forward_kernel[(triton.cdiv(n, tiles.group), triton.cdiv(T, tiles.long), B)](
        q, k, v, weighed.r, weighed.penalty, weighed.values, weighed.weights, mask_bytes, heads, normalizer,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *mask_strides,
        T, S, scale, CAUSAL=is_causal, HAS_MASK=mask is not None, HEADS=n, HEAD_DIM=d, GROUP=tiles.group,
        SLOTS=tiles.slots, ROWS=tiles.long, KEYS=tiles.short, DIM=tiles.dim, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    return heads, normalizer


def backward(
    grad_heads: Tensor,
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
    """Gradients of q, k, v and e_q.

    Args:
        grad_heads: gradient of the heads (B, T, n, d).
        heads: what ``forward`` gave, as ``normalizer``; the others are its arguments.

    Returns:
        The gradients of q, k, v and e_q, each with the strides that ``torch.empty_like`` gives it.
    """
    (B, T, d), S, n = q.shape, k.shape[1], e_q.shape[0]
    results = tuple(torch.empty_like(x) for x in (q, k, v, e_q))
    grad_heads, q, k, v, e_q = _by_rows(grad_heads, q, k, v, e_q)
    tiles = _tiles(q, e_q)
    weighed = _weigh(k, v, e_q, scale, tiles)
    groups = triton.cdiv(n, tiles.group)
    scaled = q.new_empty(B, T, n, d)
    sums = q.new_zeros(B, T, groups, tiles.slots)
    dots = torch.empty_like(normalizer)
    shift = normalizer.new_empty(B, T)
    grad_strides = grad_heads.stride()[:3]
    backward_kernels.scale_gradients[(triton.cdiv(T, tiles.short), B)](
        heads, grad_heads, normalizer, scaled, sums, dots, shift, *grad_strides, T,
        HEADS=n, HEAD_DIM=d, GROUP=tiles.group, SLOTS=tiles.slots, ROWS=tiles.short, DIM=tiles.dim,
        PADDED_HEADS=triton.next_power_of_2(n), num_warps=4,
    )  # fmt: skip

    mask_bytes, *mask_strides = _mask_arguments(mask, q)
    strides = (
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *grad_strides,
        *mask_strides,
    )
    dr = k.new_empty(B, n, S, dtype=torch.float32)
    dv = k.new_empty(B, groups, S, d, dtype=torch.float32)
    backward_kernels.key_gradients[(groups, triton.cdiv(S, tiles.long), B)](
        q, k, v, weighed.r, weighed.penalty, mask_bytes, grad_heads, normalizer, scaled, sums, dots, shift, dr, dv,
        *strides, T, S, scale, CAUSAL=is_causal, HAS_MASK=mask is not None, HEADS=n, HEAD_DIM=d,
        GROUP=tiles.group, SLOTS=tiles.slots, ROWS=tiles.short, KEYS=tiles.long, DIM=tiles.dim, num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip

    edge = tiles.edge
    part = max(1, WORKSPACE // max(1, B * S * q.element_size()) // edge) * edge  # queries at a time
    part = min(part, triton.cdiv(T, edge) * edge)
    ds = q.new_empty(B, part, S)
    dq = q.new_empty(B, T, d)
    dk = k.new_zeros(B, S, d, dtype=torch.float32)
    for first in range(0, T, part):
        rows = triton.cdiv(min(part, T - first), edge)
        columns = triton.cdiv(S, edge)
        backward_kernels.score_gradients[(columns, rows, B)](
            q, k, v, weighed.r, weighed.penalty, weighed.values, weighed.weights, mask_bytes, grad_heads, normalizer,
            scaled, sums, dots, shift, ds, *strides, first, ds.stride(0), T, S, scale, CAUSAL=is_causal,
            HAS_MASK=mask is not None, HEADS=n, HEAD_DIM=d, GROUP=tiles.group, SLOTS=tiles.slots, EDGE=edge,
            CHUNK=tiles.chunk, DIM=tiles.dim, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        backward_kernels.query_products[(rows, B)](
            ds, k, dq, k.stride(0), k.stride(1), first, ds.stride(0), T, S, scale,
            CAUSAL=is_causal, HEAD_DIM=d, EDGE=edge, DIM=tiles.dim, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        backward_kernels.key_products[(columns, B)](
            ds, q, dk, q.stride(0), q.stride(1), first, min(first + part, T), ds.stride(0), T, S,
            CAUSAL=is_causal, HEAD_DIM=d, EDGE=edge, DIM=tiles.dim, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    dk = scale * (dk + dr.transpose(1, 2) @ e_q.float())
    de = scale * torch.einsum("bnj,bjd->nd", dr, k.float())
    for result, found in zip(results, (dq, dk, dv.sum(1), de), strict=True):
        result.copy_(found)
    return results  # type: ignore[return-value]
