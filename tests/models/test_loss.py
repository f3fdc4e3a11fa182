"""The chunked output projection and loss equal ``F.cross_entropy`` on all logits, without ever holding them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhe_lightning.models.loss import IGNORE, linear_cross_entropy, token_cross_entropy, token_scores


def problem(batch=2, length=9, width=5, vocabulary=11, *, ignored=0.3, bias=False, dtype=torch.float64, seed=0):
    """Hidden states, a weight, a bias (or None) and targets of which about ``ignored`` are -100."""
    torch.manual_seed(seed)
    hidden = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    b = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(vocabulary, (batch, length))
    targets[torch.rand(batch, length) < ignored] = IGNORE
    return hidden, weight, b, targets


def literal(hidden, weight, bias, targets, label_smoothing=0.0, reduction="sum"):
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(
        logits, targets.flatten(), reduction=reduction, ignore_index=IGNORE, label_smoothing=label_smoothing
    )


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, [t for t in inputs if t is not None])


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that an operation returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 13)),
    chunk_size=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_value_and_gradients_equal_cross_entropy(sizes, chunk_size, ignored, label_smoothing, bias, seed):
    hidden, weight, b, targets = problem(*sizes, ignored=ignored, bias=bias, seed=seed)
    loss = linear_cross_entropy(hidden, weight, targets, bias=b, label_smoothing=label_smoothing, chunk_size=chunk_size)
    expected = literal(hidden, weight, b, targets, label_smoothing)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(gradients(loss, hidden, weight, b), gradients(expected, hidden, weight, b), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_to_predict_is_a_loss_of_zero_with_gradients_of_zero(bias):
    hidden, weight, b, targets = problem(ignored=2.0, bias=bias)
    assert bool((targets == IGNORE).all())
    loss = linear_cross_entropy(hidden, weight, targets, bias=b, chunk_size=4)
    assert loss.item() == 0.0
    for gradient in gradients(loss, hidden, weight, b):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_positions_get_no_gradient():
    hidden, weight, _, targets = problem()
    (gradient,) = gradients(linear_cross_entropy(hidden, weight, targets, chunk_size=4), hidden)
    ignored = targets == IGNORE
    assert bool(ignored.any())
    assert not gradient[ignored].any()
    assert bool(gradient[~ignored].any(-1).all())


@pytest.mark.parametrize("near", [1, 50, 10**6])
def test_the_chunk_size_changes_nothing(near, monkeypatch):
    monkeypatch.setattr("mhe_lightning.models.loss.NEAR", near)
    hidden, weight, b, targets = problem(batch=4, length=25, bias=True)
    results = []
    for chunk_size in (1, 2, 7, 99, 100, 101, 512):
        loss = linear_cross_entropy(hidden, weight, targets, bias=b, label_smoothing=0.1, chunk_size=chunk_size)
        results.append((loss, *gradients(loss, hidden, weight, b)))
    for result in results[1:]:
        for actual, wanted in zip(result, results[0], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [3.0, -0.25, 0.0])
def test_gradients_scale_with_what_comes_from_above(scale):
    hidden, weight, b, targets = problem(bias=True)
    plain = gradients(linear_cross_entropy(hidden, weight, targets, bias=b), hidden, weight, b)
    scaled = gradients(scale * linear_cross_entropy(hidden, weight, targets, bias=b), hidden, weight, b)
    for actual, wanted in zip(scaled, plain, strict=True):
        torch.testing.assert_close(actual, scale * wanted, rtol=1e-12, atol=0.0)


def test_the_backward_pass_can_be_repeated():
    hidden, weight, _, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_derivatives_are_refused():
    hidden, weight, _, targets = problem()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_input_may_be_frozen(frozen):
    hidden, weight, _, targets = problem()
    kept = weight if frozen == "hidden" else hidden
    expected = gradients(literal(hidden, weight, None, targets), kept)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size=4)
    torch.testing.assert_close(gradients(loss, kept), expected, rtol=1e-12, atol=1e-12)


def test_a_tied_weight_gets_the_gradients_of_both_of_its_uses():
    _, weight, _, targets = problem(ignored=0.0)
    tokens = torch.randint(weight.shape[0], targets.shape)
    actual = gradients(linear_cross_entropy(F.embedding(tokens, weight).tanh(), weight, targets), weight)
    wanted = gradients(literal(F.embedding(tokens, weight).tanh(), weight, None, targets), weight)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_autograd_agrees_with_finite_differences():
    hidden, weight, b, targets = problem(1, 4, 3, 5, bias=True)
    assert torch.autograd.gradcheck(
        lambda h, w, c: linear_cross_entropy(h, w, targets, bias=c, label_smoothing=0.2, chunk_size=3),
        (hidden, weight, b),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_bf16_autocast_is_close_to_float32(label_smoothing):
    hidden, weight, b, targets = problem(batch=4, length=64, width=32, vocabulary=101, bias=True, dtype=torch.float32)
    exact = linear_cross_entropy(hidden, weight, targets, bias=b, label_smoothing=label_smoothing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, bias=b, label_smoothing=label_smoothing, chunk_size=16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0.0)
    for actual, wanted in zip(gradients(loss, hidden, weight, b), gradients(exact, hidden, weight, b), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() <= 0.02 * wanted.norm()


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert loss.item() == 0.0
    assert all(bool(g.isfinite().all()) for g in gradients(loss, hidden, weight))


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_tensor_of_all_logits_is_ever_made(ignored, label_smoothing):
    tokens, vocabulary, width, chunk_size = 96, 64, 8, 16  # rows of logits are filled up to lines of a cache
    hidden, weight, b, targets = problem(2, tokens // 2, width, vocabulary, ignored=ignored, bias=True)
    with LargestTensor() as largest:
        linear_cross_entropy(
            hidden, weight, targets, bias=b, label_smoothing=label_smoothing, chunk_size=chunk_size
        ).backward()
        token_cross_entropy(hidden, weight, targets, bias=b, chunk_size=chunk_size)
    assert largest.numel == max(chunk_size * vocabulary, tokens * width, vocabulary * width)
    with LargestTensor() as all_logits:  # the mode does see what it is there to see
        literal(hidden, weight, b, targets)
    assert all_logits.numel == tokens * vocabulary


@pytest.mark.parametrize("chunk_size", [1, 5, 512])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 2.0])
def test_token_losses_equal_unreduced_cross_entropy(chunk_size, bias, ignored):
    hidden, weight, b, targets = problem(bias=bias, ignored=ignored)
    losses = token_cross_entropy(hidden, weight, targets, bias=b, chunk_size=chunk_size)
    assert losses.shape == targets.shape
    assert not losses.requires_grad
    expected = literal(hidden, weight, b, targets, reduction="none").view_as(targets)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert not losses[targets == IGNORE].any()


def test_token_losses_sum_to_the_loss():
    hidden, weight, b, targets = problem(bias=True)
    torch.testing.assert_close(
        token_cross_entropy(hidden, weight, targets, bias=b).sum(),
        linear_cross_entropy(hidden, weight, targets, bias=b),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 512])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 2.0])
def test_token_scores_are_the_losses_and_whether_each_target_is_the_likeliest(chunk_size, bias, ignored):
    hidden, weight, b, targets = problem(bias=bias, ignored=ignored)
    likeliest = F.linear(hidden, weight, b).argmax(-1)
    targets[:, ::2] = torch.where(targets == IGNORE, IGNORE, likeliest)[:, ::2]
    losses, hits = token_scores(hidden, weight, targets, bias=b, chunk_size=chunk_size)
    assert torch.equal(losses, token_cross_entropy(hidden, weight, targets, bias=b, chunk_size=chunk_size))
    assert torch.equal(hits, likeliest == targets)
    assert not hits[targets == IGNORE].any()
    assert bool(hits.any()) == (ignored < 1)


def test_token_scores_of_nothing_are_nothing():
    hidden, weight, b, targets = problem(bias=True)
    losses, hits = token_scores(hidden[:0], weight, targets[:0], bias=b)
    assert losses.shape == hits.shape == (0, *targets.shape[1:])


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing \(-0.1\)"),
        ({"chunk_size": 0}, r"chunk_size \(0\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings_, named):
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(hidden, weight, targets, **settings_)
