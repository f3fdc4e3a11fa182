"""The attention distributions that can be looked at are those that the output is made from."""

import pytest
import torch
from torch import Tensor

from attention.oracle import assert_near, build
from attention.test_contract import MASKS, any_mask
from mhe_lightning.attention import Attention


def output_from_weights(m: Attention, weights: Tensor, context: Tensor) -> Tensor:
    """``merge(A V)`` with the values of every head."""
    v = m.key_value(context)[-1]
    return m.merge(weights @ v.repeat_interleave(m.n_heads // v.shape[1], dim=1))


@any_mask
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("S", [None, 9, 4], ids=["self", "longer context", "shorter context"])
def test_the_output_is_the_weights_times_the_values(variant, S, is_causal, mask_kind):
    m = build(variant).eval()
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    context = None if S is None else torch.randn(3, S, 12, dtype=torch.float64)
    mask = MASKS[mask_kind](3, 4, 6, S or 6)
    weights = m.weights(x, context, mask=mask, is_causal=is_causal)
    assert weights.shape == (3, 4, 6, S or 6)
    assert weights.dtype == torch.float64
    expected = m(x, context, mask=mask, is_causal=is_causal)
    assert_near(output_from_weights(m, weights, x if context is None else context), expected)


def test_rows_sum_to_one_and_hidden_keys_get_nothing(variant):
    m, x = build(variant, dtype=torch.float32), torch.randn(2, 5, 12)
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    weights = m.weights(x, mask=real[:, None, None, :], is_causal=True)
    assert weights.dtype == torch.float32
    visible = real[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril()
    assert (weights[~visible.expand_as(weights)] == 0).all()
    assert_near(weights.sum(-1), torch.ones(2, 4, 5), 1e-6)


def test_a_query_that_sees_nothing_has_a_row_of_zeros(variant):
    m, x = build(variant), torch.randn(1, 5, 12, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    weights = m.weights(x, mask=mask)
    assert (weights[:, :, 2] == 0).all()
    assert_near(weights[:, :, [0, 1, 3, 4]].sum(-1), torch.ones(1, 4, 4, dtype=torch.float64), 1e-12)


def test_dropout_and_gradients_are_left_out(variant):
    m, x = build(variant, dropout=0.5).train(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weights = m.weights(x)
    assert not weights.requires_grad
    assert torch.equal(weights, m.eval().weights(x))


def test_half_precision_gives_float32(variant):
    m, x = build(variant, dtype=torch.float32), torch.randn(2, 5, 12)
    expected = m.weights(x)
    with torch.autocast("cpu", torch.bfloat16):
        weights = m.weights(x)
    assert weights.dtype == torch.float32
    assert_near(weights, expected, 0.03)
    assert_near(weights.sum(-1), torch.ones(2, 4, 5), 1e-6)
    assert m.bfloat16().weights(x.bfloat16()).dtype == torch.float32


def test_a_mask_that_does_not_fit_is_refused(variant):
    with pytest.raises(ValueError, match="must broadcast"):
        build(variant).weights(torch.randn(2, 5, 12, dtype=torch.float64), mask=torch.ones(4, dtype=torch.bool))
