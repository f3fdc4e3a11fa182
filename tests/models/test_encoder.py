"""The encoder with every attention: padding, documents, segments, both kinds of blocks, initialisation, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from attention.oracle import VARIANTS
from mhe_lightning.attention import MHA
from mhe_lightning.distributed import parallelize
from mhe_lightning.models import Encoder
from mhe_lightning.models.layers import Block, FeedForward

every_attention = pytest.mark.parametrize("name", VARIANTS)
VOCABULARY, LENGTH = 23, 16


def encoder(name="mhe_add", *, dtype=torch.float64, seed=0, **kwargs) -> Encoder:
    """A small encoder whose numbers, biases and norms included, are of size one."""
    torch.manual_seed(seed)
    settings = {"width": 16, "n_heads": 4, "n_layers": 2, "max_length": LENGTH, "dropout": 0.0, **kwargs}
    net = Encoder(VOCABULARY, VARIANTS[name].build, **settings).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net.eval()


def draw(*shape: int, seed=1, high=VOCABULARY) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def document_ids(*rows: list[int]) -> torch.Tensor:
    """Ids of the documents of rows, given as the documents' lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in rows])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-10)


# Positions that are wanted


@every_attention
@pytest.mark.parametrize("recompute", [False, True])
def test_positions_that_are_kept_have_the_states_and_gradients_that_all_have(name, recompute):
    kept = torch.tensor([1, 5, 16, 31])
    results = []
    for only in (None, kept):
        net, tokens = encoder(name).train(), draw(2, LENGTH)
        net.checkpoint_activations = recompute
        hidden = net(tokens, kept=only)
        hidden = hidden if only is not None else hidden.flatten(0, 1)[kept]
        assert hidden.shape == (4, 16)
        hidden.square().sum().backward()
        results.append((hidden, *(p.grad for p in net.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_block_gives_the_positions_that_are_kept(norm_first):
    feed_forward = FeedForward(width=16, hidden=32, activation="gelu")
    settings = {"width": 16, "dropout": 0.0, "norm_eps": 1e-5, "norm_first": norm_first}
    block = Block(attention=MHA(width=16, n_heads=4), feed_forward=feed_forward, **settings).double()
    x, kept = torch.randn(2, 5, 16, dtype=torch.float64), torch.tensor([0, 7])
    assert_same(block(x, kept=kept), block(x).flatten(0, 1)[kept])


# What positions begin as


def test_sinusoidal_positions_begin_as_sinusoids_of_the_deviation_of_the_embeddings():
    torch.manual_seed(0)
    net = Encoder(VOCABULARY, MHA, width=64, n_heads=4, n_layers=1, position_init="sinusoidal", init_std=0.05)
    positions = net.position_embedding.weight.detach()
    half = positions[:, ::2].double()  # the sines; sin²+cos² is the same everywhere
    torch.testing.assert_close(half[1, 0] / (0.05 * 2**0.5), torch.tensor(1.0).double().sin())
    torch.testing.assert_close(positions.norm(dim=1), torch.full((512,), 0.05 * 64**0.5))
    assert net.position_embedding.weight.requires_grad


# What a position sees


@every_attention
def test_every_position_sees_those_before_and_after_it(name):
    net, tokens = encoder(name), draw(2, LENGTH)
    before = net(tokens)
    assert before.shape == (2, LENGTH, 16)
    for t in (0, 7, LENGTH - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        assert bool((net(changed) != before).any(-1).all())


@every_attention
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_where_padding_is_changes_nothing(name, side):
    net = encoder(name)
    lengths = [9, 4, 1]  # one row is nearly all padding
    padding = torch.arange(9) < torch.tensor(lengths)[:, None]
    if side == "left":
        padding = padding.flip(1)
    tokens = draw(3, 9)
    hidden = net(tokens, padding=padding)
    other = net(torch.where(padding, tokens, (tokens + 1) % VOCABULARY), padding=padding)
    assert bool(hidden.isfinite().all())  # those of the padding too, since 0 × NaN is NaN
    assert_same(other[padding], hidden[padding])


@every_attention
def test_a_padded_row_is_computed_as_if_unpadded(name):
    net = encoder(name)
    lengths = [9, 4, 1]
    tokens, segments = draw(3, 9), draw(3, 9, high=2)
    padding = torch.arange(9) < torch.tensor(lengths)[:, None]
    hidden = net(tokens, segments=segments, padding=padding)
    for row, n in enumerate(lengths):
        alone = net(tokens[row : row + 1, :n], segments=segments[row : row + 1, :n])
        assert_same(hidden[row : row + 1, :n], alone)


@every_attention
def test_a_document_is_computed_as_if_alone(name):
    net = encoder(name)
    lengths = ([5, 1, 7, 3], [16])
    tokens, segments = draw(2, LENGTH), draw(2, LENGTH, high=2)
    hidden = net(tokens, segments=segments, documents=document_ids(*lengths))
    for row, row_lengths in enumerate(lengths):
        start = 0
        for n in row_lengths:
            part = (slice(row, row + 1), slice(start, start + n))
            assert_same(hidden[part], net(tokens[part], segments=segments[part]))
            start += n


@every_attention
def test_documents_and_padding_go_together(name):
    net, tokens = encoder(name), draw(1, LENGTH)
    # three tokens of the second document are real; no token of the third is, so that its queries see nothing
    padding = torch.arange(LENGTH)[None] < 8
    hidden = net(tokens, documents=document_ids([5, 7, 4]), padding=padding)
    assert bool(hidden.isfinite().all())
    assert_same(hidden[:, :5], net(tokens[:, :5]))
    assert_same(hidden[:, 5:8], net(tokens[:, 5:8]))


def test_without_document_ids_documents_do_see_each_other():
    net, tokens = encoder(), draw(1, LENGTH)
    assert not torch.allclose(net(tokens)[:, :8], net(tokens[:, :8]))


@every_attention
def test_gradients_are_finite_where_queries_see_nothing(name):
    net = encoder(name).train()
    hidden = net(draw(1, LENGTH), documents=document_ids([5, 11]), padding=torch.arange(LENGTH)[None] < 5)
    hidden[:, :5].square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key  # None would stop distributed data-parallel training
        assert bool(parameter.grad.isfinite().all()), key


def test_positions_count_from_the_start_of_each_document():
    net, looked_up = encoder(), []
    net.position_embedding.register_forward_pre_hook(lambda _, inputs: looked_up.append(inputs[0]))
    net(draw(2, 8), documents=torch.tensor([[7, 7, 7, 9, 9, 9, 9, 2], [0, 1, 1, 1, 0, 0, 3, 3]]))
    assert looked_up[0].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 1, 2, 0, 1, 0, 1]]


def test_the_order_of_tokens_matters():
    net = encoder()
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert not torch.allclose(net(tokens.flip(1)).flip(1), net(tokens))


# Segments


@every_attention
def test_segments_matter_and_are_zero_unless_given(name):
    net, tokens = encoder(name), draw(2, LENGTH)
    plain = net(tokens)
    assert torch.equal(net(tokens, segments=torch.zeros_like(tokens)), plain)
    segments = torch.zeros_like(tokens)
    segments[:, 9:] = 1
    assert bool((net(tokens, segments=segments) != plain).any(-1).all())


def test_a_segment_that_the_net_has_not_is_refused():
    net, tokens = encoder(n_segments=1), draw(1, 4)
    net(tokens, segments=torch.zeros_like(tokens))
    with pytest.raises(IndexError):
        net(tokens, segments=torch.ones_like(tokens))


# The block against torch's


def counterparts(norm_first: bool) -> tuple[Block, nn.TransformerEncoderLayer]:
    """Our block with MHA and torch's layer, with the same weights, of size one."""
    torch.manual_seed(0)
    width, n_heads, hidden, eps = 12, 3, 20, 1e-3  # a large ε, so that a wrong one shows
    block = Block(
        attention=MHA(width=width, n_heads=n_heads),
        feed_forward=FeedForward(width=width, hidden=hidden, activation="gelu"),
        width=width,
        dropout=0.0,
        norm_eps=eps,
        norm_first=norm_first,
    ).double()
    layer = nn.TransformerEncoderLayer(
        width, n_heads, hidden, 0.0, "gelu", layer_norm_eps=eps, batch_first=True, norm_first=norm_first
    ).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    ours = block.state_dict()
    renamed = {
        "self_attn.out_proj": "attention.w_o",
        "linear1": "feed_forward.w_1",
        "linear2": "feed_forward.w_2",
        "norm1": "norm_1",
        "norm2": "norm_2",
    }
    state = {f"{new}.{kind}": ours[f"{old}.{kind}"] for new, old in renamed.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        state[f"self_attn.in_proj_{kind}"] = torch.cat([ours[f"attention.w_{x}.{kind}"] for x in "qkv"])
    layer.load_state_dict(state)
    return block, layer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_block_equals_torchs_encoder_layer(norm_first, padded):
    block, layer = counterparts(norm_first)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    padding = torch.arange(7) < torch.tensor([[7], [4]]) if padded else torch.ones(2, 7, dtype=torch.bool)
    ours = block(x, padding[:, None, None, :] if padded else None)
    theirs = layer(x, src_key_padding_mask=~padding if padded else None)
    torch.testing.assert_close(ours[padding], theirs[padding], rtol=0.0, atol=1e-12)


def test_where_the_norms_stand_matters():
    post, pre = counterparts(False)[0], counterparts(True)[0]
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    pre.load_state_dict(post.state_dict())
    assert not torch.allclose(pre(x), post(x))


def test_the_encoder_is_embeddings_a_norm_and_post_norm_blocks():
    net, tokens, segments = encoder(), draw(2, LENGTH), draw(2, LENGTH, high=2)
    x = net.token_embedding.weight[tokens] + net.position_embedding.weight + net.segment_embedding.weight[segments]
    x = nn.functional.layer_norm(x, (16,), net.norm.weight, net.norm.bias, eps=1e-12)
    for block in net.blocks:
        x = block.norm_1(x + block.attention(x))
        x = block.norm_2(x + block.feed_forward(x))
    assert_same(net(tokens, segments=segments), x)


# Dropout and activation checkpointing


def test_dropout_drops_in_training_only():
    net, tokens = encoder(dropout=0.5), draw(1, LENGTH)
    assert torch.equal(net(tokens), net(tokens))
    net.train()
    assert not torch.equal(net(tokens), net(tokens))


@every_attention
def test_recomputed_activations_give_the_same_gradients_to_the_bit(name):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        factory = partial(VARIANTS[name].build, dropout=0.2)
        net = Encoder(VOCABULARY, factory, width=16, n_heads=4, n_layers=2, max_length=LENGTH, dropout=0.2)
        parallelize(net, activation_checkpointing=recompute)
        calls = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        hidden = net(draw(2, LENGTH), padding=torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]]))
        hidden.square().sum().backward()
        assert len(calls) == (4 if recompute else 2)
        results.append({"hidden": hidden, **{key: p.grad for key, p in net.named_parameters()}})
    plain, recomputed = results
    assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


# Sizes and initialisation


def test_bert_base_has_as_many_parameters_as_bert_without_its_pooler():
    with torch.device("meta"):
        net = Encoder(30522, MHA)  # the sizes are the defaults
    assert sum(p.numel() for p in net.parameters()) == 109_482_240 - (768 * 768 + 768)


@every_attention
def test_initial_numbers(name):
    torch.manual_seed(0)
    net = Encoder(2000, VARIANTS[name].build, width=128, n_heads=8, n_layers=2, max_length=1000, n_segments=50)
    matrices = 0
    for key, parameter in net.named_parameters():
        if "norm" in key:
            assert torch.equal(parameter, torch.full_like(parameter, float(key.endswith("weight")))), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            matrices += 1
            # six standard errors of a standard deviation and of a mean, estimated from so many numbers
            assert abs(parameter.std().item() - 0.02) < 6 * 0.02 / (2 * parameter.numel()) ** 0.5, key
            assert abs(parameter.mean().item()) < 6 * 0.02 / parameter.numel() ** 0.5, key
    assert matrices >= 3 + 2 * 4  # embeddings; of each layer at least two projections of attention and w_1, w_2


def test_without_biases_only_attention_has_them():
    net = Encoder(VOCABULARY, MHA, width=16, n_heads=4, n_layers=1, max_length=LENGTH, bias=False)
    assert all(".attention." in key for key, _ in net.named_parameters() if key.endswith("bias"))


def test_layers_start_different():
    net = Encoder(VOCABULARY, VARIANTS["mhe_add"].build, width=16, n_heads=4, n_layers=2, max_length=LENGTH)
    first, second = net.blocks
    for key, parameter in first.named_parameters():
        if not (key.endswith("bias") or "norm" in key):
            assert not torch.equal(parameter, second.get_parameter(key)), key


# What is refused


def test_too_long_a_sequence_is_refused_with_both_lengths():
    net = encoder()
    net(draw(1, LENGTH))
    with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* {LENGTH} positions"):
        net(draw(1, LENGTH + 1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"n_layers": 0}, r"n_layers \(0\)"),
        ({"max_length": 0}, r"max_length \(0\)"),
        ({"n_segments": 0}, r"n_segments \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"dropout": -0.1}, r"dropout \(-0.1\)"),
        ({"n_heads": 5}, r"n_heads \(5\)"),
        ({"ff_width": 0}, r"feed-forward width \(0\)"),
        ({"activation": "swish"}, "activation"),
        ({"init_std": 0.0}, r"init_std \(0.0\)"),
        ({"position_init": "random"}, r"position_init \('random'\)"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(settings, named):
    arguments = {"vocab_size": 8, "attention": MHA, "width": 16, "n_heads": 4, "n_layers": 1, **settings}
    with pytest.raises(ValueError, match=named):
        Encoder(**arguments)
