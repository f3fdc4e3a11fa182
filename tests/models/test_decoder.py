"""The decoder with every attention: causality, documents, padding, caches, initialisation, checkpointing, sizes."""

from __future__ import annotations

import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention.oracle import VARIANTS
from mhe_lightning.attention import MHA
from mhe_lightning.distributed import parallelize
from mhe_lightning.models import Decoder

every_attention = pytest.mark.parametrize("name", VARIANTS)
VOCABULARY, LENGTH = 23, 16


def decoder(name="mhe_add", *, dtype=torch.float32, seed=0, **kwargs) -> Decoder:
    """A small decoder whose numbers, biases and norms included, are of size one."""
    torch.manual_seed(seed)
    settings = {"width": 16, "n_heads": 4, "n_layers": 2, "max_length": LENGTH, "dropout": 0.0, **kwargs}
    net = Decoder(VOCABULARY, VARIANTS[name].build, **settings).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net.eval()


def draw(*shape: int, seed=1) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# What a position sees


@every_attention
@pytest.mark.parametrize("documents", [False, True])
def test_later_tokens_change_nothing_before_them(name, documents):
    net = decoder(name)
    tokens = draw(2, LENGTH)
    ids = (torch.arange(LENGTH) // 5).expand(2, -1) if documents else None
    before = net(tokens, documents=ids)
    for t in (1, 6, LENGTH - 1):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCABULARY
        after = net(changed, documents=ids)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@every_attention
def test_a_document_is_computed_as_if_alone(name):
    net = decoder(name, dtype=torch.float64)
    lengths = ([5, 1, 7, 3], [16])
    tokens = draw(2, LENGTH)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    hidden = net(tokens, documents=documents)
    for row, row_lengths in enumerate(lengths):
        start = 0
        for n in row_lengths:
            alone = net(tokens[row : row + 1, start : start + n])
            torch.testing.assert_close(hidden[row : row + 1, start : start + n], alone, rtol=0.0, atol=1e-12)
            start += n


def test_without_document_ids_documents_do_see_each_other():
    net = decoder(dtype=torch.float64)
    tokens = draw(1, LENGTH)
    assert not torch.allclose(net(tokens)[:, 8:], net(tokens[:, 8:]))


def test_positions_count_from_the_start_of_each_document():
    net = decoder()
    looked_up = []
    net.position_embedding.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]))
    net(draw(2, 8), documents=torch.tensor([[7, 7, 7, 9, 9, 9, 9, 2], [0, 1, 1, 1, 0, 0, 3, 3]]))
    assert looked_up[0].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 0, 1, 0, 1]]


@every_attention
def test_left_padding_changes_nothing(name):
    net = decoder(name, dtype=torch.float64)
    lengths = [9, 4, 1]
    tokens, padding = draw(3, 9), torch.zeros(3, 9, dtype=torch.bool)
    for row, n in enumerate(lengths):
        padding[row, 9 - n :] = True
    hidden = net(tokens, padding=padding)
    assert bool(hidden.isfinite().all())
    for row, n in enumerate(lengths):
        alone = net(tokens[row : row + 1, 9 - n :])
        torch.testing.assert_close(hidden[row : row + 1, 9 - n :], alone, rtol=0.0, atol=1e-12)


@every_attention
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 4, 1], [12]], ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(name, steps):
    net = decoder(name, dtype=torch.float64)
    tokens = draw(2, 12)
    caches = net.new_caches(12)
    hidden = torch.cat([net(part, caches=caches) for part in tokens.split(steps, dim=1)], dim=1)
    torch.testing.assert_close(hidden, net(tokens), rtol=0.0, atol=1e-12)


@every_attention
@torch.no_grad()
def test_cached_decoding_with_left_padding_equals_the_full_forward_pass(name):
    net = decoder(name, dtype=torch.float64)
    tokens, padding = draw(2, 12), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :4] = False
    caches, hidden, seen = net.new_caches(), [], 0
    for part in tokens.split([6, 1, 1, 4], dim=1):
        seen += part.shape[1]
        hidden.append(net(part, padding=padding[:, :seen], caches=caches))
    actual = torch.cat(hidden, dim=1)
    torch.testing.assert_close(actual[:1, 4:], net(tokens[:1, 4:]), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(actual[1:], net(tokens[1:]), rtol=0.0, atol=1e-12)


@every_attention
@torch.no_grad()
def test_the_last_position_alone_is_as_among_all(name):
    net = decoder(name, dtype=torch.float64)
    tokens, padding = draw(2, 12), torch.ones(2, 12, dtype=torch.bool)
    padding[0, :4] = False
    for settings in ({}, {"padding": padding}, {"documents": (torch.arange(12) // 5).expand(2, -1)}):
        expected = net(tokens, **settings)[:, -1:]
        torch.testing.assert_close(net(tokens, **settings, last=1), expected, rtol=0.0, atol=1e-12)


# The loss


@every_attention
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_logits(name, tied):
    net = decoder(name, dtype=torch.float64, tie_embeddings=tied, loss_chunk=5)
    tokens, targets = draw(2, LENGTH), draw(2, LENGTH, seed=2)
    targets[:, ::3] = -100
    hidden = net(tokens)
    logits = net.logits(hidden)
    assert logits.shape == (2, LENGTH, VOCABULARY)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = net.loss(hidden, targets)
    assert math.isfinite(loss.item())
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(net.token_losses(hidden, targets).flatten(), expected, rtol=1e-12, atol=1e-12)


@every_attention
def test_every_parameter_has_a_finite_gradient(name):
    net = decoder(name).train()
    net.loss(net(draw(2, LENGTH)), draw(2, LENGTH, seed=2)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key  # None would stop distributed data-parallel training
        assert bool(parameter.grad.isfinite().all()), key


# Sizes and initialisation


def test_gpt2_base_has_as_many_parameters_as_gpt2():
    with torch.device("meta"):
        net = Decoder(50257, MHA, width=768, n_heads=12, n_layers=12, max_length=1024)
    assert sum(p.numel() for p in net.parameters()) == 124_439_808
    with torch.device("meta"):
        untied = Decoder(50257, MHA, tie_embeddings=False)  # the sizes are the defaults
    assert sum(p.numel() for p in untied.parameters()) == 124_439_808 + 50257 * 768


@every_attention
def test_initial_numbers(name):
    torch.manual_seed(0)
    L = 3
    net = Decoder(2000, VARIANTS[name].build, width=128, n_heads=8, n_layers=L, max_length=1000)
    residual = {f"blocks.{i}.{w}.weight" for i in range(L) for w in ("attention.w_o", "feed_forward.w_2")}
    seen = set()
    for key, parameter in net.named_parameters():
        if "norm" in key:
            assert torch.equal(parameter, torch.full_like(parameter, float(key.endswith("weight")))), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            std = 0.02 / math.sqrt(2 * L) if key in residual else 0.02
            seen.add(key)
            # six standard errors of a standard deviation and of a mean, estimated from so many numbers
            error = 6 * std / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - std) < error, key
            assert abs(parameter.mean().item()) < 6 * std / math.sqrt(parameter.numel()), key
    assert residual <= seen
    if name.startswith("mhe"):
        assert {f"blocks.0.attention.e_{x}" for x in "qkv"} <= seen


def test_layers_start_different():
    net = Decoder(VOCABULARY, VARIANTS["mhe_add"].build, width=16, n_heads=4, n_layers=2, max_length=LENGTH)
    first, second = net.blocks
    assert first.attention is not second.attention
    for key, parameter in first.named_parameters():
        if not (key.endswith("bias") or "norm" in key):
            assert not torch.equal(parameter, second.get_parameter(key)), key


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_output(tied):
    net = decoder(tie_embeddings=tied)
    assert (net.head.weight is net.token_embedding.weight) == tied
    assert ("head.weight" in dict(net.named_parameters())) == (not tied)
    copy = decoder(tie_embeddings=tied, seed=5)
    tokens = draw(1, LENGTH)
    assert not torch.equal(copy(tokens), net(tokens))
    copy.load_state_dict(net.state_dict())
    assert torch.equal(copy.logits(copy(tokens)), net.logits(net(tokens)))
    assert (copy.head.weight is copy.token_embedding.weight) == tied


@every_attention
def test_a_state_dict_restores_the_net(name):
    net, other = decoder(name), decoder(name, seed=5)
    state = net.state_dict()
    assert len(state) == len(set(state))
    other.load_state_dict(state)
    assert torch.equal(other(draw(2, LENGTH)), net(draw(2, LENGTH)))


# Activation checkpointing and compilation


@every_attention
def test_recomputed_activations_give_the_same_loss_and_gradients_to_the_bit(name):
    results = []
    for recompute in (False, True, "selective"):
        factory = partial(VARIANTS[name].build, dropout=0.2)
        torch.manual_seed(0)
        net = Decoder(VOCABULARY, factory, width=16, n_heads=4, n_layers=2, max_length=LENGTH, dropout=0.2)
        parallelize(net, activation_checkpointing=recompute)
        assert net.checkpoint_activations == recompute
        torch.manual_seed(3)
        loss = net.loss(net(draw(2, LENGTH)), draw(2, LENGTH, seed=2))
        loss.backward()
        results.append({"loss": loss, **{key: p.grad for key, p in net.named_parameters()}})
    plain, *others = results
    for recomputed in others:
        assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


def test_checkpointing_recomputes_the_blocks():
    net = decoder().train()
    calls = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute, expected in ((False, 2), (True, 4)):
        net.checkpoint_activations = recompute
        calls.clear()
        net(draw(1, 4)).sum().backward()
        assert len(calls) == expected


def test_selective_checkpointing_keeps_less_than_all_and_more_than_none():
    kept = {}
    for recompute in (False, "selective", True):
        torch.manual_seed(0)
        net = decoder(width=64, n_layers=4).train()
        net.checkpoint_activations = recompute
        sizes: list[int] = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            counter = FlopCounterMode(display=False)
            with counter:
                hidden = net(draw(2, LENGTH))
                forward = counter.get_total_flops()
                hidden.sum().backward()
        kept[recompute] = sum(sizes), counter.get_total_flops() - forward
    assert kept[True][0] < kept[False][0]
    assert kept["selective"][1] == kept[False][1], "no matrix product is computed again"
    assert kept[True][1] > kept[False][1]


def test_compilation_keeps_the_names_of_the_parameters():
    net = decoder()
    names = list(net.state_dict())
    parallelize(net, compile=True)  # compiles at the first call, which does not happen here
    parallelize(net, compile=True)
    assert list(net.state_dict()) == names


@pytest.mark.slow
def test_compiled_blocks_give_the_eager_loss():
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler; neither c++, g++ nor clang++ is on PATH")
    losses = []
    for compile in (False, True):
        net = decoder(n_layers=1).train()
        names = list(net.state_dict())
        parallelize(net, compile=compile)
        loss = net.loss(net(draw(2, LENGTH)), draw(2, LENGTH, seed=2))
        loss.backward()
        losses.append((loss.item(), net.blocks[0].attention.w_q.weight.grad))
        assert list(net.state_dict()) == names
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    torch.testing.assert_close(losses[1][1], losses[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("option", "named"), [("compile", "blocks"), ("activation_checkpointing", "switch")])
def test_a_net_that_does_not_offer_what_is_asked_for_is_refused(option, named):
    with pytest.raises(ValueError, match=named):
        parallelize(nn.Linear(2, 2), **{option: True})


# What is refused


def test_too_long_a_sequence_is_refused_with_both_lengths():
    net = decoder()
    with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* {LENGTH} positions"):
        net(draw(1, LENGTH + 1))
    caches = net.new_caches()
    with torch.no_grad():
        net(draw(1, LENGTH - 2), caches=caches)
        with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* {LENGTH} positions"):
            net(draw(1, 3), caches=caches)
        net(draw(1, 2), caches=caches)  # what fits still does


def test_documents_with_padding_or_caches_are_refused():
    net, tokens = decoder(), draw(1, 4)
    documents, padding = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="documents"):
        net(tokens, documents=documents, padding=padding)
    with pytest.raises(ValueError, match="documents"):
        net(tokens, documents=documents, caches=net.new_caches())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"n_layers": 0}, r"n_layers \(0\)"),
        ({"max_length": 0}, r"max_length \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"dropout": -0.1}, r"dropout \(-0.1\)"),
        ({"n_heads": 5}, r"n_heads \(5\)"),
        ({"ff_width": 0}, r"feed-forward width \(0\)"),
        ({"activation": "swish"}, "activation"),
        pytest.param(
            {"loss_chunk": 0},
            r"loss_chunk \(0\)",
        ),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(settings, named):
    arguments = {"vocab_size": 8, "attention": MHA, "width": 16, "n_heads": 4, "n_layers": 1, **settings}
    with pytest.raises(ValueError, match=named):
        Decoder(**arguments)
