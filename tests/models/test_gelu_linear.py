"""A linear layer of a GELU, whose result is not kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mhe_lightning.attention import MHA
from mhe_lightning.attention.products import Linear
from mhe_lightning.models import Encoder, layers
from mhe_lightning.models.gelu_linear import gelu_linear
from saved import saved_storages


def plainly(x, layer, approximate):
    """The same, in which autograd keeps what it wants."""
    return F.linear(F.gelu(x, approximate=approximate), layer.weight, layer.bias)


def output_and_gradients(function, x, layer, approximate):
    x = x.detach().requires_grad_()
    y = function(x, layer, approximate)
    wanted = [t for t in (x, layer.weight, layer.bias) if t is not None and t.requires_grad]
    return y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    approximate=st.sampled_from(["none", "tanh"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_outputs_and_gradients_are_those_of_autograd_to_the_bit(shape, bias, approximate, dtype):
    torch.manual_seed(0)
    layer = Linear(6, 5, bias=bias).to(dtype)
    x = torch.randn(*shape, 6, dtype=dtype)
    ours, plain = (output_and_gradients(f, x, layer, approximate) for f in (gelu_linear, plainly))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_gradients_under_autocast_are_those_of_autograd():
    torch.manual_seed(0)
    layer, x = Linear(6, 5), torch.randn(3, 6)
    found = []
    for function in (gelu_linear, plainly):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(x.requires_grad_(), layer, "none")
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.weight, layer.bias))))
    assert found[0][0].dtype == torch.bfloat16
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_second_derivatives_are_right(approximate):
    torch.manual_seed(0)
    layer = Linear(3, 2).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        return gelu_linear(x, layer, approximate).square()

    assert torch.autograd.gradgradcheck(function, (x, *layer.parameters()))


class GeluLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(6, 5)

    def forward(self, x):
        return gelu_linear(x, self.layer, "none")


def test_gradients_of_single_rows_are_those_of_torch_func():
    torch.manual_seed(0)
    net, x = GeluLinear(), torch.randn(4, 3, 6)

    def loss(parameters, row):
        return torch.func.functional_call(net, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(plainly(row, net.layer, "none").square().sum(), list(net.parameters()))
        for own, plain in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(own[i], plain)


def test_a_frozen_layer_gets_no_gradient():
    layer, x = Linear(6, 5).requires_grad_(False), torch.randn(3, 6, requires_grad=True)
    gelu_linear(x, layer, "none").sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is layer.bias.grad is None


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        ("register_forward_pre_hook", lambda seen: lambda module, inputs: seen.append("called")),
        ("register_forward_hook", lambda seen: lambda module, inputs, output: seen.append("called")),
        ("register_full_backward_pre_hook", lambda seen: lambda module, grads: seen.append("called")),
        ("register_full_backward_hook", lambda seen: lambda module, grads, more: seen.append("called")),
    ],
)
def test_hooks_of_a_layer_are_called(register, hook):
    seen = []
    layer = Linear(6, 5)
    getattr(layer, register)(hook(seen))
    gelu_linear(torch.randn(3, 6, requires_grad=True), layer, "none").sum().backward()
    assert seen == ["called"]


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_else_is_called():
    torch.manual_seed(0)
    x, doubled, replaced = torch.randn(3, 6), Doubled(6, 5), Linear(6, 5)
    replaced.forward = lambda x: 2 * F.linear(x, replaced.weight, replaced.bias)
    for layer in (doubled, replaced):
        torch.testing.assert_close(gelu_linear(x, layer, "none"), 2 * plainly(x, layer, "none"))


def held_at_most(function, x, layer):
    """Most bytes of tensors that live at once in a backward pass, beyond what is there before it."""
    y = function(x, layer, "none")
    grad = torch.ones_like(y)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_a_backward_pass_holds_no_more_at_once_than_that_of_autograd():
    layer, x = Linear(256, 8), torch.randn(512, 256, requires_grad=True)
    hidden = x.numel() * x.element_size()
    ours, plain = (held_at_most(f, x, layer) for f in (gelu_linear, plainly))
    assert 2 * hidden <= plain
    assert ours <= plain + 0.1 * hidden  # autograd's holds the gelu's result besides, since before this pass


def saved_by(net, tokens):
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    return sum(size for address, size in saved_storages(lambda: net(tokens)).items() if address not in own)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_a_block_keeps_one_number_less_of_each_hidden_unit(activation, monkeypatch):
    torch.manual_seed(0)
    tokens, hidden = torch.randint(9, (2, 8)), 64
    net = Encoder(9, MHA, width=16, n_heads=2, n_layers=3, max_length=8, ff_width=hidden, activation=activation)
    ours = saved_by(net, tokens)
    monkeypatch.setattr(layers, "gelu_linear", plainly)
    assert saved_by(net, tokens) - ours == 3 * tokens.numel() * hidden * 4
