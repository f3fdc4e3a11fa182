"""The forward kernel of shared-score MHE-ADD: one tile of exponentials feeds every head of a group."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from mhe_lightning.attention.kernels.shared_scores_triton_common import (
    OCTAVES,
    group_columns,
    load_group,
    load_rows,
    visible,
)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    r,
    penalty,
    values,
    weights,
    mask,
    heads,
    normalizer,
    q_b,
    q_t,
    k_b,
    k_j,
    v_b,
    v_j,
    mask_b,
    mask_t,
    mask_j,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """One group of heads for one tile of queries: H_i = E (w_i ⊙ v) / (E w_i), E with a running row maximum."""
    group = tl.program_id(0)
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile  # rows with the most keys start first
    b = tl.program_id(2).to(tl.int64)
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    t0 = tile * ROWS
    t = t0 + tl.arange(0, ROWS)
    k += b * k_b
    v += b * v_b
    r += b * HEADS * S
    penalty += b * S
    values += b * S * (HEADS * HEAD_DIM)
    weights += b * S * (groups * SLOTS)
    mask += b * mask_b
    q_tile = load_rows(q + b * q_b, t0, q_t, T, HEAD_DIM, ROWS, DIM)

    end = S
    if CAUSAL:
        end = tl.minimum(S, t0 + ROWS)
    acc = tl.zeros((ROWS, GROUP * DIM), tl.float32)
    sums = tl.zeros((ROWS, SLOTS), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    worst = tl.zeros((KEYS,), tl.float32)
    # One loop: with a second one, for the tiles that all rows see wholly, the compiler waits after every product.
    for j0 in range(0, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k_tile = load_rows(k, j0, k_j, S, HEAD_DIM, KEYS, DIM)
        # keys beyond S count as unsafe here: neither enters a maximum
        unsafe = tl.load(penalty + j, mask=j < S, other=float("-inf"))
        worst = tl.minimum(worst, tl.where(j < S, unsafe, 0.0))
        s = (
            tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * OCTAVES) + unsafe[None, :]
        )  # (ROWS, KEYS)
        if CAUSAL or HAS_MASK:
            seen = visible(t[:, None], j[None, :], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK)
            s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        reference = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink = tl.exp2(m - reference)
        E = tl.exp2(s - reference[:, None]).to(values.dtype.element_ty)
        value_tile = load_group(values, j0, S, group, HEADS, HEAD_DIM, GROUP, KEYS, DIM)
        weight_tile = load_rows(weights + group * SLOTS, j0, groups * SLOTS, S, SLOTS, KEYS, SLOTS)
        sums = tl.dot(E, weight_tile, sums * shrink[:, None], input_precision="ieee")
        acc = tl.dot(E, value_tile, acc * shrink[:, None], input_precision="ieee")
        m = new_m

    member, place, real = group_columns(group, HEADS, HEAD_DIM, GROUP, DIM)
    own = tl.arange(0, GROUP)
    # z_i: the sum over both parts of the weights. From here on each head has its own unit, exp(unit)
    part = tl.arange(0, SLOTS // GROUP)
    z = tl.sum(tl.where((part < 2)[None, :, None], tl.reshape(sums, (ROWS, SLOTS // GROUP, GROUP)), 0.0), axis=1)
    unit = tl.zeros((ROWS, GROUP), tl.float32) + (m / OCTAVES)[:, None]
    if tl.min(worst, axis=0) < 0.0:
        for j0 in range(0, end, KEYS):
            j = j0 + tl.arange(0, KEYS)
            apart = tl.load(penalty + j, mask=j < S, other=0.0) < 0.0
            if tl.max(apart.to(tl.int32), axis=0) > 0:
                k_tile = load_rows(k, j0, k_j, S, HEAD_DIM, KEYS, DIM)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
                seen = visible(t[:, None], j[None, :], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK) & apart[None, :]
                for h in range(GROUP):
                    head = group * GROUP + h
                    r_h = tl.load(r + tl.cast(head, tl.int64) * S + j, mask=j < tl.where(head < HEADS, S, 0), other=0.0)
                    x = tl.where(seen, s + r_h[None, :], float("-inf"))
                    here = (own == h)[None, :]
                    old = tl.max(tl.where(here, unit, float("-inf")), axis=1)
                    new = tl.maximum(old, tl.max(x, axis=1))
                    reference = tl.where(new == float("-inf"), 0.0, new)
                    shrink = tl.exp(old - reference)
                    p = tl.exp(x - reference[:, None])
                    # the head's columns of a group-wide product, so that the sums stay where they are
                    columns = (member == h) & real
                    pointers = v + tl.cast(j0, tl.int64) * v_j + (j - j0)[:, None] * v_j
                    pointers += (place - head * HEAD_DIM)[None, :]
                    v_tile = tl.load(pointers, mask=(j < S)[:, None] & columns[None, :], other=0.0)
                    acc = acc * tl.where(columns[None, :], shrink[:, None], 1.0)
                    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
                    z = tl.where(here, z * shrink[:, None] + tl.sum(p, axis=1)[:, None], z)
                    unit = tl.where(here, new[:, None], unit)

    some = z > 0.0
    z = tl.where(some, z, 1.0)
    head = group * GROUP + own
    there = (t < T)[:, None] & (head < HEADS)[None, :]
    logs = tl.where(some, unit + tl.log(z), float("-inf"))
    tl.store(normalizer + (b * HEADS + head)[None, :] * T + t[:, None], logs, mask=there)
    result = tl.reshape(acc, (ROWS, GROUP, DIM)) * tl.where(some, 1.0 / z, 0.0)[:, :, None]
    c = tl.arange(0, DIM)
    places = ((b * T + t.to(tl.int64))[:, None] * HEADS + head[None, :])[:, :, None] * HEAD_DIM + c[None, None, :]
    result = result.to(heads.dtype.element_ty)
    tl.store(heads + places, result, mask=there[:, :, None] & (c < HEAD_DIM)[None, None, :])
