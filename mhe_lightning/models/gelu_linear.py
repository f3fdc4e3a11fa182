"""A linear layer of a GELU, of which the backward pass is given the GELU's argument alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhe_lightning.attention.products import is_plain
from mhe_lightning.attention.tensor_parallel import RowLinear, own_part

Approximate = Literal["none", "tanh"]


def gelu_linear(x: Tensor, layer: nn.Linear, approximate: Approximate) -> Tensor:
    """``layer(gelu(x))``, (..., O) from ``x`` (..., I).

    In training ``gelu(x)``, as large as ``x``, is not kept for the gradient of the weight but computed again from
    ``x``, which the gradient of the GELU keeps anyway: a quarter to a third of what a block of the usual feed-forward
    width keeps. The numbers are the same to the last bit. Derivatives of any order, in reverse mode.

    Under ``torch.compile`` the compiler decides what to keep. A layer with hooks, or of a class of its own, is called.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        if is_plain(layer):
            found: Tensor = _GeluLinear.apply(x, layer.weight, layer.bias, approximate)
            return found
        if isinstance(layer, RowLinear) and is_plain(layer, RowLinear):
            return layer.summed(_GeluLinear.apply(x, own_part(layer.weight), None, approximate))
    return layer(F.gelu(x, approximate=approximate))


class _GeluLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: Approximate) -> Tensor:
        return F.linear(F.gelu(x, approximate=approximate), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.approximate = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        outputs, inputs = weight.shape
        rows = grad.reshape(-1, outputs)  # in the dtype of autocast, if there is one
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            y = F.gelu(x, approximate=ctx.approximate).to(grad.dtype).reshape(-1, inputs)
            d_weight = (rows.T @ y).to(weight.dtype)
            del y  # before the other large tensors come
        if ctx.needs_input_grad[0]:
            d_y = (rows @ weight.to(grad.dtype)).view_as(x)
            d_x = torch.ops.aten.gelu_backward(d_y.to(x.dtype), x, approximate=ctx.approximate)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None
