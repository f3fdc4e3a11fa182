"""A model that is built without memory and filled later has the numbers that it would have had."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attention.oracle import VARIANTS
from mhe_lightning.deferred import Deferred
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder

NETS = (Decoder, Encoder, EncoderDecoder)


def build(net, variant, seed: int, deferred: Deferred | None = None):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, attention=VARIANTS[variant].build, width=16, n_heads=4, n_layers=2, max_length=12)
    if deferred is None:
        return net(**sizes), torch.randn(3)
    with deferred.recording():
        with torch.device("meta"):
            made = net(**sizes)
        return made, torch.randn(3)


@settings(max_examples=25, deadline=None)
@given(
    net=st.sampled_from(NETS),
    variant=st.sampled_from(list(VARIANTS)),
    seed=st.integers(0, 2**31),
    backwards=st.booleans(),
)
def test_any_net_gets_the_bits_of_one_that_was_built_at_once(net, variant, seed, backwards):
    expected, drawn = build(net, variant, seed)
    deferred = Deferred()
    made, drawn_next = build(net, variant, seed, deferred)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(drawn_next, drawn), "what is drawn afterwards"

    state = torch.get_rng_state()
    for block in reversed(made.blocks) if backwards else made.blocks:
        deferred.materialize(block)
    deferred.materialize(made)

    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.is_meta for tensor in [*made.parameters(), *made.buffers()])
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in expected.named_parameters()], "ties"
    for (name, value), other in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
    for (name, value), other in zip(made.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_filling_a_part_leaves_the_rest_without_memory():
    deferred = Deferred()
    made, _ = build(Decoder, "mhe_add", 0, deferred)

    deferred.materialize(made.blocks[1])

    assert not any(p.is_meta for p in made.blocks[1].parameters())
    assert all(p.is_meta for p in made.blocks[0].parameters())
    assert made.token_embedding.weight.is_meta


def test_tensors_in_memory_are_left_alone():
    deferred = Deferred()
    with deferred.recording():
        layer = nn.Linear(3, 3)
    before = layer.weight.clone()
    deferred.materialize(layer)
    assert torch.equal(layer.weight, before)


def test_a_tensor_that_is_changed_after_it_was_read_is_refused():
    deferred = Deferred()
    with deferred.recording(), torch.device("meta"):
        source = torch.zeros(3)
        layer = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(source)
            source.add_(1)

    with pytest.raises(NotImplementedError, match="changed afterwards"):
        deferred.materialize(layer)


def test_a_draw_of_an_unknown_kind_is_refused_by_name():
    with Deferred().recording(), torch.device("meta"), pytest.raises(NotImplementedError, match="bernoulli"):
        torch.empty(3).bernoulli_(0.5)
