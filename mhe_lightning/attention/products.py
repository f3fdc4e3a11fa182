"""Matrix products of few rows on a CPU, as the steps of decoding have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 64
FEWEST_OUTPUTS = 128
"""What `few_rows` asks for. Fewer outputs cost less than the further operations."""

BLOCK = 512
"""Rows of a weight of many outputs (those of a vocabulary) that are multiplied at once."""


class Linear(nn.Linear):
    """``torch.nn.Linear``, with `linear` as its product.

    What goes by a layer's exact type, as ``torch.ao.quantization.quantize_dynamic`` does, has to be given this one too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def is_plain(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a layer is but its parameters, so that these may be used without calling it: one of ``types`` (linear
    layers if none is given) itself, without hooks or a forward of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) in (types or (nn.Linear, Linear)) and not any(hooks) and "forward" not in vars(layer)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, (..., O) from ``x`` (..., I), ``weight`` (O, I) and ``bias`` (O,).

    For `few_rows` it is computed as ``(W xᵀ + b)ᵀ``. There BLAS divides W among the threads where it would else divide
    the few rows, and reads W once: with 2 threads 1.2 to 3 times faster at 2 to 64 rows. The result is a view then,
    whose rows are not contiguous. A weight of many outputs is multiplied in blocks of `BLOCK` rows.
    """
    if not few_rows(x, weight):
        return F.linear(x, weight, bias)
    columns = x.reshape(-1, x.shape[-1]).t()  # (I, rows)
    outputs = weight.shape[0]
    if bias is not None:
        y = torch.addmm(bias[:, None], weight, columns)  # (O, rows)
    elif outputs < 8 * BLOCK:
        y = torch.mm(weight, columns)
    else:
        y = x.new_empty(outputs, columns.shape[1])
        n, whole = outputs // BLOCK, outputs // BLOCK * BLOCK
        blocks = weight[:whole].view(n, BLOCK, -1)
        torch.bmm(blocks, columns.expand(n, -1, -1), out=y[:whole].view(n, BLOCK, -1))
        torch.mm(weight[whole:], columns, out=y[whole:])
    return y.t().view(*x.shape[:-1], outputs)


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of few rows by a large enough weight, on a CPU, in float32 or float64, with nothing that
    has to know it as a linear layer: gradients, autocast, and what compiles or exports."""
    if torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # before a size is looked at, which would become a part of what is exported
    rows = x.numel() // x.shape[-1]
    return (
        1 < rows <= MOST_ROWS
        and weight.shape[0] >= FEWEST_OUTPUTS
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )
