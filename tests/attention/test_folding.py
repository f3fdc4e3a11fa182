"""Every variant is a grouped-query attention, exactly."""

import pytest
import torch
from torch import nn

from attention.oracle import VARIANTS
from mhe_lightning.attention import GQA, Attention

WIDTH, HEADS = 24, 6
KV_HEADS = {
    "mha": 6,
    "skv": 6,
    "el": 6,
    "gqa2": 2,
    "mqa": 1,
    "sha": 1,
    "mhe_add": 1,
    "mhe_add_shared_scores": 1,
    "mhe_multiply": 1,
}


def make(variant, bias=True) -> Attention:
    """In float64, with weights and biases far from their first values."""
    module = variant.build(width=WIDTH, n_heads=HEADS, bias=bias).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def as_module(folded) -> GQA:
    module = GQA(width=WIDTH, n_heads=HEADS, n_kv_heads=folded.n_kv_heads).double().eval()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            projection = getattr(module, f"w_{name}")
            projection.weight.copy_(getattr(folded, f"w_{name}").flatten(0, 1))
            projection.bias.copy_(getattr(folded, f"b_{name}").flatten())
        module.w_o.weight.copy_(folded.w_o.flatten(1))
        module.w_o.bias.copy_(folded.b_o)
    return module


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("materialised", [False, True], ids=["folded", "per head"])
@pytest.mark.parametrize("use", ["causal", "cross", "padded"])
def test_a_folded_attention_computes_the_same(variant, bias, materialised, use):
    module = make(variant, bias)
    folded = module.folded()
    other = as_module(folded.with_kv_heads(HEADS) if materialised else folded)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    arguments = {
        "causal": {"is_causal": True},
        "cross": {"context": torch.randn(2, 5, WIDTH, dtype=torch.float64)},
        "padded": {"mask": (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None, :]},
    }[use]
    with torch.no_grad():
        expected, found = module(x, **arguments), other(x, **arguments)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folded_attention_has_as_few_heads_of_keys_and_values_as_can_be(name):
    assert make(VARIANTS[name]).folded().n_kv_heads == KV_HEADS[name]


@pytest.mark.parametrize("name", ["mha", "gqa2", "mqa", "skv"])
def test_folding_only_rearranges_the_weights_of_a_variant_that_projects_per_head(name):
    module = VARIANTS[name].build(width=WIDTH, n_heads=HEADS)
    folded = module.folded()
    assert torch.equal(folded.w_q.flatten(0, 1).float(), module.w_q.weight)
    key = module.w_kv if name == "skv" else module.w_k
    assert torch.equal(folded.w_k.flatten(0, 1).float(), key.weight)
    assert torch.equal(folded.w_o.flatten(1).float(), module.w_o.weight)


def test_heads_of_keys_cannot_be_repeated_to_what_is_no_multiple():
    folded = make(VARIANTS["gqa2"]).folded()
    with pytest.raises(ValueError, match=r"2 heads of keys and values cannot be repeated to 3 under 6"):
        folded.with_kv_heads(3)
    with pytest.raises(ValueError, match=r"cannot be repeated to 12 under 6"):
        folded.with_kv_heads(12)


def test_an_attention_of_a_users_own_says_that_it_must_define_its_folding():
    with pytest.raises(NotImplementedError, match=r"Attention must define folded\(\)"):
        Attention(width=8, n_heads=2).folded()
