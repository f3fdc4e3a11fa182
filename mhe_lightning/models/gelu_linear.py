"""A linear layer of a GELU, of which the backward pass is given the GELU's argument alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mhe_lightning.attention.products import Linear

Approximate = Literal["none", "tanh"]


def gelu_linear(x: Tensor, layer: Linear, approximate: Approximate) -> Tensor:
    """``layer(gelu(x))``, (..., O) from ``x`` (..., I).

    In training ``gelu(x)``, as large as ``x``, is not kept for the gradient of the weight but computed again from
    ``x``, which the gradient of the GELU keeps anyway: in a feed-forward net of the usual width a quarter to a third of
    all that a block keeps, for a hundredth of its time. The numbers are the same to the last bit. What compiles decides
    by itself what to keep; layers with hooks, and those of other classes, are called.
    """
    if torch.is_grad_enabled() and _plain(layer) and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        found: Tensor = _GeluLinear.apply(x, layer.weight, layer.bias, approximate)
        return found
    return layer(F.gelu(x, approximate=approximate))


def _plain(layer: Linear) -> bool:
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is Linear and not any(hooks)


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
        rows = grad.flatten(0, -2)  # in the dtype of autocast, if there is one
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_y = (rows @ weight.to(grad.dtype)).view_as(x)
            d_x = torch.ops.aten.gelu_backward(d_y.to(x.dtype), x, approximate=ctx.approximate)
        if ctx.needs_input_grad[1]:
            y = F.gelu(x, approximate=ctx.approximate).to(grad.dtype)
            d_weight = (rows.T @ y.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None
