"""What attention comes nearest to a multi-head one, for each class of it: products in, projections out.

A head's scores come from ``W_Q W_Kᵀ``, what it brings to the output from ``W_V W_O``. Each solver approximates these
2n products by what its attention can do, in the metric of the `Moments` of real text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from mhe_lightning.attention import GQA, MHA, MHE, SHA, SKV, Attention, ELAttention
from mhe_lightning.interop.calibration import Moments
from mhe_lightning.interop.decompositions import Products, Root, cp_als, leading_subspace, square_root, truncated_svd

RIDGE = 1e-2
"""Share of a moment's mean diagonal that is added to it: the data are a sample, the net will see others."""


@dataclass(frozen=True)
class Problem:
    """What an attention computes, and on what.

    Args:
        scores: head i's scores are ``[x, 1] L_i R_iᵀ cᵀ / √d`` up to a constant of the query: (n, D + 1, d), (n, D, d).
        values: head i brings ``h L_i R_iᵀ`` to the output, h being the attended states: (n, D, d) both.
        moments: of x and c.
        ridge: see `RIDGE`.
        biased: whether queries have a bias, the last row of ``L_i``.
    """

    scores: Products
    values: Products
    moments: Moments
    ridge: float
    biased: bool

    @property
    def queries(self) -> Root:
        """The metric of ``[x, 1]``; without biases, one in which no approximation needs the 1."""
        moment = self.moments.queries
        if not self.biased:
            moment = torch.block_diag(moment[:-1, :-1], moment[-1:, -1:])
        return square_root(moment, self.ridge)

    def keys(self, heads: slice = slice(None)) -> Root:
        """The metric of keys, the mean over these heads."""
        return square_root(self.moments.keys[heads].mean(0), self.ridge)

    def attended(self, heads: slice = slice(None)) -> Root:
        """The metric of attended states, the mean over these heads."""
        return square_root(self.moments.values[heads].mean(0), self.ridge)


@dataclass(frozen=True)
class Solution:
    """An attention with keys and values of g heads, in the symbols of `Problem`.

    Args:
        queries: (n, D + 1, d), the last row of each being the bias.
        keys: (g, D, d).
        values: (g, D, d).
        outputs: (n, d, D), the blocks of W_O.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor

    def errors(self, problem: Problem) -> tuple[float, float]:
        """Squared errors of scores and of value-output products, as shares, each head in its own metric."""
        per_head = len(self.queries) // len(self.keys)
        keys, values = (t.repeat_interleave(per_head, 0) for t in (self.keys, self.values))
        scores, products = problem.scores, problem.values
        seen = [square_root(moment, problem.ridge).root for moment in problem.moments.keys]
        attended = [square_root(moment, problem.ridge).root for moment in problem.moments.values]
        queries = problem.queries.root
        wrong = right = 0.0
        wrong_values = right_values = 0.0
        for i in range(len(self.queries)):
            wanted = queries @ scores.left[i] @ (seen[i] @ scores.right[i]).T
            got = queries @ self.queries[i] @ (seen[i] @ keys[i]).T
            wrong, right = wrong + float((wanted - got).square().sum()), right + float(wanted.square().sum())
            wanted = attended[i] @ products.left[i] @ products.right[i].T
            got = attended[i] @ values[i] @ self.outputs[i]
            wrong_values += float((wanted - got).square().sum())
            right_values += float(wanted.square().sum())
        return share(wrong, right), share(wrong_values, right_values)

    def output_bias(self, problem: Problem) -> Tensor:
        """What W_O's bias must bring because the products differ in the mean of the attended states, (D,)."""
        values = self.values.repeat_interleave(len(self.queries) // len(self.values), 0)
        attended = problem.moments.attended
        wanted = torch.einsum("na,nad,nod->o", attended, *problem.values)
        return wanted - torch.einsum("na,nad,ndo->o", attended, values, self.outputs)


def problem_of(attention: MHA, moments: Moments, ridge: float) -> Problem:
    """What a multi-head attention computes. Its keys' biases, which change no attention, are left out."""
    n, d, width = attention.n_heads, attention.head_dim, attention.width
    w_q, w_k, w_v = (
        layer.weight.double().view(n, d, width).mT for layer in (attention.w_q, attention.w_k, attention.w_v)
    )  # (n, D, d)
    b_q = torch.zeros(n, d, dtype=torch.float64) if attention.w_q.bias is None else attention.w_q.bias.view(n, d)
    queries = torch.cat([w_q, b_q.double()[:, None]], dim=1)
    outputs = attention.w_o.weight.double().view(width, n, d).transpose(0, 1)  # (n, D, d)
    return Problem(Products(queries, w_k), Products(w_v, outputs), moments, ridge, attention.w_q.bias is not None)


def output_bias_of(attention: MHA) -> Tensor:
    """The constant in a multi-head attention's output, (D,): rows of A sum to one, so W_O carries V's bias to it."""
    if attention.w_o.bias is None or attention.w_v.bias is None:
        return torch.zeros(attention.width, dtype=torch.float64)
    return attention.w_o.bias.double() + attention.w_o.weight.double() @ attention.w_v.bias.double()


@singledispatch
def solve(new: Attention, problem: Problem) -> Solution:
    """Set all of ``new`` but W_O so that it computes as nearly as it can what the problem says.

    Raises:
        ValueError: no multi-head attention can be made into one of this class.
    """
    raise ValueError(
        f"attention {type(new).__name__} cannot be made from MHA; choose MHE, MQA, GQA, SHA, SKV or ELAttention"
    )


@solve.register
def _(new: MHE, problem: Problem) -> Solution:
    combine = _multiplied if new.combine == "multiply" else _added
    queries, keys, embeddings = combine(problem)
    values, outputs = _shared_values(problem, slice(None))
    set_linear(new.w_q, queries[:-1].T, queries[-1])
    set_linear(new.w_k, keys.T)
    set_linear(new.w_v, values.T)
    new.e_q.copy_(embeddings)
    new.e_k.zero_()
    new.e_v.zero_()
    multiplied = new.combine == "multiply"
    if multiplied:
        per_head = queries * (1 + embeddings)[:, None]
    else:
        per_head = queries.repeat(new.n_heads, 1, 1)
        per_head[:, -1] += embeddings
    return Solution(per_head, keys[None], values[None], outputs)


def _multiplied(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (D + 1, d), keys (D, d) and embeddings (n, d) of MHE-MUL: a CP model of the scores' products.

    ``((x W_Q) ⊙ (1 + e_i)) · (c W_K) = x W_Q diag(1 + e_i) W_Kᵀ cᵀ``: the head is the third direction of the tensor.
    """
    of_queries, of_keys = problem.queries, problem.keys()
    left, right = problem.scores
    model = cp_als(Products(of_queries.root @ left, of_keys.root @ right), left.shape[-1])
    turned = torch.where(model.c.sum(0) < 0, -1.0, 1.0)  # which of two factors is negative is free: embeddings near 0
    return of_queries.inverse @ (model.a * turned), of_keys.inverse @ model.b, model.c * turned - 1


def _added(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (D + 1, d), keys (D, d) and embeddings (n, d) of MHE-ADD, whose heads differ in a query's bias alone.

    In the metric, let u be the direction of the 1 in ``[x, 1]``. Beside u all heads get the same, so their mean is
    nearest; along u each gets its own. For given keys that is the least squares; the best keys are the leading right
    singular vectors of ``[√n mean beside u; the heads' rows along u]``.
    """
    of_queries, of_keys = square_root(problem.moments.queries, problem.ridge), problem.keys()
    left, right = of_queries.root @ problem.scores.left, of_keys.root @ problem.scores.right
    n, _, d = left.shape
    one = of_queries.root[:, -1]
    along = one / one.norm()
    mean = torch.einsum("nad,nbd->ab", left, right) / n
    rows = torch.einsum("a,nad,nbd->nb", along, left, right)  # (n, D)
    beside = mean - torch.outer(along, along @ mean)
    keys = truncated_svd(torch.cat([math.sqrt(n) * beside, rows]), d).right.T  # (D, d)
    embeddings = (rows - along @ mean) @ keys / one.norm()
    queries = of_queries.inverse @ mean @ keys
    if not problem.biased:  # the embeddings are biases too
        embeddings, queries = embeddings + queries[-1], torch.cat([queries[:-1], torch.zeros_like(queries[-1:])])
    return queries, of_keys.inverse @ keys, embeddings


@solve.register
def _(new: SHA, problem: Problem) -> Solution:
    of_queries, of_keys = problem.queries, problem.keys()
    left, right = of_queries.root @ problem.scores.left, of_keys.root @ problem.scores.right
    n, _, d = left.shape
    mean = truncated_svd(torch.einsum("nad,nbd->ab", left, right) / n, d)
    queries, keys = of_queries.inverse @ mean.left, of_keys.inverse @ mean.right.T
    # all heads attend alike: only the sum of their value-output products is to be met
    attended = problem.attended()
    total = torch.einsum("nad,nod->ao", *problem.values)
    found = truncated_svd(attended.root @ total, d)
    values = attended.inverse @ found.left
    set_linear(new.w_q, queries[:-1].T, queries[-1])
    set_linear(new.w_k, keys.T)
    set_linear(new.w_v, values.T)
    return Solution(queries.repeat(n, 1, 1), keys[None], values[None], found.right.repeat(n, 1, 1) / n)


@solve.register
def _(new: GQA, problem: Problem) -> Solution:
    per_group = new.n_heads // new.n_kv_heads
    groups = [slice(i, i + per_group) for i in range(0, new.n_heads, per_group)]
    queries, keys = zip(*(_shared_keys(problem, group) for group in groups), strict=True)
    values, outputs = zip(*(_shared_values(problem, group) for group in groups), strict=True)
    found = Solution(torch.cat(queries), torch.stack(keys), torch.stack(values), torch.cat(outputs))
    _set_per_head(new.w_q, found.queries[:, :-1], found.queries[:, -1])
    _set_per_head(new.w_k, found.keys)
    _set_per_head(new.w_v, found.values)
    return found


@solve.register
def _(new: MHA, problem: Problem) -> Solution:
    raise ValueError("the attention is MHA already; choose another one to convert it to")


@solve.register
def _(new: SKV, problem: Problem) -> Solution:
    """For each head the d directions of c that hold most of scores and values together, both weighing the same."""
    queries, kept, outputs = [], [], []
    of_queries = problem.queries
    for i in range(new.n_heads):
        head = slice(i, i + 1)
        of_keys = square_root(problem.moments.keys[i] + problem.moments.values[i], problem.ridge)
        scores = of_queries.root @ problem.scores.left[i] @ (of_keys.root @ problem.scores.right[i]).T
        values = problem.values.right[i] @ (of_keys.root @ problem.values.left[i]).T  # (D, D)
        shares = [t / t.norm().clamp_min(torch.finfo(t.dtype).tiny) for t in (scores, values)]
        basis = truncated_svd(torch.cat(shares), new.head_dim).right.T
        keys = of_keys.inverse @ basis
        queries.append(_queries_for(problem, keys, i))
        outputs.append(_outputs_for(problem, keys, head))
        kept.append(keys)
    found = Solution(torch.stack(queries), torch.stack(kept), torch.stack(kept), torch.cat(outputs))
    _set_per_head(new.w_q, found.queries[:, :-1], found.queries[:, -1])
    _set_per_head(new.w_kv, found.keys)
    return found


@solve.register
def _(new: ELAttention, problem: Problem) -> Solution:
    """Keys and values are slices of c, so only queries and W_O can be chosen: both are least squares."""
    slices = torch.eye(new.width, dtype=torch.float64).view(new.width, new.n_heads, new.head_dim).transpose(0, 1)
    queries = torch.stack([_queries_for(problem, keys, i) for i, keys in enumerate(slices)])
    outputs = torch.cat([_outputs_for(problem, keys, slice(i, i + 1)) for i, keys in enumerate(slices)])
    _set_per_head(new.w_q, queries[:, :-1], queries[:, -1])
    return Solution(queries, slices, slices, outputs)


def _shared_keys(problem: Problem, heads: slice) -> tuple[Tensor, Tensor]:
    """Queries (m, D + 1, d) of these heads and the keys (D, d) that they share, nearest in the metric."""
    of_queries, of_keys = problem.queries, problem.keys(heads)
    left, right = of_queries.root @ problem.scores.left[heads], of_keys.root @ problem.scores.right[heads]
    d = left.shape[-1]
    keys = leading_subspace(right, left, d)
    return of_queries.inverse @ left @ (right.mT @ keys), of_keys.inverse @ keys


def _shared_values(problem: Problem, heads: slice) -> tuple[Tensor, Tensor]:
    """Values (D, d) that these heads share and their blocks (m, d, D) of W_O, nearest in the metric."""
    attended = problem.attended(heads)
    left, right = problem.values.left[heads], problem.values.right[heads]
    left = attended.root @ left
    basis = leading_subspace(left, right, left.shape[-1])  # (D, d)
    outputs = (basis.T @ left) @ right.mT  # (m, d, D)
    # values are as large as what they bring, and the ridge of a fit keeps from making much of little
    size = outputs.square().sum((0, 2)).sqrt().clamp_min(torch.finfo(outputs.dtype).tiny)
    return attended.inverse @ (basis * size), outputs / size[:, None]


def _queries_for(problem: Problem, keys: Tensor, head: int) -> Tensor:
    """The queries (D + 1, d) of a head for given keys (D, d): whatever the metric of queries, they are these."""
    root = square_root(problem.moments.keys[head], problem.ridge).root
    wanted = problem.scores.left[head] @ (root @ problem.scores.right[head]).T  # (D + 1, D)
    return torch.linalg.lstsq(root @ keys, wanted.T).solution.T


def _outputs_for(problem: Problem, values: Tensor, head: slice) -> Tensor:
    """The block (1, d, D) of W_O of a head for given values (D, d)."""
    root = problem.attended(head).root
    wanted = root @ problem.values.left[head][0] @ problem.values.right[head][0].T
    return torch.linalg.lstsq(root @ values, wanted).solution[None]


def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    """A projection's weight (out, in) and its bias (out,), zero where none is given."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)


def _set_per_head(layer: nn.Linear, weights: Tensor, biases: Tensor | None = None) -> None:
    """The same of heads' weights (h, in, d) and biases (h, d)."""
    set_linear(layer, weights.mT.flatten(0, 1), None if biases is None else biases.flatten())


def share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
