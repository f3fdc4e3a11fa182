"""The output projection and its cross-entropy, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Target of a position that is not predicted."""


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

    Logits live for one chunk at a time, in float32 for the softmax; gradients are formed in the same pass, so that
    the product with ``weight`` is not repeated in the backward pass. Positions whose target is ``-100`` count for
    nothing: on a CPU they are left out before the product; elsewhere, where their number would have to be waited for,
    they go through it as zeros. First derivatives only.

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
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, kept, label_smoothing, chunk_size)
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
    ) -> Tensor:
        wants_grad = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # summed over many chunks: in float32 even where the products are bf16
        grad_weight = torch.zeros_like(weight, dtype=_accumulator(weight)) if wants_grad else None
        grad_bias = torch.zeros_like(bias, dtype=_accumulator(bias)) if wants_grad and bias is not None else None
        total = hidden.new_zeros((), dtype=_accumulator(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_size):
                part = slice(start, start + chunk_size)
                h, t = hidden[part], targets[part]
                k = None if kept is None else kept[part]
                if k is not None:
                    t = torch.where(k, t, 0)  # any token
                log_p = _upcast(F.linear(h, weight, bias)).log_softmax(-1)  # (chunk, V)
                total += _smoothed_loss(log_p, t, k, label_smoothing)
                if grad_hidden is None or grad_weight is None:
                    continue
                grad_logits = _logit_gradient(log_p, t, label_smoothing).to(h.dtype)
                grad_hidden[part] = grad_logits @ weight
                if grad_weight.dtype == h.dtype:
                    torch.addmm(grad_weight, grad_logits.T, h, out=grad_weight)  # addmm_ is not counted as FLOPs
                else:
                    grad_weight += grad_logits.T @ h
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0) if k is None else k.to(grad_logits.dtype) @ grad_logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
            None,
            None,
            None,
        )


def _selects(device: torch.device) -> bool:
    """Whether positions without a target are left out; how many there are is waited for."""
    return device.type == "cpu"


def _smoothed_loss(log_p: Tensor, targets: Tensor, kept: Tensor | None, smoothing: float) -> Tensor:
    loss = -_sum(log_p.gather(1, targets[:, None])[:, 0], kept)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * _sum(log_p.mean(-1), kept)
    return loss


def _sum(numbers: Tensor, kept: Tensor | None) -> Tensor:
    return numbers.sum() if kept is None else numbers.masked_fill(~kept, 0.0).sum()


def _logit_gradient(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """softmax − smoothed one-hot, in the place of ``log_p``."""
    grad = log_p.exp_()
    if smoothing:
        grad -= smoothing / grad.shape[1]
    rows = torch.arange(grad.shape[0], device=grad.device)
    grad[rows, targets] -= 1 - smoothing
    return grad


def _accumulator(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(_accumulator(logits))
