"""Parameter counts, and variants that equal each other or torch's own attention."""

import pytest
import torch
from torch import nn

from attention.oracle import VARIANTS, assert_near, build, gradients
from mhe_lightning.attention import GQA

SIZES = pytest.mark.parametrize(("n", "d"), [(2, 4), (4, 3), (8, 16), (12, 64)])


def parameters(name, n, d, bias=False):
    with torch.device("meta"):
        return sum(p.numel() for p in VARIANTS[name].build(width=n * d, n_heads=n, bias=bias).parameters())


@SIZES
@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_the_formula_and_the_output_projection(name, n, d):
    assert parameters(name, n, d) == VARIANTS[name].parameters(n, d) + n**2 * d**2


@SIZES
@pytest.mark.parametrize("name", ["mhe_add", "mhe_multiply"])
def test_head_embeddings_cost_3nd_more_than_a_single_head(name, n, d):
    assert parameters(name, n, d) - parameters("sha", n, d) == 3 * n * d


@SIZES
@pytest.mark.parametrize("name", ["mhe_add", "mhe_multiply"])
def test_multi_head_costs_far_more_than_head_embeddings(name, n, d):
    assert parameters("mha", n, d) - parameters(name, n, d) == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mha", "28.31"),
        ("skv", "21.23"),
        ("mqa", "15.34"),
        ("el", "14.16"),
        ("mhe_add", "8.88"),
        ("mhe_multiply", "8.88"),
        ("sha", "8.85"),
    ],
)
def test_attention_parameters_of_bert_base(name, millions):
    assert f"{12 * parameters(name, n=12, d=64) / 1e6:.2f}" == millions


def test_bias_adds_one_number_per_output_of_every_projection(variant):
    with_bias, without = build(variant, bias=True), build(variant, bias=False)
    biases = {k: p for k, p in with_bias.named_parameters() if k.endswith("bias")}
    weights = {k for k, _ in without.named_parameters() if k.endswith("weight")}
    assert set(biases) == {k.replace("weight", "bias") for k in weights}
    assert all(p.shape == with_bias.get_parameter(k.replace("bias", "weight")).shape[:1] for k, p in biases.items())
    assert not any(k.endswith("bias") for k, _ in without.named_parameters())


def torch_mha(m, bias):
    """torch.nn.MultiheadAttention with the weights of ``m``."""
    other = nn.MultiheadAttention(m.width, m.n_heads, bias=bias, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([m.w_q.weight, m.w_k.weight, m.w_v.weight]))
        other.out_proj.weight.copy_(m.w_o.weight)
        if bias:
            other.in_proj_bias.copy_(torch.cat([m.w_q.bias, m.w_k.bias, m.w_v.bias]))
            other.out_proj.bias.copy_(m.w_o.bias)
    return other


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_mha_equals_torch_multihead_attention(cross, is_causal, padded, bias):
    m = build(VARIANTS["mha"], n=4, d=5, bias=bias)
    other, S = torch_mha(m, bias), 9 if cross else 6
    x = torch.randn(3, 6, 20, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, S, 20, dtype=torch.float64, requires_grad=True) if cross else x
    real = torch.arange(S) < torch.tensor([[S], [3], [5]]) if padded else None
    mask = real[:, None, None, :] if padded else None
    y = m(x, context if cross else None, mask=mask, is_causal=is_causal)
    z, _ = other(
        x,
        context,
        context,
        key_padding_mask=~real if padded else None,
        attn_mask=torch.ones(6, S, dtype=torch.bool).triu(1) if is_causal else None,
        need_weights=False,
    )
    assert_near(y, z)
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(z, [x, context, other.in_proj_weight, other.out_proj.weight], cotangent)
    actual = torch.autograd.grad(y, [x, context, m.w_q.weight, m.w_k.weight, m.w_v.weight, m.w_o.weight], cotangent)
    for a, b in zip([*actual[:2], torch.cat(actual[2:5]), actual[5]], wanted, strict=True):
        assert_near(a, b)


def assert_same_function(m, other, tolerance=1e-12):
    """Equal outputs and gradients; parameters are compared where both have them."""
    x = torch.randn(2, 6, m.width, dtype=torch.float64, requires_grad=True)
    y, z = m(x, is_causal=True), other(x, is_causal=True)
    assert_near(y, z, tolerance)
    cotangent = torch.randn_like(y)
    wanted = gradients(other, z, cotangent, x)
    for key, gradient in gradients(m, y, cotangent, x).items():
        if key in wanted:
            assert_near(gradient, wanted[key], tolerance, key)


@pytest.mark.parametrize(("groups", "name"), [(4, "mha"), (1, "mqa")])
def test_gqa_at_its_ends_is_mha_and_mqa(groups, name):
    m = GQA(width=12, n_heads=4, n_kv_heads=groups).double()
    other = build(VARIANTS[name])
    other.load_state_dict(m.state_dict())
    assert_same_function(m, other)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_multiply"])
def test_mhe_without_embeddings_is_a_single_head(name):
    m, other = build(VARIANTS[name]), build(VARIANTS["sha"])
    with torch.no_grad():
        for e in (m.e_q, m.e_k, m.e_v):
            e.zero_()
    other.load_state_dict({k: p for k, p in m.state_dict().items() if not k.startswith("e_")})
    assert_same_function(m, other)


def test_a_single_head_of_full_width_is_mha():
    m, other = build(VARIANTS["mha"], n=1, d=12), build(VARIANTS["sha"], n=1, d=12)
    other.load_state_dict(m.state_dict())
    assert_same_function(m, other)


def test_gqa_groups_take_consecutive_heads():
    m, other = build(VARIANTS["gqa2"], n=4, d=3), build(VARIANTS["mha"], n=4, d=3)
    state = m.state_dict()
    for key in ("w_k", "w_v"):
        for kind in ("weight", "bias"):
            blocks = state[f"{key}.{kind}"].unflatten(0, (2, 3))
            state[f"{key}.{kind}"] = blocks.repeat_interleave(2, dim=0).flatten(0, 1)
    other.load_state_dict(state)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    assert_near(m(x), other(x))


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa2", "sha", "mhe_add", "mhe_multiply"])
def test_a_key_bias_cancels_in_the_softmax(name):
    m, x = build(VARIANTS[name]), torch.randn(2, 6, 12, dtype=torch.float64)
    y = m(x)
    with torch.no_grad():
        m.w_k.bias.add_(1)
    assert_near(m(x), y)
