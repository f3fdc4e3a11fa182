"""What the forward and the backward kernels of shared-score MHE-ADD share: loads, masks, and the weighted values.

Where heads share scores these are counted in octaves (base-2 logarithms), since exp2 is what the hardware has. Where a
head is treated by itself they are in natural units, as the normalizer is: a probability of 1 is then 1 after the
normalizer was stored and read, at any size of scores.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# The arguments of kernels are Triton's own: pointers, and numbers that it specialises.

from __future__ import annotations

import triton
import triton.language as tl

OCTAVES = tl.constexpr(1.4426950408889634)
"""log2(e), the octaves in a natural unit."""


@triton.jit
def load_rows(base, start, stride, rows, WIDTH: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr):
    """COUNT rows of WIDTH numbers, padded to DIM: (COUNT, DIM), zeros where there are none.

    Args:
        base: pointer to row 0.
        start: the first row.
        stride: numbers from row to row.
        rows: how many rows there are.
    """
    i = tl.arange(0, COUNT)
    c = tl.arange(0, DIM)
    # 64 bits for the tile's place, 32 within the tile
    pointers = base + tl.cast(start, tl.int64) * stride + i[:, None] * stride + c[None, :]
    return tl.load(pointers, mask=(start + i < rows)[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def group_columns(group, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr):
    """For the GROUP·DIM columns of a group of heads: the head within the group, the place in a row of n·d numbers, and
    whether the column is one of them (heads and dimensions are padded)."""
    c = tl.arange(0, GROUP * DIM)
    member = c // DIM
    head = group * GROUP + member
    return member, head * HEAD_DIM + c % DIM, (head < HEADS) & (c % DIM < HEAD_DIM)


@triton.jit
def load_group(
    base,
    start,
    rows,
    group,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
):
    """COUNT rows of a contiguous (rows, n, d), the heads of one group: (COUNT, GROUP·DIM), padded with zeros."""
    i = tl.arange(0, COUNT)
    _, place, real = group_columns(group, HEADS, HEAD_DIM, GROUP, DIM)
    pointers = base + tl.cast(start, tl.int64) * (HEADS * HEAD_DIM) + i[:, None] * (HEADS * HEAD_DIM) + place[None, :]
    return tl.load(pointers, mask=(start + i < rows)[:, None] & real[None, :], other=0.0)


@triton.jit
def visible(t, j, mask, mask_t, mask_j, T, S, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr):
    """Whether query t may attend to key j, for indices that broadcast against each other; with ``CAUSAL`` alone also
    outside of T and S, whose bounds are the caller's."""
    seen = (t >= 0) & (j >= 0)
    if CAUSAL:
        seen = j <= t
    if HAS_MASK:
        places = t.to(tl.int64) * mask_t + j.to(tl.int64) * mask_j
        seen = seen & (tl.load(mask + places, mask=seen & (t < T) & (j < S), other=0) != 0)
    return seen


@triton.jit
def weigh_values(
    k,
    v,
    e,
    r,
    penalty,
    values,
    weights,
    k_b,
    k_j,
    v_b,
    v_j,
    e_n,
    S,
    scale,
    SPREAD: tl.constexpr,
    LARGEST: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """What the heads make of every key, in no query's presence: r_ij, w_ij = exp(r_ij) and w_ij·v_j.

    A key whose r is beyond ±SPREAD octaves for any head, or whose value is beyond LARGEST, is *unsafe*: a product of
    two exponentials may leave the dtype's range. It gets weight 0 here and a penalty of -inf; the other kernels add it
    head by head.

    Args:
        r: (B, n, S) float32, written: scale·e_i·k_j.
        penalty: (B, S) float32, written: 0, or -inf for an unsafe key.
        values: (B, S, n, d), written: w_ij·v_j.
        weights: (B, S, groups, SLOTS), zero before, written: of the group's heads w rounded, the remainder, w rounded
            again. Two parts, so that sums of weights are about as exact as if they were not rounded; the third meets
            the remainder of the other factor in the backward pass.
    """
    j0 = tl.program_id(0) * KEYS
    b = tl.program_id(1).to(tl.int64)
    j = j0 + tl.arange(0, KEYS)
    c = tl.arange(0, DIM)
    real = j < S
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    k_tile = load_rows(k + b * k_b, j0, k_j, S, HEAD_DIM, KEYS, DIM).to(tl.float32)
    v_tile = load_rows(v + b * v_b, j0, v_j, S, HEAD_DIM, KEYS, DIM).to(tl.float32)
    safe = tl.max(tl.abs(v_tile), axis=1) <= LARGEST
    for i in range(HEADS):
        e_i = tl.load(e + i * e_n + c, mask=c < HEAD_DIM, other=0.0).to(tl.float32)
        r_i = tl.sum(k_tile * e_i[None, :], axis=1) * scale
        tl.store(r + (b * HEADS + i) * S + j, r_i, mask=real)
        safe = safe & (tl.abs(r_i) * OCTAVES <= SPREAD)
    tl.store(penalty + b * S + j, tl.where(safe, 0.0, float("-inf")), mask=real)
    rows = b * S + j.to(tl.int64)
    for i in range(HEADS):
        e_i = tl.load(e + i * e_n + c, mask=c < HEAD_DIM, other=0.0).to(tl.float32)
        r_i = tl.sum(k_tile * e_i[None, :], axis=1) * scale
        w_i = tl.where(safe, tl.exp2(r_i * OCTAVES), 0.0)
        # where, since an unsafe key's value may be infinite in float32 times anything
        product = tl.where(safe[:, None], w_i[:, None] * v_tile, 0.0)
        places = (rows * (HEADS * HEAD_DIM) + i * HEAD_DIM)[:, None] + c[None, :]
        tl.store(values + places, product.to(values.dtype.element_ty), mask=real[:, None] & (c < HEAD_DIM)[None, :])
        rounded = w_i.to(weights.dtype.element_ty)
        slot = weights + (rows * groups + i // GROUP) * SLOTS + i % GROUP
        tl.store(slot, rounded, mask=real)
        tl.store(slot + GROUP, (w_i - rounded.to(tl.float32)).to(weights.dtype.element_ty), mask=real)
        tl.store(slot + 2 * GROUP, rounded, mask=real)
