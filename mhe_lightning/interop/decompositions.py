"""The factorizations that an attention is converted by: truncated SVD and CP, over products that stay factored.

The products of a head, ``W_Q W_Kᵀ`` and ``W_V W_O``, are D × D matrices of rank d. All n of them together would be
n·D² numbers; they are kept as their factors, ``L_i R_iᵀ`` with ``L_i: (A, k)`` and ``R_i: (B, k)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """n matrices ``L_i R_iᵀ``, each (A, B).

    Args:
        left: (n, A, k).
        right: (n, B, k).
    """

    left: Tensor
    right: Tensor

    def square(self) -> Tensor:
        """``Σ_i ‖L_i R_iᵀ‖²``, a scalar."""
        return ((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum()


class Root(NamedTuple):
    """The symmetric square root of a second moment, and its inverse; both (D, D)."""

    root: Tensor
    inverse: Tensor


class Truncated(NamedTuple):
    """The best approximation of a matrix (A, B) by ``left @ right`` of rank r.

    Args:
        left: (A, r).
        right: (r, B), with orthonormal rows.
        error: the squared error as a share of the matrix's squared norm.
    """

    left: Tensor
    right: Tensor
    error: float


class CP(NamedTuple):
    """n matrices as ``a diag(c_i) bᵀ``: a canonical polyadic (CP, PARAFAC) model of the tensor that they make.

    Args:
        a: (A, r).
        b: (B, r).
        c: (n, r).
        errors: the squared error after each sweep as a share of the tensor's squared norm.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    errors: list[float]


def square_root(moment: Tensor, ridge: float) -> Root:
    """``R = moment^½`` with its inverse, so that ``‖R x‖² = xᵀ moment x``.

    Args:
        moment: (D, D), symmetric and positive semi-definite.
        ridge: share of the mean diagonal that is added to the diagonal, so that directions that the data did not
            take count a little, and the inverse exists.

    Raises:
        ValueError: the moment has no positive diagonal, or numbers that are none.
    """
    mean = moment.diagonal().mean()
    if not torch.isfinite(moment).all() or mean <= 0:
        raise ValueError(
            "the second moment of the calibration's hidden states is zero or not finite; look for NaN among the "
            "model's weights, or give other texts"
        )
    values, vectors = torch.linalg.eigh(moment + ridge * mean * torch.eye(len(moment), dtype=moment.dtype))
    # of a ridge of 0 and a singular moment, directions without any weight are given the least that has an inverse
    roots = values.clamp_min(torch.finfo(moment.dtype).eps * values[-1]).sqrt()
    return Root((vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T)


def truncated_svd(matrix: Tensor, rank: int) -> Truncated:
    """The ``rank`` leading singular triples of a matrix (A, B): its nearest of that rank (Eckart & Young 1936)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    total = s.square().sum()
    error = float(s[rank:].square().sum() / total) if total > 0 else 0.0
    return Truncated(u[:, :rank] * s[:rank], vh[:rank], error)


def leading_subspace(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading left singular vectors (A, rank) of ``[L_1 R_1ᵀ … L_n R_nᵀ]``, which is not formed.

    They are the eigenvectors of ``Σ_i L_i (R_iᵀ R_i) L_iᵀ``, an A × A matrix where the other has n·B columns.

    Args:
        left: (n, A, k).
        right: (n, B, k).
        rank: at most A.
    """
    moment = (left @ (right.mT @ right) @ left.mT).sum(0)
    return torch.linalg.eigh(moment)[1][:, -rank:].flip(1)


def cp_als(products: Products, rank: int, *, sweeps: int = 100, starts: int = 2, tolerance: float = 1e-5) -> CP:
    """A CP model of ``rank`` terms, by alternating least squares from several starts; the best is taken.

    The first start is algebraic and finds the model where there is an exact one: two mixtures of the matrices are
    ``a diag(x) bᵀ`` and ``a diag(y) bᵀ``, whose pencil has ``a`` for its eigenvectors. The others are the leading
    singular subspaces of the unfoldings, turned at random. All is drawn from a seed of its own: equal input, equal
    output. Steps are proximal (what is looked for stays near to what there is, by 1e-12 of the mean weight): near
    copies of a term then need no inverse that is not there. The error still never rises.

    Source: Kolda & Bader 2009, *Tensor Decompositions and Applications*, SIAM Review 51 (ALS, section 3.4); Leurgans,
    Ross & Abel 1993 (the algebraic start).

    Args:
        products: the matrices.
        rank: terms r.
        sweeps: most updates of all three factors, per start.
        starts: how many starts.
        tolerance: a start ends when a sweep lowers its error by less than this share of it.

    Raises:
        ValueError: a number is out of range.
    """
    for name, number in (("rank", rank), ("sweeps", sweeps), ("starts", starts)):
        if number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")
    if rank > min(products.left.shape[1], products.right.shape[1]):
        raise ValueError(f"rank ({rank}) must be at most {min(products.left.shape[1], products.right.shape[1])}")
    return min(
        (_alternate(products, *start, sweeps, tolerance) for start in _starts(products, rank, starts)), key=_last
    )


def _last(model: CP) -> float:
    return model.errors[-1]


def _alternate(products: Products, a: Tensor, b: Tensor, sweeps: int, tolerance: float) -> CP:
    left, right = products
    total = products.square()
    c = torch.ones(len(left), a.shape[1], dtype=a.dtype)
    errors: list[float] = []
    for _ in range(sweeps):
        seen_a, seen_b = left.mT @ a, right.mT @ b  # (n, k, r)
        c = _proximal((a.T @ a) * (b.T @ b), (seen_a * seen_b).sum(1), c)
        a = _proximal((c.T @ c) * (b.T @ b), ((left @ seen_b) * c[:, None]).sum(0), a)
        towards_b = ((right @ (left.mT @ a)) * c[:, None]).sum(0)  # (B, r)
        gram = (c.T @ c) * (a.T @ a)
        b = _proximal(gram, towards_b, b)
        error = total - 2 * (towards_b * b).sum() + (gram * (b.T @ b)).sum()
        errors.append(max(0.0, float(error / total)) if total > 0 else 0.0)
        a, b, c = _balanced(a, b, c)
        if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-1]:
            break
    return CP(a, b, c, errors)


def _proximal(gram: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """The x (N, r) of least ``‖x - x*‖²`` in the metric ``gram`` (r, r) where ``x* gram = right``, near to ``old``."""
    weight = 1e-12 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=gram.dtype), (right + weight * old).T).T


def _balanced(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same model with a root mean square of 1 in each term's c, and a and b of equal norms."""
    tiny = torch.finfo(a.dtype).tiny
    of_c = c.square().mean(0).sqrt().clamp_min(tiny)
    of_a, of_b = a.norm(dim=0).clamp_min(tiny), b.norm(dim=0).clamp_min(tiny)
    norm = (of_a * of_b * of_c).sqrt()
    return a / of_a * norm, b / of_b * norm, c / of_c


def _starts(products: Products, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    left, right = products
    draw = torch.Generator().manual_seed(0)
    in_a, in_b = leading_subspace(left, right, rank), leading_subspace(right, left, rank)  # (A, r), (B, r)
    core = (in_a.T @ left) @ (in_b.T @ right).mT  # (n, r, r)
    for number in range(count):
        if number == 0:
            x, y = torch.randn(2, len(core), generator=draw, dtype=core.dtype)
            mixed = torch.einsum("n,nij->ij", x, core), torch.einsum("n,nij->ij", y, core)
            turned_a = _eigenvectors(mixed[0] @ torch.linalg.pinv(mixed[1]))
            # X = A diag(x) Bᵀ, so A⁻¹ X has the rows of Bᵀ, each multiplied by a number
            turned_b = (torch.linalg.pinv(turned_a) @ mixed[0]).T
        else:
            turned_a, turned_b = (
                torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=core.dtype))[0] for _ in range(2)
            )
        yield in_a @ turned_a, in_b @ turned_b


def _eigenvectors(matrix: Tensor) -> Tensor:
    """The eigenvectors as real columns: of a conjugate pair the real and the imaginary part."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.where(values.imag >= 0, vectors.real, vectors.imag)
