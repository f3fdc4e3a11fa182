"""The GPU kernels of shared-score MHE-ADD against the literal equations in float64."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.kernels.interpreter import DEVICE, shared_scores_triton

# both sides of a choice are computed, also the one that is not taken
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAMES = ("heads", "dq", "dk", "dv", "de")


@dataclasses.dataclass
class Problem:
    """Inputs of one call, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    e: Tensor
    grad: Tensor
    mask: Tensor | None = None
    is_causal: bool = False

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.e

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def allowed(self) -> Tensor:
        B, T, S = *self.q.shape[:2], self.k.shape[1]
        allowed = torch.ones(B, 1, T, S, dtype=torch.bool, device=DEVICE)
        if self.mask is not None:
            allowed = allowed & self.mask
        if self.is_causal:
            allowed = allowed & torch.ones(T, S, dtype=torch.bool, device=DEVICE).tril()
        return allowed


def problem(dtype: torch.dtype = torch.float32, *, B=1, T=40, S=None, n=3, d=32, **kwargs) -> Problem:
    S = T if S is None else S
    shapes = (B, T, d), (B, S, d), (B, S, d), (n, d), (B, T, n, d)
    return Problem(*(torch.randn(shape).to(DEVICE, dtype) for shape in shapes), **kwargs)


def run(p: Problem) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Heads, normalizer and the gradients by the kernels."""
    heads, normalizer = shared_scores_triton.forward(*p.inputs, p.mask, p.is_causal, p.scale)
    grads = shared_scores_triton.backward(p.grad, *p.inputs, p.mask, p.is_causal, p.scale, heads, normalizer)
    return heads, normalizer, grads


@dataclasses.dataclass
class Exact:
    """Results in float64, and how much was added up to make each of them: what a relative error of a term can do."""

    heads: Tensor
    normalizer: Tensor
    grads: tuple[Tensor, ...]
    gross: tuple[Tensor, ...]


def literal(p: Problem) -> Exact:
    """The equations in float64, head by head: an explicit softmax, gradients by autograd."""
    q, k, v, e = leaves = tuple(x.detach().double().requires_grad_() for x in p.inputs)
    allowed = p.allowed()[:, 0]
    sees = allowed.any(-1, keepdim=True)
    heads, normalizers = [], []
    gross = [torch.zeros_like(x) for x in leaves]
    gross_heads = []
    for i, e_i in enumerate(e):
        scores = ((q + e_i) @ k.transpose(1, 2) * p.scale).masked_fill(~allowed, -math.inf)
        normalizers.append(scores.logsumexp(-1))
        weights = torch.where(sees, torch.softmax(torch.where(sees, scores, 0.0), dim=-1), 0.0)
        heads.append(weights @ v)
        with torch.no_grad():
            grad = p.grad[:, :, i].double()
            gross_heads.append(weights @ v.abs())
            both = (grad @ v.transpose(1, 2)).abs() + (grad * heads[-1]).sum(-1, keepdim=True).abs()
            of_scores = weights * both * p.scale
            gross[0] += of_scores @ k.abs()
            gross[1] += of_scores.transpose(1, 2) @ (q.abs() + e_i.abs())
            gross[2] += weights.transpose(1, 2) @ grad.abs()
            gross[3][i] = (of_scores @ k.abs()).sum((0, 1))
    result = torch.stack(heads, dim=2)
    grads = torch.autograd.grad(result, leaves, p.grad.double())
    return Exact(
        result.detach(), torch.stack(normalizers, dim=1).detach(), grads, (torch.stack(gross_heads, dim=2), *gross)
    )


def flash(p: Problem) -> tuple[Tensor, ...]:
    """Heads and gradients by ``scaled_dot_product_attention``'s flash form on the CPU, in the inputs' dtype."""
    q, k, v, e = leaves = tuple(x.detach().cpu().contiguous().requires_grad_() for x in p.inputs)
    allowed = p.allowed().cpu()
    sees = allowed.any(-1, keepdim=True)  # it has no answer for a row that sees nothing
    n = e.shape[0]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads = F.scaled_dot_product_attention(
            q[:, None] + e[:, None],
            k[:, None].expand(-1, n, -1, -1),
            v[:, None].expand(-1, n, -1, -1),
            attn_mask=allowed | ~sees,
            scale=p.scale,
        )
    heads = torch.where(sees, heads, 0.0).transpose(1, 2)
    grads = torch.autograd.grad(heads, leaves, p.grad.cpu())
    return tuple(x.detach().to(DEVICE) for x in (heads, *grads))


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def largest_score(p: Problem) -> float:
    """The largest |s| + |r|, of which rounding takes a part."""
    shared, own = (x.double() @ p.k.double().transpose(1, 2) * p.scale for x in (p.q, p.e[None]))
    hidden = ~p.allowed()[:, 0]
    return (shared.abs() + own.abs().amax(1, keepdim=True)).masked_fill(hidden, 0.0).amax().item()


def check(p: Problem) -> None:
    """Every result is as near to float64 as the flash form's.

    The bound, on root mean squares: three times the flash form's error (1.4 were seen for heads, 2.5 for gradients, in
    most cases 1), and what float32 makes of an exponent: a relative error of 2⁻²³ in each term for each unit of the
    largest ``|s| + |r|``, which are added after they were rounded.
    """
    heads, normalizer, grads = run(p)
    exact = literal(p)
    exponent = 2**-23 * (1 + largest_score(p))
    for name, actual, other, expected, gross in zip(
        NAMES, (heads, *grads), flash(p), (exact.heads, *exact.grads), exact.gross, strict=True
    ):
        assert actual.dtype == p.q.dtype, name
        assert actual.shape == expected.shape, name
        assert actual.isfinite().all(), name
        bound = 3 * rms(other.double() - expected) + exponent * rms(gross)
        assert rms(actual.double() - expected) <= bound, name
    assert normalizer.dtype == torch.float32
    assert heads.is_contiguous()
    seen = exact.normalizer > -math.inf
    assert torch.equal(seen, normalizer > -math.inf)
    # exponentials rounded to the dtype in a sum; the largest of all errors, of a dot, a product and a sum
    rounding = 2 * torch.finfo(p.q.dtype).eps
    assert (normalizer - exact.normalizer)[seen].abs().max().item() <= rounding + 4 * exponent


@pytest.fixture(autouse=True, params=["small tiles"] + (["tiles of the device"] if DEVICE == "cuda" else []))
def tiles(request, monkeypatch) -> Iterator[None]:
    """Tiles so small that a few dozen tokens make several."""
    if request.param == "small tiles":
        choose = shared_scores_triton.choose_tiles

        def small(*args):
            return dataclasses.replace(choose(*args), long=32, short=16, edge=32, chunk=64, warps=4, stages=1)

        monkeypatch.setattr(shared_scores_triton, "choose_tiles", small)
    return


def padding(B: int, S: int, *lengths: int) -> Tensor:
    return (torch.arange(S, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]).view(B, 1, 1, S)


def documents(*lengths: int) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(DEVICE)
    return (document[:, None] == document)[None, None]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_and_gradients_are_those_of_the_equations(dtype, is_causal):
    check(problem(dtype, T=45, n=5, d=40, is_causal=is_causal))


@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(1, 32, torch.float32), (12, 64, torch.bfloat16), (2, 128, torch.float16), (3, 96, torch.bfloat16)],
    ids=str,
)
def test_any_number_of_heads_and_head_dimension(n, d, dtype):
    check(problem(dtype, T=33, n=n, d=d, is_causal=True))


@pytest.mark.parametrize(("T", "S", "is_causal"), [(17, 50, False), (50, 17, True), (20, 50, True), (1, 40, False)])
def test_cross_attention_of_other_length(T, S, is_causal):
    check(problem(torch.bfloat16, T=T, S=S, is_causal=is_causal))


def test_padded_keys():
    check(problem(torch.float16, B=2, n=2, mask=padding(2, 40, 40, 23)))


def test_documents_in_one_row():
    check(problem(torch.bfloat16, B=2, n=2, mask=documents(5, 20, 15), is_causal=True))


def test_a_mask_for_each_row_of_the_batch():
    mask = torch.rand(2, 1, 40, 40, device=DEVICE) < 0.5
    check(problem(B=2, n=2, mask=mask))


def test_rows_that_see_nothing_are_zero():
    mask = padding(2, 40, 40, 0).expand(2, 1, 40, 40).clone()
    mask[0, 0, 3:6] = False
    p = problem(torch.bfloat16, B=2, n=2, mask=mask)
    heads, normalizer, (dq, *_) = run(p)
    for blind in (heads[1], heads[0, 3:6], dq[1], dq[0, 3:6]):
        assert not blind.any()
    assert (normalizer[1] == -math.inf).all()
    check(p)


def test_inputs_of_any_strides():
    joint = torch.randn(40, 2, 3 * 32, device=DEVICE).transpose(0, 1)
    q, k, v = joint.split(32, dim=-1)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    e = torch.randn(3, 64, device=DEVICE)[:, :32]
    grad = torch.randn(2, 3, 40, 32, device=DEVICE).transpose(1, 2)
    check(Problem(q, k, v, e, grad, is_causal=True))


SPREADS = [(0, 50), (50, 0), (50, 50), (100, 100), (300, 300)]


def with_spreads(dtype: torch.dtype, of_r: float, of_s: float) -> Problem:
    """The scores of the embeddings and those of the queries spread that far; their largest are at opposite keys."""
    p = problem(dtype, n=3, is_causal=True)
    line = torch.linspace(-1, 1, 40, device=DEVICE)
    p.k[0, :, 0] = line
    p.k[0, :, 1:] *= 0.1
    p.e[:, 0] = of_r / 2 / p.scale * torch.tensor([1.0, -0.5, 0.1], device=DEVICE)
    p.q[0, :, 0] = -of_s / 2 / p.scale
    return p


@pytest.mark.parametrize("spreads", SPREADS, ids=str)
def test_float32_is_exact_in_every_range(spreads):
    check(with_spreads(torch.float32, *spreads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_exact_in_every_range(dtype):
    for spreads in SPREADS[1::3]:
        check(with_spreads(dtype, *spreads))


@pytest.mark.parametrize("size", [1.0, 1000.0], ids=["like others", "huge"])
def test_the_last_token_changes_no_bit_of_earlier_rows(size):
    p = problem(torch.bfloat16, is_causal=True)
    heads, normalizer = shared_scores_triton.forward(*p.inputs, None, True, p.scale)
    for x in (p.q, p.k, p.v):
        x[:, -1] = size * torch.randn(32)
    other, other_normalizer = shared_scores_triton.forward(*p.inputs, None, True, p.scale)
    assert not torch.equal(heads[:, -1], other[:, -1])
    assert torch.equal(heads[:, :-1], other[:, :-1])
    assert torch.equal(normalizer[..., :-1], other_normalizer[..., :-1])


@pytest.mark.parametrize("per_query", [False, True], ids=["padding", "documents"])
def test_hidden_keys_change_no_bit(per_query):
    p = problem(n=2, mask=padding(1, 40, 29))
    if per_query:  # nobody of the second document asks
        p.mask = documents(29, 11)
        p.grad[:, 29:] = 0
    before = run(p)
    p.k[:, 29:], p.v[:, 29:] = 1e30, -1e30
    after = run(p)
    rows = slice(0, 29 if per_query else 40)
    assert torch.equal(before[0][:, rows], after[0][:, rows])
    assert torch.equal(before[1][..., rows], after[1][..., rows])
    for name, x, y in zip(NAMES[1:], before[2], after[2], strict=True):
        if name == "dq":
            assert torch.equal(x[:, rows], y[:, rows])
        else:
            assert torch.equal(x, y), name  # of hidden keys: zero, before as after


def test_gradients_are_bitwise_the_same_in_parts(monkeypatch):
    p = problem(torch.bfloat16, T=70, n=2, is_causal=True)
    _, _, whole = run(p)
    monkeypatch.setattr(shared_scores_triton, "WORKSPACE", 1)
    _, _, parts = run(p)
    for name, x, y in zip(NAMES[1:], whole, parts, strict=True):
        assert torch.equal(x, y), name


def test_a_dtype_or_head_dimension_that_the_kernels_have_not_is_refused():
    with pytest.raises(ValueError, match="float64"):
        run(problem(torch.float64))
    with pytest.raises(ValueError, match="160 is more than 128"):
        run(problem(d=160))


@pytest.mark.slow
def test_the_kernels_compile_for_their_devices(tmp_path):
    """The interpreter knows no types of Triton's and no limits of devices; a compiler needs no device."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 14  # seven kernels for two devices
