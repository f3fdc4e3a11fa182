"""The backward kernels of shared-score MHE-ADD.

With ``p_tij = exp(s_tj + r_ij − L_ti)`` (L is the normalizer) and ``D_ti = dH_ti·H_ti``:

* ``ds_tj = Σ_i p_tij (dH_ti·v_j − D_ti)``, then ``dq = scale·ds k`` and ``dk = scale·(dsᵀ q + drᵀ e)``
* ``dr_ij = Σ_t p_tij (dH_ti·v_j − D_ti)``, then ``de = scale·dr k``
* ``dv_j = Σ_ti p_tij dH_ti``

For safe keys ``p_tij = E_tj·w_ij·c_ti`` with ``E = exp(s − u)``, ``w = exp(r)``, ``c = exp(u − L)`` and
``u_t = min_i L_ti``: then ``c ≤ 1``, and ``E ≤ 1/w`` for the head of the minimum, so nothing overflows, and what
underflows is negligible beside a row sum of 1. All heads share E: ``ds = E ⊙ ([c·dH | −c·D] @ [w·v | w]ᵀ)``, one
product of width n·d, and ``Eᵀ @ [c·dH | −c·D]`` gives dv and dr. Unsafe keys (see ``weigh_values``) are added head by
head.

No atomic operation: equal inputs give equal bits.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from mhe_lightning.attention.kernels.shared_scores_triton_common import OCTAVES, load_group, load_rows, visible


@triton.jit
def scale_gradients(
    heads,
    grad,
    normalizer,
    scaled,
    sums,
    dots,
    shift,
    grad_b,
    grad_t,
    grad_n,
    T,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
):
    """What every query's row needs, in no key's presence.

    Args:
        scaled: (B, T, n, d), written: c_ti·dH_ti.
        sums: (B, T, groups, SLOTS), zero before, written: of the group's heads −c·D rounded, the same again, and the
            remainder; against the slots of ``weights`` this is the product of two numbers of two parts each.
        dots: (B, n, T) float32, written: D_ti.
        shift: (B, T) float32, written: u_t in octaves; 0 for a row without a visible key, whose c is 0.
    """
    t0 = tl.program_id(0) * ROWS
    b = tl.program_id(1).to(tl.int64)
    t = t0 + tl.arange(0, ROWS)
    c = tl.arange(0, DIM)
    i_all = tl.arange(0, PADDED_HEADS)
    real = t < T
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    normalizer += b * HEADS * T
    every = tl.load(
        normalizer + i_all[None, :].to(tl.int64) * T + t[:, None],
        mask=real[:, None] & (i_all < HEADS)[None, :],
        other=float("inf"),
    )
    u = tl.min(every, axis=1) * OCTAVES
    sees = real & (u > float("-inf"))
    u = tl.where(sees, u, 0.0)
    tl.store(shift + b * T + t, u, mask=real)
    rows = b * T + t.to(tl.int64)
    for i in range(HEADS):
        places = (rows * (HEADS * HEAD_DIM) + i * HEAD_DIM)[:, None] + c[None, :]
        h = tl.load(heads + places, mask=real[:, None] & (c < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
        dh = load_rows(grad + b * grad_b + i * grad_n, t0, grad_t, T, HEAD_DIM, ROWS, DIM).to(tl.float32)
        D = tl.sum(h * dh, axis=1)
        tl.store(dots + (b * HEADS + i) * T + t, D, mask=real)
        L = tl.load(normalizer + tl.cast(i, tl.int64) * T + t, mask=real, other=0.0) * OCTAVES
        factor = tl.where(sees, tl.exp2(u - tl.where(sees, L, 0.0)), 0.0)
        tl.store(
            scaled + places,
            (factor[:, None] * dh).to(scaled.dtype.element_ty),
            mask=real[:, None] & (c < HEAD_DIM)[None, :],
        )
        total = -factor * D
        rounded = total.to(sums.dtype.element_ty)
        slot = sums + (rows * groups + i // GROUP) * SLOTS + i % GROUP
        tl.store(slot, rounded, mask=real)
        tl.store(slot + GROUP, rounded, mask=real)
        tl.store(slot + 2 * GROUP, (total - rounded.to(tl.float32)).to(sums.dtype.element_ty), mask=real)


@triton.jit
def key_gradients(
    q,
    k,
    v,
    r,
    penalty,
    mask,
    grad,
    normalizer,
    scaled,
    sums,
    dots,
    shift,
    dr,
    dv,
    q_b,
    q_t,
    k_b,
    k_j,
    v_b,
    v_j,
    grad_b,
    grad_t,
    grad_n,
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
    """For one tile of keys and one group of heads: dr (B, n, S), and the group's part of dv (B, groups, S, d)."""
    group = tl.program_id(0)
    j0 = tl.program_id(1) * KEYS
    b = tl.program_id(2).to(tl.int64)
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    j = j0 + tl.arange(0, KEYS)
    q += b * q_b
    mask += b * mask_b
    grad += b * grad_b
    scaled += b * T * (HEADS * HEAD_DIM)
    sums += b * T * (groups * SLOTS)
    shift += b * T
    r += b * HEADS * S
    dr += b * HEADS * S
    dots += b * HEADS * T
    normalizer += b * HEADS * T
    k_tile = load_rows(k + b * k_b, j0, k_j, S, HEAD_DIM, KEYS, DIM)
    unsafe = tl.load(penalty + b * S + j, mask=j < S, other=float("-inf"))

    start = 0
    if CAUSAL:
        start = tl.minimum(T, j0 // ROWS * ROWS)
    dw = tl.zeros((KEYS, GROUP * DIM), tl.float32)
    dz = tl.zeros((KEYS, SLOTS), tl.float32)
    for t0 in range(start, T, ROWS):
        t = t0 + tl.arange(0, ROWS)
        q_tile = load_rows(q, t0, q_t, T, HEAD_DIM, ROWS, DIM)
        u = tl.load(shift + t, mask=t < T, other=0.0)
        s = (
            tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * (scale * OCTAVES) + unsafe[:, None]
        )  # (KEYS, ROWS)
        E = tl.exp2(s - u[None, :])
        if CAUSAL or HAS_MASK:
            E = tl.where(visible(t[None, :], j[:, None], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK), E, 0.0)
        E = E.to(scaled.dtype.element_ty)
        gradient_tile = load_group(scaled, t0, T, group, HEADS, HEAD_DIM, GROUP, ROWS, DIM)
        sum_tile = load_rows(sums + group * SLOTS, t0, groups * SLOTS, T, SLOTS, ROWS, SLOTS)
        dz = tl.dot(E, sum_tile, dz, input_precision="ieee")
        dw = tl.dot(E, gradient_tile, dw, input_precision="ieee")

    c = tl.arange(0, DIM)
    head = group * GROUP + tl.arange(0, GROUP)
    safe = unsafe == 0.0
    there = safe[:, None] & (head < HEADS)[None, :]
    places = head.to(tl.int64)[None, :] * S + j[:, None]
    w = tl.where(there, tl.exp2(tl.load(r + places, mask=there, other=0.0) * OCTAVES), 0.0)  # (KEYS, GROUP)
    own = load_rows(v + b * v_b, j0, v_j, S, HEAD_DIM, KEYS, DIM)
    by_head = tl.reshape(dw, (KEYS, GROUP, DIM))
    # what met −c·D and its remainder
    part = tl.arange(0, SLOTS // GROUP)
    met = ((part == 0) | (part == 2))[None, :, None]
    total = tl.sum(tl.where(met, tl.reshape(dz, (KEYS, SLOTS // GROUP, GROUP)), 0.0), axis=1)
    total += tl.sum(by_head * own.to(tl.float32)[:, None, :], axis=2)
    tl.store(dr + places, w * total, mask=there)
    dv_tile = tl.sum(by_head * w[:, :, None], axis=1)

    apart = (j < S) & (unsafe < 0.0)
    if tl.max(apart.to(tl.int32), axis=0) > 0:
        for h in range(GROUP):
            one = group * GROUP + h
            if one < HEADS:
                row = tl.cast(one, tl.int64)
                r_h = tl.load(r + row * S + j, mask=j < S, other=0.0)
                dr_h = tl.zeros((KEYS,), tl.float32)
                for t0 in range(start, T, ROWS):
                    t = t0 + tl.arange(0, ROWS)
                    q_tile = load_rows(q, t0, q_t, T, HEAD_DIM, ROWS, DIM)
                    dh = load_rows(grad + row * grad_n, t0, grad_t, T, HEAD_DIM, ROWS, DIM)
                    L = tl.load(normalizer + row * T + t, mask=t < T, other=0.0)
                    D = tl.load(dots + row * T + t, mask=t < T, other=0.0)
                    seen = visible(t[None, :], j[:, None], mask, mask_t, mask_j, T, S, CAUSAL, HAS_MASK)
                    seen = seen & apart[:, None] & (t < T)[None, :]
                    s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
                    # a probability, whatever rounding makes of large scores
                    p = tl.where(seen, tl.exp(tl.minimum(s + r_h[:, None] - L[None, :], 0.0)), 0.0)
                    dp = tl.dot(own, tl.trans(dh), input_precision="ieee") - D[None, :]
                    dv_tile = tl.dot(p.to(dh.dtype), dh, dv_tile, input_precision="ieee")
                    dr_h += tl.sum(tl.where(seen, p * dp, 0.0), axis=1)
                tl.store(dr + row * S + j, dr_h, mask=apart)
    places = ((b * groups + group) * S + j.to(tl.int64))[:, None] * HEAD_DIM + c[None, :]
    tl.store(dv + places, dv_tile, mask=(j < S)[:, None] & (c < HEAD_DIM)[None, :])


@triton.jit
def score_gradients(
    q,
    k,
    v,
    r,
    penalty,
    values,
    weights,
    mask,
    grad,
    normalizer,
    scaled,
    sums,
    dots,
    shift,
    ds,
    q_b,
    q_t,
    k_b,
    k_j,
    v_b,
    v_j,
    grad_b,
    grad_t,
    grad_n,
    mask_b,
    mask_t,
    mask_j,
    first,
    ds_b,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    EDGE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
):
    """One tile of ds for the queries from ``first`` on; all heads are one product of width n·d.

    Args:
        ds: (B, queries of this part, S), written; with ``CAUSAL``, tiles that nobody sees are left as they are.
    """
    j0 = tl.program_id(0) * EDGE
    local = tl.program_id(1) * EDGE
    b = tl.program_id(2).to(tl.int64)
    t0 = first + local
    if CAUSAL and t0 + EDGE <= j0:
        return
    width: tl.constexpr = HEADS * HEAD_DIM
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    t = t0 + tl.arange(0, EDGE)
    j = j0 + tl.arange(0, EDGE)
    scaled += b * T * width
    values += b * S * width
    sums += b * T * (groups * SLOTS)
    weights += b * S * (groups * SLOTS)
    product = tl.zeros((EDGE, EDGE), tl.float32)
    for c0 in range(0, width, CHUNK):
        c = c0 + tl.arange(0, CHUNK)
        i = tl.arange(0, EDGE)
        left = scaled + tl.cast(t0, tl.int64) * width + i[:, None] * width + c[None, :]
        right = values + tl.cast(j0, tl.int64) * width + i[:, None] * width + c[None, :]
        left_tile = tl.load(left, mask=(t < T)[:, None] & (c < width)[None, :], other=0.0)
        right_tile = tl.load(right, mask=(j < S)[:, None] & (c < width)[None, :], other=0.0)
        product = tl.dot(left_tile, tl.trans(right_tile), product, input_precision="ieee")
    for g in range(groups):
        left_tile = load_rows(sums + g * SLOTS, t0, groups * SLOTS, T, SLOTS, EDGE, SLOTS)
        right_tile = load_rows(weights + g * SLOTS, j0, groups * SLOTS, S, SLOTS, EDGE, SLOTS)
        product = tl.dot(left_tile, tl.trans(right_tile), product, input_precision="ieee")

    q_tile = load_rows(q + b * q_b, t0, q_t, T, HEAD_DIM, EDGE, DIM)
    k_tile = load_rows(k + b * k_b, j0, k_j, S, HEAD_DIM, EDGE, DIM)
    unsafe = tl.load(penalty + b * S + j, mask=j < S, other=float("-inf"))
    u = tl.load(shift + b * T + t, mask=t < T, other=0.0)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    seen = visible(t[:, None], j[None, :], mask + b * mask_b, mask_t, mask_j, T, S, CAUSAL, HAS_MASK)
    result = tl.where(seen, tl.exp2(s * OCTAVES + unsafe[None, :] - u[:, None]) * product, 0.0)

    apart = (j < S) & (unsafe < 0.0)
    if tl.max(apart.to(tl.int32), axis=0) > 0:
        v_tile = load_rows(v + b * v_b, j0, v_j, S, HEAD_DIM, EDGE, DIM)
        seen = seen & apart[None, :]
        for i in range(HEADS):
            row = b * HEADS + i
            r_i = tl.load(r + row * S + j, mask=j < S, other=0.0)
            L = tl.load(normalizer + row * T + t, mask=t < T, other=0.0)
            D = tl.load(dots + row * T + t, mask=t < T, other=0.0)
            dh = load_rows(grad + b * grad_b + i * grad_n, t0, grad_t, T, HEAD_DIM, EDGE, DIM)
            p = tl.exp(tl.minimum(s + r_i[None, :] - L[:, None], 0.0))
            dp = tl.dot(dh, tl.trans(v_tile), input_precision="ieee") - D[:, None]
            result += tl.where(seen, p * dp, 0.0)
    places = (tl.arange(0, EDGE) + tl.cast(local, tl.int64))[:, None] * S + j[None, :]
    tl.store(ds + b * ds_b + places, result.to(ds.dtype.element_ty), mask=(t < T)[:, None] & (j < S)[None, :])


@triton.jit
def query_products(
    ds,
    k,
    dq,
    k_b,
    k_j,
    first,
    ds_b,
    T,
    S,
    scale,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
):
    """dq = scale·ds k for one tile of the queries from ``first`` on."""
    local = tl.program_id(0) * EDGE
    b = tl.program_id(1).to(tl.int64)
    t0 = first + local
    t = t0 + tl.arange(0, EDGE)
    c = tl.arange(0, DIM)
    end = S
    if CAUSAL:
        end = tl.minimum(S, t0 + EDGE)
    acc = tl.zeros((EDGE, DIM), tl.float32)
    for j0 in range(0, end, EDGE):
        j = j0 + tl.arange(0, EDGE)
        pointers = ds + b * ds_b + (tl.arange(0, EDGE) + tl.cast(local, tl.int64))[:, None] * S + j[None, :]
        ds_tile = tl.load(pointers, mask=(t < T)[:, None] & (j < S)[None, :], other=0.0)
        k_tile = load_rows(k + b * k_b, j0, k_j, S, HEAD_DIM, EDGE, DIM)
        acc = tl.dot(ds_tile, k_tile, acc, input_precision="ieee")
    places = (b * T + t.to(tl.int64))[:, None] * HEAD_DIM + c[None, :]
    tl.store(dq + places, (acc * scale).to(dq.dtype.element_ty), mask=(t < T)[:, None] & (c < HEAD_DIM)[None, :])


@triton.jit
def key_products(
    ds,
    q,
    dk,
    q_b,
    q_t,
    first,
    end,
    ds_b,
    T,
    S,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
):
    """dk += dsᵀ q for one tile of keys and the queries from ``first`` to ``end``; dk (B, S, d) float32."""
    j0 = tl.program_id(0) * EDGE
    b = tl.program_id(1).to(tl.int64)
    j = j0 + tl.arange(0, EDGE)
    c = tl.arange(0, DIM)
    start = first
    if CAUSAL:
        start = tl.maximum(first, j0 // EDGE * EDGE)
    places = (b * S + j.to(tl.int64))[:, None] * HEAD_DIM + c[None, :]
    there = (j < S)[:, None] & (c < HEAD_DIM)[None, :]
    acc = tl.load(dk + places, mask=there, other=0.0)
    for t0 in range(start, end, EDGE):
        t = t0 + tl.arange(0, EDGE)
        pointers = ds + b * ds_b + (t - first).to(tl.int64)[:, None] * S + j[None, :]
        ds_tile = tl.load(pointers, mask=(t < end)[:, None] & (j < S)[None, :], other=0.0)
        q_tile = load_rows(q + b * q_b, t0, q_t, T, HEAD_DIM, EDGE, DIM)
        acc = tl.dot(tl.trans(ds_tile), q_tile, acc, input_precision="ieee")
    tl.store(dk + places, acc, mask=there)
