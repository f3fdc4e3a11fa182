"""Attentions of a user's own, that know less than ours or look further."""

from functools import partial

import pytest
import torch
from torch import nn

from mhe_lightning.attention import GQA, MHA, products
from mhe_lightning.models import Decoder, Encoder, generate


class Published(nn.Module):
    """The public call of an attention and nothing else."""

    def __init__(self, *, width, n_heads):
        super().__init__()
        self.inner = MHA(width=width, n_heads=n_heads)
        self.w_o = self.inner.w_o

    def forward(self, x, context=None, mask=None, is_causal=False, cache=None):
        return self.inner(x, context, mask, is_causal, cache)


class Shifted(MHA):
    """Keys and values mixed with those of the token before."""

    positionwise = False

    def key_value(self, context):
        return super().key_value(context + context.roll(1, dims=1))


SIZES = {"width": 16, "n_heads": 4, "n_layers": 2, "max_length": 32, "dropout": 0.0}


@pytest.mark.parametrize("attention", [Published, Shifted])
def test_padding_stays_for_an_attention_that_needs_it(attention):
    torch.manual_seed(0)
    net = Encoder(50, attention, **SIZES).eval()
    tokens = torch.randint(50, (3, 12))
    padding = torch.arange(12) < torch.tensor([[12], [5], [3]])
    expected = net(tokens, padding=padding)
    found = net(tokens, padding=padding, real=padding.flatten().nonzero().flatten())
    torch.testing.assert_close(found[padding], expected[padding])


def test_the_last_position_of_an_attention_of_the_public_call_is_that_of_all():
    torch.manual_seed(0)
    net = Decoder(50, Published, **SIZES).eval()
    tokens = torch.randint(50, (3, 12))
    torch.testing.assert_close(net(tokens, last=1), net(tokens)[:, -1:])
    assert [len(new) for new in generate(net, tokens.tolist(), max_new_tokens=4, temperature=0)] == [4, 4, 4]


@pytest.mark.parametrize("n_kv_heads", [4, 1])
def test_products_of_few_rows_change_no_token(monkeypatch, n_kv_heads):
    torch.manual_seed(0)
    net = Decoder(50, partial(GQA, n_kv_heads=n_kv_heads), **SIZES).eval().double()
    prompts = torch.randint(50, (5, 7)).tolist()
    found = []
    for outputs in (1, 10**9):
        monkeypatch.setattr(products, "FEWEST_OUTPUTS", outputs)
        found.append(generate(net, prompts, max_new_tokens=20, temperature=0))
    assert found[0] == found[1]
