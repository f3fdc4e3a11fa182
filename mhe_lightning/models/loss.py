"""The output projection and its cross-entropy, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a position that is not predicted."""

LINE = 64
"""Bytes of a line of a CPU's cache."""

NEAR = 1_000_000
"""Logits that a softmax on a CPU has in hand at once."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int = 512,
) -> Tensor:
    """Sum of ``cross_entropy(hidden @ weightᵀ + bias, targets)`` without ever holding the logits of all tokens.

    Logits live for one chunk at a time, all chunks in one place of memory, in float32 for the softmax; gradients are
    formed in the same pass, so that the product with ``weight`` is not repeated in the backward pass (unless that is
    asked for twice, with ``retain_graph``). Positions whose target is ``-100`` count for nothing: on a CPU they are
    left out before the product; elsewhere, where their number would have to be waited for, they go through it as
    zeros. First derivatives only.

    Args:
        hidden: (..., D).
        weight: (V, D).
        targets: (...), token ids, or -100 where nothing is predicted.
        bias: (V,).
        label_smoothing: probability mass spread evenly over the vocabulary, as in ``F.cross_entropy``.
        chunk_size: tokens per chunk; memory is chunk_size × V numbers.

    Returns:
        The loss in nats summed over the predicted tokens, a float32 scalar (float64 for float64 input).

    Raises:
        ValueError: ``label_smoothing`` is not in [0, 1) or ``chunk_size`` is below 1.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing ({label_smoothing}) must be in [0, 1); 0 switches it off")
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1; 512 is the default")
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    predicted, kept = targets != IGNORE, None
    if not _selects(hidden.device):
        hidden = hidden.masked_fill(~predicted[:, None], 0.0)  # whatever is there: no part of the weight's gradient
        kept = predicted
    elif not bool(predicted.all()):
        hidden, targets = hidden[predicted], targets[predicted]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, kept, label_smoothing, chunk_size, dtype)
    return loss


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_size: int = 512
) -> Tensor:
    """Cross-entropy in nats of every token, shaped as ``targets``; 0 where the target is -100. Without gradient."""
    return token_scores(hidden, weight, targets, bias=bias, chunk_size=chunk_size)[0]


@torch.no_grad()
def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_size: int = 512
) -> tuple[Tensor, Tensor]:
    """As `token_cross_entropy`, and whether each target is the likeliest token (False where it is -100)."""
    flat, flat_targets = hidden.flatten(0, -2), targets.flatten()
    losses, hits = [], []
    for h, t in zip(flat.split(chunk_size), flat_targets.split(chunk_size), strict=True):
        logits = _upcast(F.linear(h, weight, bias))
        losses.append(F.cross_entropy(logits, t, reduction="none", ignore_index=IGNORE))
        hits.append(logits.argmax(-1) == t)
    return torch.cat(losses).view_as(targets), torch.cat(hits).view_as(targets)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of the hidden states, the weight and the bias."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor | None,
        label_smoothing: float,
        chunk_size: int,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets, kept)
        ctx.options = label_smoothing, chunk_size, dtype, ctx.needs_input_grad[:3]
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        loss, ctx.gradients = _loss_and_gradients(hidden, weight, bias, targets, kept, *ctx.options)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None  # scaled where they lie, and given away
        if gradients is None:
            _, gradients = _loss_and_gradients(*ctx.saved_tensors, *ctx.options)
        found = (
            None if g is None else g.mul_(scale.to(g.dtype)).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None, None


@torch.no_grad()
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    kept: Tensor | None,
    label_smoothing: float,
    chunk_size: int,
    dtype: torch.dtype | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Gradients]:
    """The loss summed over the positions ``kept`` (all if None), and its gradients by what is wanted of hidden states
    (N, D), weight (V, D) and bias (V,); products are in ``dtype``, or their own if it is None."""
    h, w, b = (t if t is None or dtype is None else t.to(dtype) for t in (hidden, weight, bias))
    assert h is not None
    assert w is not None
    accumulator = _accumulator(h.dtype)
    d_h = torch.empty_like(h) if wanted[0] else None
    # summed over many chunks: in float32 even where the products are bf16
    d_w = torch.empty_like(weight, dtype=accumulator) if wanted[1] else None
    if d_w is not None and (d_w.dtype != h.dtype or not h.shape[0]):
        d_w.zero_()
    d_b = torch.zeros_like(bias, dtype=accumulator) if bias is not None and wanted[2] else None
    total = hidden.new_zeros((), dtype=accumulator)
    size = -(-h.shape[0] // max(1, -(-h.shape[0] // chunk_size)))  # chunks of one size, the least that are as few
    # a CPU's system takes long to hand over pages of so many numbers: the same ones serve all chunks; rows that begin
    # at lines of its cache make the product with the weight a sixth faster
    line = LINE // h.element_size() if h.is_cpu else 1
    logits = h.new_empty(size, -(-w.shape[0] // line) * line)[:, : w.shape[0]]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, h.shape[0], max(1, size)):
            part = slice(start, start + size)
            own, k = h[part], None if kept is None else kept[part]
            t = targets[part] if k is None else torch.where(k, targets[part], 0)  # any token
            x = logits[: own.shape[0]]
            if b is None:
                torch.mm(own, w.T, out=x)
            else:
                torch.addmm(b, own, w.T, out=x)
            near = _rows_at_once(x)
            parts = (c.split(near) for c in (x, t)) if k is None else (c.split(near) for c in (x, t, k))
            for some in zip(*parts, strict=True):
                total += _softmax_loss(*some, smoothing=label_smoothing, gradient=any(wanted))
            if d_h is not None:
                torch.mm(x, w, out=d_h[part])
            if d_w is None:
                pass
            elif d_w.dtype != h.dtype:
                d_w += x.T @ own
            elif not start:
                torch.mm(x.T, own, out=d_w)
            else:
                torch.addmm(d_w, x.T, own, out=d_w)  # addmm_ is not counted as FLOPs
            if d_b is not None:
                d_b += x.sum(0) if k is None else k.to(x.dtype) @ x
    return total, (d_h, d_w, d_b)


def _softmax_loss(
    logits: Tensor, targets: Tensor, kept: Tensor | None = None, *, smoothing: float, gradient: bool
) -> Tensor:
    """The summed loss; what is in ``logits`` then is of no use, with ``gradient`` it is softmax − smoothed one-hot."""
    x, targets = _upcast(logits), targets[:, None]
    if x.is_cpu:  # in place: another page costs more than another pass over numbers that are near
        x.sub_(x.amax(-1, keepdim=True))
    else:
        x = x.log_softmax(-1)
    chosen = x.gather(1, targets)
    loss = -chosen if not smoothing else (smoothing - 1) * chosen - smoothing * x.mean(-1, keepdim=True)
    if x.is_cpu:
        norm = x.exp_().sum(-1, keepdim=True)
        loss += norm.log()
    if gradient:
        p = x.div_(norm) if x.is_cpu else x.exp_()
        if smoothing:
            p.sub_(smoothing / p.shape[1])
        p.scatter_add_(1, targets, torch.full_like(chosen, smoothing - 1))
        if p is not logits:
            logits.copy_(p)
    return _sum(loss[:, 0], kept)


def _rows_at_once(logits: Tensor) -> int:
    """Rows whose numbers stay near a CPU's cores while a softmax goes through them again and again.

    All of a tensor without numbers (`mhe_lightning.tracing`), in which each operation costs the same.
    """
    near = logits.is_cpu and type(logits) is Tensor
    return max(1, NEAR // logits.shape[1]) if near else logits.shape[0]


def _selects(device: torch.device) -> bool:
    """Whether positions without a target are left out; how many there are is waited for."""
    return device.type == "cpu"


def _sum(numbers: Tensor, kept: Tensor | None) -> Tensor:
    return numbers.sum() if kept is None else numbers.masked_fill(~kept, 0.0).sum()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(_accumulator(logits.dtype))
