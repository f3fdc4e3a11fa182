"""CP by alternating least squares and truncated SVD, against what they must find."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.interop.decompositions import Products, cp_als, leading_subspace, square_root, truncated_svd


def products(n, a, b, k, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Products(*(torch.randn(n, size, k, generator=draw, dtype=torch.float64) for size in (a, b)))


def whole(found):
    return found.left @ found.right.mT


def modelled(model):
    return (model.a * model.c[:, None]) @ model.b.T


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 99))
def test_the_error_of_alternating_least_squares_never_rises(n, a, b, k, seed):
    model = cp_als(products(n, a, b, k, seed), min(k, a, b), sweeps=25, starts=3, tolerance=0.0)

    assert all(late <= early + 1e-12 for early, late in zip(model.errors, model.errors[1:], strict=False))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 99))
def test_the_error_told_is_that_of_the_model(n, a, b, k, seed):
    given_ = products(n, a, b, k, seed)

    model = cp_als(given_, min(k, a, b), sweeps=5)

    error = (modelled(model) - whole(given_)).square().sum() / whole(given_).square().sum()
    assert model.errors[-1] == pytest.approx(error.item(), abs=1e-12)


@pytest.mark.parametrize(("n", "a", "b", "rank"), [(2, 6, 5, 3), (3, 13, 12, 4), (12, 33, 32, 8)])
def test_a_tensor_that_is_a_cp_model_is_recovered(n, a, b, rank):
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, rank, generator=draw, dtype=torch.float64) for size in (a, b))
    scales = 1 + 0.3 * torch.randn(n, rank, generator=draw, dtype=torch.float64)
    tensor = Products(left * scales[:, None], right.expand(n, -1, -1))

    model = cp_als(tensor, rank)

    torch.testing.assert_close(modelled(model), whole(tensor), rtol=0, atol=1e-10)


def test_more_starts_are_never_worse():
    tensor = products(4, 9, 8, 3)

    errors = [cp_als(tensor, 3, starts=starts).errors[-1] for starts in (1, 2, 5)]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_equal_input_gives_equal_bits():
    first, second = (cp_als(products(4, 9, 8, 3), 3) for _ in range(2))

    assert all(torch.equal(x, y) for x, y in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, r"rank \(0\) must be at least 1"),
        ({"rank": 9}, r"rank \(9\) must be at most 8"),
        ({"rank": 2, "sweeps": 0}, r"sweeps \(0\) must be at least 1"),
        ({"rank": 2, "starts": 0}, r"starts \(0\) must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        cp_als(products(2, 9, 8, 3), **options)


def test_a_truncated_svd_is_exact_at_the_matrix_rank_and_tells_its_error_below():
    matrix = whole(products(1, 9, 7, 4))[0]

    full, less = truncated_svd(matrix, 4), truncated_svd(matrix, 2)

    torch.testing.assert_close(full.left @ full.right, matrix)
    error = (less.left @ less.right - matrix).square().sum() / matrix.square().sum()
    assert less.error == pytest.approx(error.item())
    assert less.error > 0.01


def test_the_leading_subspace_is_that_of_the_singular_vectors():
    left, right = products(3, 9, 7, 4)

    found = leading_subspace(left, right, 5)

    wanted = torch.linalg.svd((left @ right.mT).transpose(0, 1).flatten(1))[0][:, :5]
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T)


def test_square_root_squares_to_the_moment_and_its_ridge():
    factor = products(1, 6, 6, 6).left[0]
    moment = factor @ factor.T

    root, inverse = square_root(moment, 0.1)

    torch.testing.assert_close(root @ root, moment + 0.1 * moment.diagonal().mean() * torch.eye(6, dtype=moment.dtype))
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=moment.dtype))


def test_a_singular_moment_without_a_ridge_has_an_inverse():
    row = torch.ones(1, 4, dtype=torch.float64)

    root, inverse = square_root(row.T @ row, 0.0)

    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("moment", [torch.zeros(3, 3), torch.full((3, 3), float("nan"))])
def test_moments_of_nothing_are_refused(moment):
    with pytest.raises(ValueError, match="zero or not finite"):
        square_root(moment.double(), 1e-2)
