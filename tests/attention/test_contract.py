"""What every attention computes: the literal equations, causality and masks, in every variant."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.oracle import VARIANTS, assert_near, build, gradients, literal

MASKS = {
    "none": lambda B, n, T, S: None,
    "padding": lambda B, n, T, S: torch.rand(B, 1, 1, S) < 0.6,
    "queries": lambda B, n, T, S: torch.rand(T, S) < 0.6,
    "per head": lambda B, n, T, S: torch.rand(B, n, T, S) < 0.6,
    "per head, any batch": lambda B, n, T, S: torch.rand(1, n, T, S) < 0.6,
}
by_name = pytest.mark.parametrize("name", VARIANTS)
any_mask = pytest.mark.parametrize("mask_kind", MASKS)
any_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def assert_literal(variant, m, x, context, mask, is_causal, tolerance=1e-10):
    """Outputs and all gradients of ``m`` equal those of the literal equations."""
    inputs = [x.requires_grad_()] + ([] if context is None else [context.requires_grad_()])
    y = m(x, context, mask=mask, is_causal=is_causal)
    expected = literal(variant, m, x, context, mask, is_causal)
    assert_near(y, expected, tolerance)
    cotangent = torch.randn_like(y)
    actual = gradients(m, y, cotangent, *inputs)
    wanted = gradients(m, expected, cotangent, *inputs)
    assert actual.keys() == wanted.keys()
    for key in wanted:
        assert_near(actual[key], wanted[key], tolerance, f"gradient of {key}")
    for key in variant.dead:
        assert torch.equal(actual[key], torch.zeros_like(actual[key])), f"gradient of {key} is not exactly 0"


@by_name
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(*[st.integers(1, high) for high in (3, 6, 7)]),
    heads=st.integers(1, 3),
    d=st.integers(1, 5),
    bias=st.booleans(),
    cross=st.booleans(),
    is_causal=st.booleans(),
    mask_kind=st.sampled_from(list(MASKS)),
    seed=st.integers(0, 10**6),
)
def test_equals_the_literal_equations_at_any_shape(name, sizes, heads, d, bias, cross, is_causal, mask_kind, seed):
    torch.manual_seed(seed)
    variant, (B, T, S) = VARIANTS[name], sizes
    n = heads * variant.heads_divisor
    m = build(variant, n, d, bias=bias)
    x = torch.randn(B, T, n * d, dtype=torch.float64)
    context = torch.randn(B, S, n * d, dtype=torch.float64) if cross else None
    mask = MASKS[mask_kind](B, n, T, S if cross else T)
    assert_literal(variant, m, x, context, mask, is_causal)


@any_mask
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("S", [None, 9, 4], ids=["self", "longer context", "shorter context"])
def test_equals_the_literal_equations(variant, S, is_causal, mask_kind):
    m = build(variant)
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    context = None if S is None else torch.randn(3, S, 12, dtype=torch.float64)
    assert_literal(variant, m, x, context, MASKS[mask_kind](3, 4, 6, S or 6), is_causal)


@pytest.mark.parametrize("scale", [8.0, 50.0])
def test_equals_the_literal_equations_when_the_softmax_is_sharp(variant, scale):
    m = build(variant)
    with torch.no_grad():
        m.w_q.weight.mul_(scale)
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    assert_literal(variant, m, x, None, MASKS["padding"](3, 4, 6, 6), True, tolerance=1e-9)


def test_equals_the_literal_equations_in_float32(variant):
    m, x = build(variant, dtype=torch.float32), torch.randn(3, 6, 12)
    assert_literal(variant, m, x, None, MASKS["per head"](3, 4, 6, 6), True, tolerance=1e-5)


@pytest.mark.parametrize("kind", ["per head", "queries"])
def test_a_mask_has_fewer_dimensions_without_batch(variant, kind):
    m, x = build(variant), torch.randn(3, 6, 12, dtype=torch.float64)
    mask = MASKS[kind](1, 4, 6, 6)
    expected = m(x, mask=mask.reshape((1,) * (4 - mask.ndim) + mask.shape).expand(3, 4, 6, 6))
    assert_near(m(x, mask=mask.squeeze(0) if mask.ndim == 4 else mask), expected)


@any_dtype
def test_the_last_token_does_not_move_earlier_outputs_by_a_bit(variant, dtype):
    m = build(variant, n=4, d=8, dtype=dtype)
    x = torch.randn(2, 37, 32, dtype=dtype)
    changed = x.clone()
    changed[:, -1] = torch.randn(2, 32, dtype=dtype)
    y, z = m(x, is_causal=True), m(changed, is_causal=True)
    assert torch.equal(y[:, :-1], z[:, :-1])
    assert not torch.equal(y[:, -1], z[:, -1])


@any_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "causal and padding"])
def test_huge_later_tokens_do_not_move_earlier_outputs_by_a_bit(variant, dtype, masked):
    m = build(variant, n=4, d=8, dtype=dtype)
    x = torch.randn(2, 37, 32, dtype=dtype)
    changed = x.clone()
    changed[:, 20:] *= 1e12
    mask = (torch.arange(37) >= torch.tensor([[0], [3]]))[:, None, None, :] if masked else None
    y, z = m(x, mask=mask, is_causal=True), m(changed, mask=mask, is_causal=True)
    assert torch.equal(y[:, :20], z[:, :20])
    assert z[:, :20].isfinite().all()


@any_dtype
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_masked_keys_of_a_context_do_not_move_the_output_by_a_bit(variant, dtype, scale):
    m = build(variant, n=4, d=8, dtype=dtype)
    x, context = torch.randn(2, 5, 32, dtype=dtype), torch.randn(2, 21, 32, dtype=dtype)
    mask = (torch.arange(21) < torch.tensor([[13], [20]]))[:, None, None, :]
    changed = torch.where(mask[:, 0, 0, :, None], context, torch.randn_like(context) * scale)
    assert torch.equal(m(x, context, mask=mask), m(x, changed, mask=mask))


@any_dtype
def test_padded_tokens_do_not_move_the_outputs_of_others_by_a_bit(variant, dtype):
    m, x = build(variant, n=4, d=8, dtype=dtype), torch.randn(2, 21, 32, dtype=dtype)
    real = torch.arange(21) < torch.tensor([[13], [20]])
    changed = torch.where(real[..., None], x, torch.randn_like(x))
    y, z = (m(t, mask=real[:, None, None, :]) for t in (x, changed))
    assert torch.equal(y[real], z[real])


def test_masked_keys_get_an_exact_zero_gradient(variant):
    m = build(variant)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    context = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    real = torch.arange(7) < torch.tensor([[4], [6]])
    m(x, context, mask=real[:, None, None, :]).sum().backward()
    assert (context.grad[~real] == 0).all()
    assert (context.grad[real] != 0).any()


@any_dtype
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_a_query_that_sees_nothing_has_finite_outputs_and_gradients(variant, dtype, is_causal):
    m = build(variant, dtype=dtype)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[False] * 5, [False, True, True, False, True]])[:, None, None, :]
    y = m(x, mask=mask, is_causal=is_causal)
    assert y.isfinite().all()
    for key, gradient in gradients(m, y, torch.randn_like(y), x).items():
        assert gradient.isfinite().all(), key


def test_a_query_that_sees_nothing_gets_the_empty_value_of_every_head(variant):
    m, x = build(variant), torch.randn(1, 5, 12, dtype=torch.float64)
    empty = torch.zeros(12, dtype=torch.float64)
    if variant.empty is not None:
        empty = torch.cat([variant.empty(m, i) for i in range(4)])
    y = m(x, mask=torch.zeros(1, 1, 1, 5, dtype=torch.bool))
    assert_near(y, m.w_o(empty).expand(1, 5, 12), 1e-15)


def test_state_dict_round_trip_restores_the_output(variant):
    m, other, x = build(variant), build(variant), torch.randn(2, 5, 12, dtype=torch.float64)
    assert not torch.equal(m(x), other(x))
    other.load_state_dict(m.state_dict(), strict=True)
    assert torch.equal(m(x), other(x))


def test_deepcopy_is_equal_and_independent(variant):
    m, x = build(variant), torch.randn(2, 5, 12, dtype=torch.float64)
    y, other = m(x), copy.deepcopy(m)
    assert torch.equal(y, other(x))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert torch.equal(y, m(x))


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "causal and padding"])
def test_bfloat16_autocast_is_near_float32_with_float32_gradients(variant, masked):
    m = build(variant, n=4, d=8, dtype=torch.float32)
    x = torch.randn(2, 16, 32, requires_grad=True)
    mask = (torch.arange(16) < torch.tensor([[9], [16]]))[:, None, None, :] if masked else None
    expected = m(x, mask=mask, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x, mask=mask, is_causal=True)
    assert y.dtype == torch.bfloat16
    assert_near(y.float(), expected, 0.03)
    cotangent = torch.randn_like(expected)
    wanted = gradients(m, expected, cotangent, x)
    actual = gradients(m, y, cotangent.bfloat16(), x)
    assert all(g.dtype == torch.float32 for g in actual.values())
    # one scale for all: the gradient of a key's bias is zero in exact arithmetic, and rounding noise here
    assert_near(*(torch.cat([g.flatten() for g in side.values()]) for side in (actual, wanted)), 0.03)


def test_a_whole_module_in_bfloat16_gives_finite_bfloat16(variant):
    m = build(variant, dtype=torch.bfloat16)
    x = torch.randn(2, 6, 12, dtype=torch.bfloat16, requires_grad=True)
    y = m(x, is_causal=True)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(m, y, torch.ones_like(y), x).values())
