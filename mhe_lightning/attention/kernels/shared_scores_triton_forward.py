"""The forward kernel of shared-score MHE-ADD: one tile of exponentials feeds every head of a group."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from mhe_lightning.attention.kernels.shared_scores_triton_common import group_columns, load_group, load_rows, visible


@triton.jit
def _attend(
    acc,
    z,
    m,
    worst,
    q_tile,
    k,
    penalty,
    values,
    weights,
    mask,
    k_j,
    mask_t,
    mask_j,
    t,
    start,
    end,
    group,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PARTLY: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Tiles of keys from ``start`` to ``end`` (PARTLY: some pairs in them are not visible) for all heads of a group."""
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    for j0 in range(start, end, KEYS):
        j = j0 + tl.arange(0, KEYS)
        k_tile = load_rows(k, j0, k_j, S, HEAD_DIM, KEYS, DIM)
        # keys beyond S count as unsafe here: neither enters a maximum
        unsafe = tl.load(penalty + j, mask=j < S, other=float("-inf"))
        worst = tl.minimum(worst, tl.where(j < S, unsafe, 0.0))
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale + unsafe[None, :]  # (ROWS, KEYS)
        if PARTLY:
            seen = visible(t[:, None], j[None, :], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK)
            s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, axis=1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink = tl.exp2(m - shift)
        E = tl.exp2(s - shift[:, None]).to(values.dtype.element_ty)
        value_tile = load_group(values, j0, S, group, HEADS, HEAD_DIM, GROUP, KEYS, DIM)
        weight_tile = load_rows(weights + group * SLOTS, j0, groups * SLOTS, S, SLOTS, KEYS, SLOTS)
        acc = tl.dot(E, value_tile, acc * shrink[:, None], input_precision="ieee")
        z = tl.dot(E, weight_tile, z * shrink[:, None], input_precision="ieee")
        m = new_m
    return acc, z, m, worst


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
    full = S
    if CAUSAL:
        end = tl.minimum(S, t0 + ROWS)
        full = tl.minimum(S, (t0 + 1) // KEYS * KEYS)
    if HAS_MASK:
        full = 0
    acc = tl.zeros((ROWS, GROUP * DIM), tl.float32)
    z = tl.zeros((ROWS, SLOTS), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    worst = tl.zeros((KEYS,), tl.float32)
    acc, z, m, worst = _attend(
        acc, z, m, worst, q_tile, k, penalty, values, weights, mask, k_j, mask_t, mask_j, t, 0, full, group, T, S, scale,
        CAUSAL, HAS_MASK, False, HEADS, HEAD_DIM, GROUP, SLOTS, KEYS, DIM,
    )  # fmt: skip
    acc, z, m, worst = _attend(
        acc, z, m, worst, q_tile, k, penalty, values, weights, mask, k_j, mask_t, mask_j, t, full, end, group, T, S, scale,
        CAUSAL, HAS_MASK, True, HEADS, HEAD_DIM, GROUP, SLOTS, KEYS, DIM,
    )  # fmt: skip

    member, place, real = group_columns(group, HEADS, HEAD_DIM, GROUP, DIM)
    slot = tl.arange(0, SLOTS)
    # the sum of the two parts of each weight, in the first slot of each head; and each head's unit, 2^unit
    for i in tl.static_range(GROUP):
        part = tl.sum(tl.where((slot == GROUP + i)[None, :], z, 0.0), axis=1)
        z = tl.where((slot == i)[None, :], z + part[:, None], z)
    unit = tl.zeros((ROWS, SLOTS), tl.float32) + m[:, None]
    if tl.min(worst, axis=0) < 0.0:
        for j0 in range(0, end, KEYS):
            j = j0 + tl.arange(0, KEYS)
            unsafe = tl.load(penalty + j, mask=j < S, other=0.0) < 0.0
            if tl.max(unsafe.to(tl.int32), axis=0) > 0:
                k_tile = load_rows(k, j0, k_j, S, HEAD_DIM, KEYS, DIM)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
                seen = visible(t[:, None], j[None, :], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK) & unsafe[None, :]
                for i in range(GROUP):
                    head = group * GROUP + i
                    r_i = tl.load(r + tl.cast(head, tl.int64) * S + j, mask=j < tl.where(head < HEADS, S, 0), other=0.0)
                    x = tl.where(seen, s + r_i[None, :], float("-inf"))
                    here = (slot == i)[None, :]
                    old = tl.max(tl.where(here, unit, float("-inf")), axis=1)
                    new = tl.maximum(old, tl.max(x, axis=1))
                    shift = tl.where(new == float("-inf"), 0.0, new)
                    shrink = tl.exp2(old - shift)
                    p = tl.exp2(x - shift[:, None])
                    own = member == i
                    pointers = v + tl.cast(j0, tl.int64) * v_j + (j - j0)[:, None] * v_j + (place - head * HEAD_DIM)[None, :]
                    v_tile = tl.load(pointers, mask=(j < S)[:, None] & (own & real)[None, :], other=0.0)
                    acc = acc * tl.where(own[None, :], shrink[:, None], 1.0)
                    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
                    z = tl.where(here, z * shrink[:, None] + tl.sum(p, axis=1)[:, None], z)
                    unit = tl.where(here, new[:, None], unit)

    inverse = tl.zeros((ROWS, GROUP * DIM), tl.float32)
    for i in tl.static_range(GROUP):
        here = (slot == i)[None, :]
        z_i = tl.sum(tl.where(here, z, 0.0), axis=1)
        unit_i = tl.max(tl.where(here, unit, float("-inf")), axis=1)
        inverse = tl.where((member == i)[None, :], tl.where(z_i > 0, 1.0 / z_i, 0.0)[:, None], inverse)
        head = group * GROUP + i
        # ln 2: back from octaves
        logs = tl.where(z_i > 0, (unit_i + tl.log2(z_i)) * 0.6931471805599453, float("-inf"))
        tl.store(normalizer + (b * HEADS + head) * T + t, logs, mask=t < tl.where(head < HEADS, T, 0))
    places = (b * T + t.to(tl.int64))[:, None] * (HEADS * HEAD_DIM) + place[None, :]
    tl.store(heads + places, (acc * inverse).to(heads.dtype.element_ty), mask=(t < T)[:, None] & real[None, :])
