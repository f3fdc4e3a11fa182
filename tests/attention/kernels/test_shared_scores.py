"""Heads that share their scores give what heads of their own would, in any range, and see nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.attention import MHE
from mhe_lightning.attention.kernels import blocks, compiled, shared_scores_cpu
from mhe_lightning.attention.kernels.shared_scores import shared_score_attention
from mhe_lightning.tracing import count_flops

OPERATOR = torch.ops.mhe_lightning.shared_score_attention.default


def literal(q, k, v, e_q, mask=None, is_causal=False):
    """(B, T, n, d), head by head as it is defined; a query without any key in view gets 0."""
    B, T, d = q.shape
    S = k.shape[1]
    visible = torch.ones(B, 1, T, S, dtype=torch.bool) if mask is None else mask.expand(B, 1, T, S)
    if is_causal:
        visible = visible & torch.ones(T, S, dtype=torch.bool).tril()
    scores = (q[:, None] + e_q[:, None]) @ k[:, None].transpose(-1, -2) / math.sqrt(d)  # (B, n, T, S)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights.masked_fill(~visible, 0.0) @ v[:, None]).transpose(1, 2)


@pytest.fixture(params=["compiled", "plain"])
def kernel(request, monkeypatch):
    """What float32 is computed with."""
    if request.param == "plain":
        monkeypatch.setattr(shared_scores_cpu, "applies", lambda chunk: False)
    elif compiled.load(shared_scores_cpu.SOURCE) is None:
        pytest.skip("no gcc here, which the kernel is compiled with")


def inputs(B=2, T=9, S=9, d=4, n=3, spread=0.3, dtype=torch.float64):
    q, k, v = torch.randn(B, T, d, dtype=dtype), torch.randn(B, S, d, dtype=dtype), torch.randn(B, S, d, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v, spread * torch.randn(n, d, dtype=dtype))]


def random_mask(kind, B, T, S):
    if kind is None:
        return None
    mask = torch.rand(B, 1, 1 if kind == "keys" else T, S) < 0.7
    if kind == "documents":
        documents = torch.randint(3, (B, max(T, S))).sort(1).values
        mask = (documents[:, :T, None] == documents[:, None, :S])[:, None]
    return mask


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    B=st.integers(1, 5),
    T=st.integers(1, 40),
    S=st.integers(1, 40),
    d=st.integers(1, 9),
    n=st.integers(1, 6),
    block=st.integers(1, 16),
    spread=st.sampled_from([0.0, 0.3, 30.0, 1000.0]),
    mask=st.sampled_from([None, "keys", "pairs", "documents"]),
    is_causal=st.booleans(),
)
def test_results_and_gradients_are_those_of_separate_heads(seed, B, T, S, d, n, block, spread, mask, is_causal):
    torch.manual_seed(seed)
    arguments = inputs(B, T, S, d, n, spread)
    mask = random_mask(mask, B, T, S)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK", "CAUSAL_BLOCK", "DIRECT_ROWS"):
            patch.setattr(blocks, name, block)
        found = shared_score_attention(*arguments, mask, is_causal)
        expected = literal(*arguments, mask, is_causal)
        grad = torch.randn_like(found)
        gradients = torch.autograd.grad(found, arguments, grad)
    assert (found - expected).abs().max() < 1e-11
    for a, b in zip(gradients, torch.autograd.grad(expected, arguments, grad), strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + b.abs().max())


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient(is_causal):
    arguments = inputs()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[1, 0, 4] = False
    heads = shared_score_attention(*arguments, mask, is_causal)
    d_q, *others = torch.autograd.grad(heads.sum(), arguments)
    assert heads[1, 4].abs().max() == 0
    assert d_q[1, 4].abs().max() == 0
    assert all(g.isfinite().all() for g in others)


@pytest.mark.parametrize("of_embeddings", [0, 50, 100, 300, 3000])
@pytest.mark.parametrize("of_scores", [0, 50, 100, 300, 3000])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.usefixtures("kernel")
def test_float32_is_as_exact_as_sdpa_however_far_exponents_lie_apart(of_embeddings, of_scores, is_causal):
    """With the largest score of the queries and that of an embedding at different keys."""
    torch.manual_seed(0)
    T, d, n = 40, 8, 3
    k = torch.zeros(1, T, d)
    k[..., 0], k[..., 1] = torch.linspace(0, 1, T), torch.linspace(1, 0, T)
    k[..., 2:] = torch.randn(1, T, d - 2)
    q, e_q, v = 0.1 * torch.randn(1, T, d), 0.1 * torch.randn(n, d), torch.randn(1, T, d)
    q[..., 0] = of_scores * math.sqrt(d)
    e_q[1, 1], e_q[2, 1] = of_embeddings * math.sqrt(d), -of_embeddings * math.sqrt(d)
    arguments = [t.requires_grad_() for t in (q, k, v, e_q)]
    doubles = [t.detach().double().requires_grad_() for t in arguments]
    grad = torch.randn(1, T, n, d)

    def results(heads, given):
        return [heads.detach(), *torch.autograd.grad(heads, given, grad.to(heads.dtype))]

    exact = results(literal(*doubles, is_causal=is_causal), doubles)
    ours = results(shared_score_attention(*arguments, None, is_causal), arguments)
    separate = F.scaled_dot_product_attention(
        q[:, None] + e_q[:, None], k[:, None], v[:, None], is_causal=is_causal, enable_gqa=True
    )
    theirs = results(separate.transpose(1, 2), arguments)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.isfinite().all()
        size = c.abs().max().item()
        # rounding differs: a few times SDPA's error (5 at most were seen), which can be next to nothing
        assert (a - c).abs().max() <= 8 * (b - c).abs().max() + 1e-6 * size


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e12])
@pytest.mark.usefixtures("kernel")
def test_later_tokens_move_no_bit_of_earlier_heads(factor):
    torch.manual_seed(0)
    q, k, v, e_q = (t.detach() for t in inputs(T=300, S=300, d=8, spread=1.0, dtype=torch.float32))
    before = shared_score_attention(q, k, v, e_q, None, True)
    for t in (q, k, v):
        t[:, 150:] = factor * torch.randn_like(t[:, 150:])
    assert torch.equal(before[:, :150], shared_score_attention(q, k, v, e_q, None, True)[:, :150])


@pytest.mark.usefixtures("kernel")
def test_padded_keys_and_other_rows_move_no_bit():
    torch.manual_seed(0)
    q, k, v, e_q = (t.detach() for t in inputs(B=3, T=60, S=60, d=8, spread=1.0, dtype=torch.float32))
    real = torch.ones(3, 1, 1, 60, dtype=torch.bool)
    real[1, ..., 40:] = False
    before = shared_score_attention(q, k, v, e_q, real)
    k[1, 40:], v[1, 40:] = 1e12, 1e12
    k[2], v[2] = 1e6 * k[2], 7.0
    assert torch.equal(before[:2], shared_score_attention(q, k, v, e_q, real)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernel")
def test_half_precision_is_accumulated_in_float32(dtype):
    torch.manual_seed(0)
    arguments = [t.detach().to(dtype).requires_grad_() for t in inputs(T=200, S=200, d=16)]
    doubles = [t.detach().double().requires_grad_() for t in arguments]
    heads, exact = shared_score_attention(*arguments, None, True), literal(*doubles, is_causal=True)
    grad = torch.randn_like(heads)
    found, expected = torch.autograd.grad(heads, arguments, grad), torch.autograd.grad(exact, doubles, grad.double())
    assert heads.dtype == dtype
    eps = torch.finfo(dtype).eps
    for a, b in zip((heads, *found), (exact, *expected), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 2 * eps * b.abs().max()


@pytest.mark.parametrize("mask", [None, "keys", "pairs"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_operator_passes_torchs_own_checks(mask, is_causal):
    arguments = inputs(T=7, S=7)
    torch.library.opcheck(OPERATOR, (*arguments, random_mask(mask, 2, 7, 7), is_causal, 0.5))


def test_operations_are_counted():
    B, T, S, d, n = 2, 7, 5, 4, 3
    arguments = inputs(B, T, S, d, n)
    with count_flops() as forward:
        heads = shared_score_attention(*arguments)
    with count_flops() as backward:
        heads.sum().backward()
    pairs, keys = 2 * B * T * S, 2 * B * S
    assert forward.get_total_flops() == pairs * (d + n * d + n) + keys * n * d
    assert backward.get_total_flops() == pairs * (3 * d + 2 * (n * d + n)) + keys * 3 * n * d


def test_mask_that_does_not_fit_is_refused():
    arguments = inputs()
    for mask in (torch.ones(2, 1, 9, 9), torch.ones(2, 3, 9, 9, dtype=torch.bool), torch.ones(9, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match="must be boolean and broadcast"):
            shared_score_attention(*arguments, mask)


def uses_shared_scores(module, *args, **kwargs):
    with torch.profiler.profile() as profile:
        module(*args, **kwargs)
    return any("shared_score_attention" in event.name for event in profile.events())


@pytest.mark.parametrize(
    ("form", "T", "expected"),
    [("auto", 192, True), ("auto", 191, False), ("shared_kv", 200, False), ("shared_scores", 8, True)],
)
def test_form_is_chosen_by_heads_times_queries_unless_it_is_given(form, T, expected):
    m = MHE(width=16, n_heads=4, form=form)
    assert uses_shared_scores(m, torch.randn(2, T, 16), is_causal=True) is expected


@pytest.mark.parametrize("form", ["shared_scores", "auto"])
def test_attention_dropout_in_training_and_masks_for_each_head_have_scores_of_their_own(form):
    m = MHE(width=16, n_heads=4, dropout=0.1, form=form)
    x = torch.randn(2, 200, 16)
    assert not uses_shared_scores(m, x)
    m.eval()
    assert uses_shared_scores(m, x)
    assert not uses_shared_scores(m, x, mask=torch.rand(1, 4, 200, 200) > 0.5)


def test_shared_scores_are_refused_for_multiplied_embeddings():
    with pytest.raises(ValueError, match="is for combine 'add'"):
        MHE(width=16, n_heads=4, combine="multiply", form="shared_scores")
    with pytest.raises(ValueError, match="must be 'auto', 'shared_scores' or 'shared_kv'"):
        MHE(width=16, n_heads=4, form="fast")


@pytest.mark.parametrize("combine", ["add", "multiply"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_forms_agree_in_results_and_gradients(combine, tokens):
    torch.manual_seed(0)
    forms = ("auto", "shared_kv", "shared_scores") if combine == "add" else ("auto", "shared_kv")
    modules = [MHE(width=16, n_heads=4, combine=combine, form=form, embedding_std=0.5).double() for form in forms]
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    results = []
    for m in modules:
        m.load_state_dict(modules[0].state_dict())
        y = m(x, is_causal=True)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in m.parameters())])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_compiled_block_of_one_graph_gives_the_same():
    torch.manual_seed(0)
    m = MHE(width=16, n_heads=4)
    x = torch.randn(2, 200, 16)
    expected = m(x, is_causal=True)
    compiled = torch.compile(lambda x: m(x, is_causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in m.named_parameters()}
    m.zero_grad()
    compiled(x).sum().backward()
    for name, p in m.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)


def test_export_sees_the_operator_where_it_is_asked_for_and_portable_ones_otherwise():
    x = torch.randn(2, 200, 16)
    for form, expected in (("shared_scores", True), ("auto", False)):
        program = torch.export.export(MHE(width=16, n_heads=4, form=form).eval(), (x,))
        assert any(node.target is OPERATOR for node in program.graph.nodes) is expected


def test_autocast_computes_in_bfloat16():
    m = MHE(width=16, n_heads=4)
    x = torch.randn(2, 200, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x, is_causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), m(x, is_causal=True), rtol=0.05, atol=0.02)


def test_queries_and_keys_of_a_subclass_are_taken_whatever_the_batch():
    class Blind(MHE):
        def key_value(self, context):
            k, v = super().key_value(context)
            return 0 * k, v

    m = Blind(width=32, n_heads=4).double()
    for tokens in (4, 300):
        x = torch.randn(1, tokens, 32, dtype=torch.float64)
        mean = m.key_value(x)[1].mean(2, keepdim=True).expand(-1, 4, tokens, -1)
        torch.testing.assert_close(m(x), m.merge(mean))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_of_projections_are_called_whatever_the_batch(hook):
    m = MHE(width=16, n_heads=4)
    called = []
    for projection in (m.w_q, m.w_k, m.w_v, m.w_o):
        getattr(projection, hook)(lambda *args: called.append(1))
    m(torch.randn(1, 300, 16)).sum().backward()
    assert len(called) == 4


def test_no_keys_give_zeros():
    heads = shared_score_attention(torch.randn(2, 5, 4), torch.randn(2, 0, 4), torch.randn(2, 0, 4), torch.randn(3, 4))
    assert torch.equal(heads, torch.zeros(2, 5, 3, 4))
