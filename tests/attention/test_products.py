"""Products of few rows equal those of linear layers, and are taken only where nothing has to see a linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhe_lightning.attention import products
from mhe_lightning.attention.products import Linear, few_rows, linear

INPUTS = 24
OUTPUTS = [
    products.FEWEST_OUTPUTS - 1,
    products.FEWEST_OUTPUTS,
    8 * products.BLOCK,
    8 * products.BLOCK + 1,
    10 * products.BLOCK - 3,
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("rows", [1, 2, 17, products.MOST_ROWS, products.MOST_ROWS + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_of_few_rows_is_that_of_a_linear_layer(rows, outputs, biased):
    x, weight, bias = draw(rows, INPUTS), draw(outputs, INPUTS), draw(outputs) if biased else None
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2, 5), (2, 3, 4), (0, 3), ()])
def test_leading_dimensions_are_kept(shape):
    x, weight = draw(*shape, INPUTS), draw(200, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-13, atol=1e-12)


def test_an_input_with_strides_gives_the_same():
    x, weight = draw(INPUTS, 5).t(), draw(200, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x.contiguous(), weight), rtol=1e-13, atol=1e-12)


def test_with_gradients_it_is_a_linear_layer():
    torch.manual_seed(0)
    layer = Linear(INPUTS, 200)
    x = torch.randn(5, INPUTS)
    assert not few_rows(x, layer.weight)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_autocast_and_other_precisions_are_left_to_the_linear_layer():
    x, weight = torch.randn(5, INPUTS), torch.randn(200, INPUTS)
    with torch.no_grad():
        assert few_rows(x, weight)
        assert not few_rows(x.bfloat16(), weight.bfloat16())
        assert not few_rows(x, weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not few_rows(x, weight)
            assert linear(x, weight).dtype == torch.bfloat16


def test_an_exported_layer_takes_any_number_of_rows():
    layer = Linear(INPUTS, 200).eval()
    rows = torch.export.Dim("rows", min=2, max=1000)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(5, INPUTS),), dynamic_shapes=({0: rows},)).module()
        x = torch.randn(300, INPUTS)
        torch.testing.assert_close(exported(x), layer(x))


def test_a_layer_has_the_parameters_of_a_linear_layer():
    torch.manual_seed(0)
    ours = Linear(INPUTS, 200).state_dict()
    torch.manual_seed(0)
    stock = torch.nn.Linear(INPUTS, 200).state_dict()
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
