"""The literal equations of every attention variant, head by head, and the table of variants that is tested.

Only the modules' parameters are shared with the package, so that the gradients of both can be compared.
A new variant is tested by one new row in ``VARIANTS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mhe_lightning.attention import GQA, MHA, MHE, MQA, SHA, SKV, Attention, ELAttention

Heads = Iterable[tuple[Tensor, Tensor, Tensor]]


def project(linear: nn.Linear, x: Tensor, i: int, d: int) -> Tensor:
    """The i-th block of d outputs of a projection."""
    y = x @ linear.weight[i * d : (i + 1) * d].T
    return y if linear.bias is None else y + linear.bias[i * d : (i + 1) * d]


def grouped_heads(m: Attention, x: Tensor, c: Tensor, groups: int) -> Heads:
    """Q_i of its own; K and V of head i's group."""
    d = m.head_dim
    for i in range(m.n_heads):
        j = i // (m.n_heads // groups)
        yield project(m.w_q, x, i, d), project(m.w_k, c, j, d), project(m.w_v, c, j, d)


def single_head(m: Attention, x: Tensor, c: Tensor) -> Heads:
    d = m.head_dim
    for _ in range(m.n_heads):
        yield project(m.w_q, x, 0, d), project(m.w_k, c, 0, d), project(m.w_v, c, 0, d)


def added_heads(m: Attention, x: Tensor, c: Tensor) -> Heads:
    for i, (q, k, v) in enumerate(single_head(m, x, c)):
        yield q + m.e_q[i], k + m.e_k[i], v + m.e_v[i]


def multiplied_heads(m: Attention, x: Tensor, c: Tensor) -> Heads:
    for i, (q, k, v) in enumerate(single_head(m, x, c)):
        yield q * (1 + m.e_q[i]), k * (1 + m.e_k[i]), v * (1 + m.e_v[i])


def shared_kv_heads(m: Attention, x: Tensor, c: Tensor) -> Heads:
    d = m.head_dim
    for i in range(m.n_heads):
        kv = project(m.w_kv, c, i, d)
        yield project(m.w_q, x, i, d), kv, kv


def context_heads(m: Attention, x: Tensor, c: Tensor) -> Heads:
    d = m.head_dim
    for i in range(m.n_heads):
        kv = c[..., i * d : (i + 1) * d]
        yield project(m.w_q, x, i, d), kv, kv


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        build: makes the module from ``width``, ``n_heads``, ``dropout`` and ``bias``.
        heads: the literal (Q_i, K_i, V_i) of every head, from the module, the input and the context.
        parameters: number of parameters besides W_O without biases, from n and d.
        cached: numbers that a KV cache holds per token, from n and d.
        heads_divisor: the number of heads must be a multiple of this.
        empty: what head i gives to a query that may attend to nothing, if not zero.
        dead: parameters that the output cannot depend on: their gradients are exactly zero.
    """

    build: Callable[..., Attention]
    heads: Callable[[Attention, Tensor, Tensor], Heads]
    parameters: Callable[[int, int], int]
    cached: Callable[[int, int], int]
    heads_divisor: int = 1
    empty: Callable[[Attention, int], Tensor] | None = None
    dead: tuple[str, ...] = ()


VARIANTS = {
    "mha": Variant(
        MHA,
        lambda m, x, c: grouped_heads(m, x, c, groups=m.n_heads),
        parameters=lambda n, d: 3 * n**2 * d**2,
        cached=lambda n, d: 2 * n * d,
    ),
    "sha": Variant(SHA, single_head, parameters=lambda n, d: 3 * n * d**2, cached=lambda n, d: 2 * d),
    "mhe_add": Variant(
        partial(MHE, combine="add"),
        added_heads,
        parameters=lambda n, d: 3 * n * d**2 + 3 * n * d,
        cached=lambda n, d: 2 * d,
        empty=lambda m, i: m.e_v[i],
        dead=("e_k",),
    ),
    "mhe_add_shared_scores": Variant(
        partial(MHE, combine="add", form="shared_scores"),
        added_heads,
        parameters=lambda n, d: 3 * n * d**2 + 3 * n * d,
        cached=lambda n, d: 2 * d,
        empty=lambda m, i: m.e_v[i],
        dead=("e_k",),
    ),
    "mhe_multiply": Variant(
        partial(MHE, combine="multiply"),
        multiplied_heads,
        parameters=lambda n, d: 3 * n * d**2 + 3 * n * d,
        cached=lambda n, d: 2 * d,
    ),
    "mqa": Variant(
        MQA,
        lambda m, x, c: grouped_heads(m, x, c, groups=1),
        parameters=lambda n, d: n**2 * d**2 + 2 * n * d**2,
        cached=lambda n, d: 2 * d,
    ),
    "gqa2": Variant(
        partial(GQA, n_kv_heads=2),
        lambda m, x, c: grouped_heads(m, x, c, groups=2),
        parameters=lambda n, d: n**2 * d**2 + 4 * n * d**2,
        cached=lambda n, d: 4 * d,
        heads_divisor=2,
    ),
    "skv": Variant(SKV, shared_kv_heads, parameters=lambda n, d: 2 * n**2 * d**2, cached=lambda n, d: n * d),
    "el": Variant(ELAttention, context_heads, parameters=lambda n, d: n**2 * d**2, cached=lambda n, d: n * d),
}


def literal(
    variant: Variant,
    m: Attention,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The output of ``m`` by the equations: a loop over heads, an explicit softmax, no dropout."""
    c = x if context is None else context
    B, T, S = x.shape[0], x.shape[1], c.shape[1]
    allowed = torch.ones(B, m.n_heads, T, S, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & mask
    if is_causal:
        allowed = allowed & (torch.arange(T)[:, None] >= torch.arange(S)[None, :])
    outputs = []
    for i, (q, k, v) in enumerate(variant.heads(m, x, c)):
        sees = allowed[:, i].any(-1, keepdim=True)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(m.head_dim)).masked_fill(~allowed[:, i], -math.inf)
        weights = torch.softmax(torch.where(sees, scores, 0.0), dim=-1)
        h = torch.where(sees, weights, 0.0) @ v
        if variant.empty is not None:
            h = torch.where(sees, h, variant.empty(m, i))
        outputs.append(h)
    y = torch.cat(outputs, dim=-1) @ m.w_o.weight.T
    return y if m.w_o.bias is None else y + m.w_o.bias


def build(variant: Variant, n: int = 4, d: int = 3, dtype: torch.dtype = torch.float64, **kwargs) -> Attention:
    """A module whose head embeddings and biases are of size one, so that they matter."""
    m = variant.build(width=n * d, n_heads=n, **kwargs).to(dtype)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.startswith("e_") or name.endswith("bias"):
                p.normal_()
    return m


def gradients(m: Attention, y: Tensor, cotangent: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of ``(y · cotangent)`` for the inputs and every parameter, by name; an absent one raises."""
    names = [f"input {i}" for i in range(len(inputs))] + [name for name, _ in m.named_parameters()]
    return dict(zip(names, torch.autograd.grad(y, [*inputs, *m.parameters()], cotangent), strict=True))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, what: str = "output") -> None:
    """Equal shapes, and no difference above ``tolerance`` times the largest expected value (or 1)."""
    assert actual.shape == expected.shape, what
    scale = max(expected.abs().max().item(), 1.0)
    assert (actual - expected).abs().max().item() <= tolerance * scale, what
