"""The compiled kernel of shared scores gives what its twin in plain torch does, and is no condition of anything."""

import logging
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.attention.kernels import compiled, shared_scores, shared_scores_cpu
from mhe_lightning.attention.kernels.blocks import Chunk
from mhe_lightning.attention.kernels.shared_scores import shared_score_attention

compiles = pytest.mark.skipif(
    compiled.load(shared_scores_cpu.SOURCE) is None, reason="the kernel does not compile here"
)


def mask_of(kind, B, T, S):
    if kind is None:
        return None
    return torch.rand(B, 1, 1 if kind == "keys" else T, S) < 0.7


def results(arguments, mask, is_causal, grad, dtype=torch.float32):
    """Heads, and the gradients of all arguments."""
    given = [t.detach().to(dtype).requires_grad_() for t in arguments]
    heads = shared_score_attention(*given, mask, is_causal)
    return [heads.detach(), *torch.autograd.grad(heads, given, grad.to(dtype))]


def problem(B, T, S, d, n, spread):
    """Queries, keys and values within one tensor, as those of one projection are, embeddings, and a gradient."""
    q, k, v = torch.randn(B, max(T, S), 3 * d).chunk(3, -1)
    return [q[:, :T], k[:, :S], v[:, :S], spread * torch.randn(n, d)], torch.randn(B, T, n, d)


@compiles
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**20),
    B=st.integers(1, 3),
    T=st.integers(1, 300),
    S=st.integers(1, 300),
    d=st.sampled_from([1, 5, 8, 16, 33, 64, 100]),
    n=st.integers(1, 18),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    kind=st.sampled_from([None, "keys", "pairs"]),
    is_causal=st.booleans(),
)
def test_results_and_gradients_are_those_of_float64(seed, B, T, S, d, n, spread, kind, is_causal):
    torch.manual_seed(seed)
    arguments, grad = problem(B, T, S, d, n, spread)
    mask = mask_of(kind, B, T, S)
    found = results(arguments, mask, is_causal, grad)
    exact = results(arguments, mask, is_causal, grad, torch.float64)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= 2e-5 * (1 + b.abs().max())


@compiles
@pytest.mark.parametrize("kind", [None, "pairs"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_rows_and_batches_in_several_parts(kind, is_causal, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(shared_scores, "CHUNK", 1000 * 3 * 8)  # of batches: as many rows as there are threads
    arguments, grad = problem(5, 1000, 1000, 8, 3, 0.3)
    mask = mask_of(kind, 5, 1000, 1000)
    found = results(arguments, mask, is_causal, grad)
    exact = results(arguments, mask, is_causal, grad, torch.float64)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= 2e-5 * (1 + b.abs().max())


@compiles
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_any_strides_and_no_tokens_will_do(default):
    torch.manual_seed(0)
    arguments, grad = problem(2, 40, 40, 8, 3, 0.3)
    expected = results(arguments, None, True, grad)
    torch.set_default_dtype(default)
    try:
        others = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments[:3]]
        given = [t.requires_grad_() for t in (*others, arguments[3].T.contiguous().T)]
        heads = shared_score_attention(*given, None, True)
        turned = grad.transpose(2, 3).contiguous().transpose(2, 3)
        found = [heads.detach(), *torch.autograd.grad(heads, given, turned)]
        nothing = shared_score_attention(given[0][:, :0], *given[1:])
        nothing.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert nothing.shape == (2, 0, 3, 8)


@compiles
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_kernel_that_computes(is_causal, monkeypatch):
    torch.manual_seed(0)
    arguments, grad = problem(2, 300, 300, 16, 6, 0.3)
    ours = results(arguments, None, is_causal, grad)
    monkeypatch.setattr(shared_scores_cpu, "applies", lambda chunk: False)
    plain = results(arguments, None, is_causal, grad)
    for a, b in zip(ours, plain, strict=True):
        assert not torch.equal(a, b)  # other roundings
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@compiles
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_number_of_threads_moves_no_bit_of_what_the_kernel_gives(is_causal):
    torch.manual_seed(0)
    arguments, grad = problem(3, 250, 250, 24, 5, 0.3)
    chunk = Chunk(*arguments, None, is_causal, 0.2)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            heads, sums, level = torch.empty_like(grad), torch.empty(3, 250, 5), torch.empty(3, 250, 1)
            shared_scores_cpu.shared_forward(chunk, heads, sums, level)
            d_q, d_k, d_v = (torch.empty(3, 250, 24) for _ in range(3))
            shared_scores_cpu.shared_backward(chunk, grad, heads, sums, level, d_q, d_k, d_v)
            found.append((heads, sums, level, d_q, d_v))  # not d_k, to which torch adds a product of its own
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded or kept yet; a function that looks for the library anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MHE_LIGHTNING_COMPILE", raising=False)

    def load():
        compiled.load.cache_clear()
        return compiled.load(shared_scores_cpu.SOURCE)

    yield load
    compiled.load.cache_clear()


@compiles
def test_a_library_is_compiled_once(fresh, tmp_path, monkeypatch):
    assert fresh() is not None
    assert len(list((tmp_path / "cache" / "mhe_lightning").iterdir())) == 1
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert fresh() is not None


@compiles
def test_a_damaged_library_is_made_again(fresh, tmp_path, monkeypatch):
    assert fresh() is not None
    (whole,) = (tmp_path / "cache" / "mhe_lightning").iterdir()
    # elsewhere: what a process has loaded it does not load again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "mhe_lightning" / whole.name
    damaged.parent.mkdir(parents=True, mode=0o700)
    damaged.write_bytes(b"damaged")
    assert fresh() is not None
    assert damaged.stat().st_size == whole.stat().st_size


@compiles
@pytest.mark.parametrize("whose", ["somebody else's", "everybody's"])
def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(whose, fresh, tmp_path, monkeypatch):
    assert fresh() is not None
    folder = tmp_path / "cache" / "mhe_lightning"
    made = []
    own = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda *call: made.append(call[-1]) or own(*call))
    if whose == "everybody's":
        folder.chmod(0o777)
    else:
        owner = folder.stat().st_uid
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert fresh() is not None
    assert [folder in path.parents for path in made] == [False]


@compiles
def test_a_folder_that_cannot_be_written_to_costs_a_compilation_only(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert fresh() is not None


@compiles
def test_a_compiler_that_fails_is_told_of_and_plain_torch_takes_over(fresh, monkeypatch, caplog):
    torch.manual_seed(0)
    arguments, grad = problem(1, 20, 20, 8, 3, 0.3)
    expected = results(arguments, None, True, grad)
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "--no-such-flag"))
    with caplog.at_level(logging.WARNING):
        assert fresh() is None
    assert "shared_scores_cpu.c could not be compiled, plain torch takes its place" in caplog.text
    assert "--no-such-flag" in caplog.text
    for a, b in zip(results(arguments, None, True, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["switched off", "without gcc"])
def test_without_a_compiler_nothing_is_loaded_and_nothing_said(how, fresh, monkeypatch, caplog):
    if how == "switched off":
        monkeypatch.setenv("MHE_LIGHTNING_COMPILE", "0")
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert fresh() is None
    assert not caplog.records
