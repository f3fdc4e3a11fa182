"""The encoder-decoder: against torch's, with every attention in each place, padding, caches, embeddings, refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attention.oracle import VARIANTS
from mhe_lightning.accounting import parameters_by_part
from mhe_lightning.attention import MHA, MHE, MQA, SHA, Attention
from mhe_lightning.distributed import parallelize
from mhe_lightning.models import EncoderDecoder

every_attention = pytest.mark.parametrize("name", VARIANTS)
PLACES = ("encoder_attention", "decoder_attention", "cross_attention")
VOCABULARY, LENGTH, WIDTH, HEADS = 23, 12, 16, 4
SOURCES, TARGETS = [7, 3, 1, 5], [4, 9, 6, 1]  # lengths of a batch of pairs


def encoder_decoder(attention="mhe_add", *, dtype=torch.float64, seed=0, **kwargs) -> EncoderDecoder:
    """A small net whose numbers, biases and norms included, are of size one; attentions are names of variants."""
    torch.manual_seed(seed)
    settings = {"width": WIDTH, "n_heads": HEADS, "n_layers": 2, "max_length": LENGTH, "dropout": 0.0, **kwargs}
    places = {place: VARIANTS[settings.pop(place)].build for place in PLACES if place in settings}
    net = EncoderDecoder(VOCABULARY, VARIANTS[attention].build, **places, **settings).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net.eval()


def draw(*shape: int, seed=1) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def real(lengths: list[int]) -> Tensor:
    """(B, longest), True = a real token."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources, what the decoder reads, its targets and the sources' padding; where padding is, tokens are random."""
    padding, predicted = real(SOURCES), real(TARGETS)
    targets = draw(*predicted.shape, seed=3).masked_fill(~predicted, -100)
    return draw(*padding.shape), draw(*predicted.shape, seed=2), targets, padding


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By parameter; an absent one, which would stop distributed data-parallel training, raises."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# Against torch's


def literal_positions(length: int, width: int) -> Tensor:
    """Section 3.5 of Vaswani et al. 2017, one number after the other."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for position in range(length):
        for channel in range(width):
            angle = position / 10000 ** ((channel - channel % 2) / width)
            table[position, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    return table


def torchs_transformer(net: EncoderDecoder, ff_width: int, norm_eps: float) -> nn.Transformer:
    """torch's transformer without its two final norms, with the weights of ``net``."""
    sizes = {"dim_feedforward": ff_width, "dropout": 0.0, "layer_norm_eps": norm_eps, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, **sizes), len(net.encoder_blocks))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **sizes), len(net.decoder_blocks))
    theirs = nn.Transformer(WIDTH, HEADS, custom_encoder=encoder, custom_decoder=decoder, batch_first=True).double()
    theirs.load_state_dict(renamed({name: p.detach() for name, p in net.named_parameters()}))
    return theirs


def renamed(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to blocks, by the names of torch's transformer."""
    state: dict[str, Tensor] = {}
    for side, attentions, norms in (
        ("encoder", {"self_attn": "attention"}, {"norm1": "norm_1", "norm2": "norm_2"}),
        (
            "decoder",
            {"self_attn": "attention", "multihead_attn": "cross_attention"},
            {"norm1": "norm_1", "norm2": "norm_cross", "norm3": "norm_2"},
        ),
    ):
        layers = {name.split(".")[1] for name in ours if name.startswith(f"{side}_blocks.")}
        for layer in layers:
            block, theirs = f"{side}_blocks.{layer}", f"{side}.layers.{layer}"
            for kind in ("weight", "bias"):
                for new, old in attentions.items():
                    state[f"{theirs}.{new}.in_proj_{kind}"] = torch.cat(
                        [ours[f"{block}.{old}.w_{x}.{kind}"] for x in "qkv"]
                    )
                    state[f"{theirs}.{new}.out_proj.{kind}"] = ours[f"{block}.{old}.w_o.{kind}"]
                for new, old in {**norms, "linear1": "feed_forward.w_1", "linear2": "feed_forward.w_2"}.items():
                    state[f"{theirs}.{new}.{kind}"] = ours[f"{block}.{old}.{kind}"]
    return state


def test_hidden_states_and_gradients_equal_those_of_torchs_transformer():
    ff_width, eps = 20, 1e-3  # a large ε, so that a wrong one shows
    net = encoder_decoder("mha", n_decoder_layers=3, ff_width=ff_width, norm_eps=eps).train()
    theirs = torchs_transformer(net, ff_width, eps).train()
    tokens, target_tokens, _, padding = pairs()
    hidden = net(tokens, target_tokens, padding)
    cotangent = torch.randn_like(hidden)
    own = gradients(net, (hidden * cotangent).sum())

    table = net.token_embedding.weight.detach().clone().requires_grad_()
    positions = net.positions  # tested below

    def embedded(ids: Tensor) -> Tensor:
        return table[ids] * math.sqrt(WIDTH) + positions[: ids.shape[1]]

    T = target_tokens.shape[1]
    expected = theirs(
        embedded(tokens),
        embedded(target_tokens),
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),  # True = may not attend
        src_key_padding_mask=~padding,
        memory_key_padding_mask=~padding,
    )
    assert_same(hidden, expected)
    (expected * cotangent).sum().backward()
    assert_same(own["token_embedding.weight"], table.grad, atol=1e-9)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    found = renamed(own)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.0, atol=1e-9, msg=name)


# Sentences in a batch and alone

# every variant in all places, and in each of the places among MHA
PLACEMENTS = [{"attention": name} for name in VARIANTS] + [
    {"attention": "mha", place: name} for place in PLACES for name in VARIANTS if name != "mha"
]
every_placement = pytest.mark.parametrize(
    "placement", PLACEMENTS, ids=["-".join([*list(p)[1:], list(p.values())[-1]]) for p in PLACEMENTS]
)


@every_placement
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_batch_has_the_loss_and_gradients_of_its_sentences_alone(placement, label_smoothing):
    net = encoder_decoder(**placement, loss_chunk=5).train()
    tokens, target_tokens, targets, padding = pairs()

    def total(hidden: Tensor, wanted: Tensor) -> Tensor:
        return net.loss(hidden, wanted, label_smoothing=label_smoothing)

    mean = total(net(tokens, target_tokens, padding), targets) / sum(TARGETS)
    weighted = torch.zeros((), dtype=torch.float64)
    for row, (S, T) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        part = slice(row, row + 1)
        alone = total(net(tokens[part, :S], target_tokens[part, :T]), targets[part, :T]) / T
        weighted = weighted + alone * T / sum(TARGETS)
    assert_same(mean, weighted)
    together, apart = gradients(net, mean), gradients(net, weighted)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=0.0, atol=1e-10, msg=name)


@every_attention
def test_token_losses_are_those_of_the_sentences_alone(name):
    net = encoder_decoder(name)
    tokens, target_tokens, targets, padding = pairs()
    losses = net.token_losses(net(tokens, target_tokens, padding), targets)
    assert_same(losses.sum(), net.loss(net(tokens, target_tokens, padding), targets))
    for row, (S, T) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        logits = net.logits(net(tokens[row : row + 1, :S], target_tokens[row : row + 1, :T]))
        assert_same(losses[row, :T], nn.functional.cross_entropy(logits[0], targets[row, :T], reduction="none"))
        assert not losses[row, T:].any()


# What a position sees


@every_attention
def test_what_stands_where_padding_is_changes_nothing(name):
    net = encoder_decoder(name)
    tokens, target_tokens, targets, padding = pairs()
    predicted = targets != -100
    hidden = net(tokens, target_tokens, padding)
    assert bool(hidden.isfinite().all())
    other = net(
        torch.where(padding, tokens, (tokens + 1) % VOCABULARY),
        torch.where(predicted, target_tokens, (target_tokens + 1) % VOCABULARY),
        padding,
    )
    assert_same(other[predicted], hidden[predicted])
    assert not torch.allclose(other[~predicted], hidden[~predicted])


@every_attention
def test_later_target_tokens_change_nothing_before_them(name):
    net, tokens, target_tokens = encoder_decoder(name), draw(2, 5), draw(2, 8, seed=2)
    before = net(tokens, target_tokens)
    assert before.shape == (2, 8, WIDTH)
    for t in (1, 4, 7):
        changed = target_tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCABULARY
        after = net(tokens, changed)
        assert_same(after[:, :t], before[:, :t])
        assert bool((after[:, t:] != before[:, t:]).any(-1).all())


@every_attention
def test_every_target_position_sees_every_source_token(name):
    net, tokens, target_tokens = encoder_decoder(name), draw(2, 5), draw(2, 8, seed=2)
    before = net(tokens, target_tokens)
    for t in range(5):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        assert bool((net(changed, target_tokens) != before).any(-1).all())


@every_attention
def test_a_source_token_is_encoded_from_those_before_and_after_it(name):
    net, tokens = encoder_decoder(name), draw(2, 5)
    before = net.encode(tokens)
    for t in (0, 4):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        assert bool((net.encode(changed) != before).any(-1).all())


# Incremental decoding


@every_attention
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
@torch.no_grad()
def test_decoding_over_caches_equals_the_full_pass(name, k, steps):
    net = encoder_decoder(name)
    tokens, padding = draw(4, 7), real(SOURCES)
    target_tokens = draw(4 * k, 9, seed=2)
    source = net.encode(tokens, padding)
    caches = net.new_caches(7, 9)
    parts = [net.decode(part, source, padding, caches) for part in target_tokens.split(steps, dim=1)]
    full = net(tokens.repeat_interleave(k, 0), target_tokens, padding.repeat_interleave(k, 0))
    assert_same(torch.cat(parts, dim=1), full)
    assert_same(net.decode(target_tokens, source, padding), full)


@every_attention
@torch.no_grad()
def test_caches_hold_what_the_mechanism_says_and_the_source_once(name):
    net, k = encoder_decoder(name), 3
    caches = net.new_caches(5)
    net.decode(draw(2 * k, 1), net.encode(draw(2, 5)), caches=caches)
    expected = VARIANTS[name].cached(HEADS, WIDTH // HEADS)
    assert len(caches) == 2
    for cache in caches:
        assert cache.own.elements_per_token == cache.source.elements_per_token == expected
        assert {stored.shape[0] for stored in cache.source.stored()} == {2}
        assert {stored.shape[0] for stored in cache.own.stored()} == {2 * k}
        assert (cache.source.length, cache.source.max_length) == (5, 5)
        assert (cache.own.length, cache.own.max_length) == (1, LENGTH)


@pytest.mark.parametrize("name", ["mhe_add", "mhe_multiply", "mqa", "sha"])
@torch.no_grad()
def test_a_shared_key_makes_caches_smaller_by_the_number_of_heads(name):
    sizes = {}
    for variant in ("mha", name):
        net = encoder_decoder(variant)
        caches = net.new_caches(5, 6)
        net.decode(draw(2, 1), net.encode(draw(2, 5)), caches=caches)
        sizes[variant] = [part.nbytes for cache in caches for part in cache]
    assert [HEADS * size for size in sizes[name]] == sizes["mha"]


@every_attention
@torch.no_grad()
def test_keys_and_values_of_the_source_are_computed_once_in_each_layer(name, monkeypatch):
    net = encoder_decoder(name, n_decoder_layers=3)
    calls = []
    for i, block in enumerate(net.decoder_blocks):
        original = block.cross_attention.key_value

        def key_value(context, i=i, original=original):
            calls.append(i)
            return original(context)

        monkeypatch.setattr(block.cross_attention, "key_value", key_value)
    source, caches = net.encode(draw(2, 5)), net.new_caches(5)
    for step in range(8):
        net.decode(draw(6, 1, seed=step), source, caches=caches)
    assert calls == [0, 1, 2]


# Which attention stands where


def places(net: EncoderDecoder) -> dict[str, list[Attention]]:
    return {
        "encoder_attention": [block.attention for block in net.encoder_blocks],
        "decoder_attention": [block.attention for block in net.decoder_blocks],
        "cross_attention": [block.cross_attention for block in net.decoder_blocks],
    }


@pytest.mark.parametrize("place", PLACES)
def test_an_attention_of_a_place_is_in_that_place_alone(place):
    net = encoder_decoder("mha", **{place: "mhe_add"})
    for other, modules in places(net).items():
        assert {type(m) for m in modules} == {MHE if other == place else MHA}, other


def test_one_attention_is_in_all_places_unless_they_have_their_own():
    assert {type(m) for modules in places(encoder_decoder("mqa")).values() for m in modules} == {MQA}
    own = encoder_decoder("mqa", encoder_attention="mha", decoder_attention="sha", cross_attention="mhe_add")
    assert [{type(m) for m in modules} for modules in places(own).values()] == [{MHA}, {SHA}, {MHE}]


@every_attention
def test_every_layer_has_attentions_of_its_own(name):
    net = encoder_decoder(name, n_layers=2, n_decoder_layers=3)
    modules = [m for some in places(net).values() for m in some]
    assert len(modules) == len({id(m) for m in modules}) == 2 + 3 + 3
    parameters = [id(p) for m in modules for p in m.parameters()]
    assert len(parameters) == len(set(parameters))


def test_layers_start_different():
    net = EncoderDecoder(VOCABULARY, MHE, width=WIDTH, n_heads=HEADS, n_layers=2, max_length=LENGTH)
    for first, second in (net.encoder_blocks, net.decoder_blocks):
        for key, parameter in first.named_parameters():
            if not (key.endswith("bias") or "norm" in key):
                assert not torch.equal(parameter, second.get_parameter(key)), key


@pytest.mark.parametrize(("given", "expected"), [(None, 2), (1, 1), (5, 5)])
def test_the_decoder_has_as_many_layers_as_the_encoder_or_its_own_number(given, expected):
    net = encoder_decoder(n_decoder_layers=given)
    assert (len(net.encoder_blocks), len(net.decoder_blocks)) == (2, expected)
    assert net.blocks == [*net.encoder_blocks, *net.decoder_blocks]
    assert len(net.new_caches(3)) == expected
    assert net(draw(1, 3), draw(1, 4)).shape == (1, 4, WIDTH)


# Embeddings and positions


@pytest.mark.parametrize("width", [16, 30])
def test_positions_are_the_sinusoids_of_the_paper(width):
    net = encoder_decoder(width=width, n_heads=2, max_length=300)
    assert_same(net.positions, literal_positions(300, width), atol=1e-4)  # angles up to 300 in float32


def test_embeddings_are_scaled_by_the_root_of_the_width_and_added_to_positions():
    net = encoder_decoder(share_embeddings=False)
    read = []
    for side in (net.encoder_blocks, net.decoder_blocks):
        side[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    tokens, target_tokens = draw(2, 5), draw(2, 8, seed=2)
    net(tokens, target_tokens)
    for x, ids, embedding in zip(
        read, (tokens, target_tokens), (net.token_embedding, net.target_embedding), strict=True
    ):
        expected = 4.0 * embedding.weight[ids] + literal_positions(ids.shape[1], WIDTH)  # √16
        assert_same(x, expected, atol=1e-5)


def test_positions_are_neither_parameters_nor_in_the_state_dict():
    net = encoder_decoder()
    assert "positions" in dict(net.named_buffers())
    assert not any("position" in key for key in net.state_dict())
    sizes = {length: sum(p.numel() for p in encoder_decoder(max_length=length).parameters()) for length in (8, 80)}
    assert sizes[8] == sizes[80]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_shared_and_tied_matrices_are_one(share, tie):
    net = encoder_decoder(share_embeddings=share, tie_embeddings=tie)
    assert (net.target_embedding is net.token_embedding) == share
    assert (net.head.weight is net.target_embedding.weight) == tie
    matrices = 3 - share - tie
    counts = parameters_by_part(net)
    assert counts["embeddings"] + counts["head"] == matrices * VOCABULARY * WIDTH
    rest = sum(p.numel() for block in net.blocks for p in block.parameters())
    assert sum(p.numel() for p in net.parameters()) == rest + matrices * VOCABULARY * WIDTH


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_a_state_dict_restores_the_net_and_what_is_shared(share, tie):
    settings = {"share_embeddings": share, "tie_embeddings": tie}
    net, other = encoder_decoder(**settings), encoder_decoder(seed=5, **settings)
    tokens, target_tokens = draw(2, 5), draw(2, 8, seed=2)
    expected = net.logits(net(tokens, target_tokens))
    assert not torch.equal(other.logits(other(tokens, target_tokens)), expected)
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other.logits(other(tokens, target_tokens)), expected)
    assert (other.target_embedding.weight is other.token_embedding.weight) == share
    assert (other.head.weight is other.target_embedding.weight) == tie


@every_attention
def test_every_parameter_has_a_gradient(name):
    net = encoder_decoder(name, share_embeddings=False, tie_embeddings=False).train()
    tokens, target_tokens, targets, padding = pairs()
    found = gradients(net, net.loss(net(tokens, target_tokens, padding), targets))
    dead = VARIANTS[name].dead
    for key, gradient in found.items():
        assert bool(gradient.isfinite().all()), key
        if not key.endswith(dead) and not key.endswith(("w_k.bias", "w_kv.bias")):  # of a key alone: cancels
            assert bool(gradient.any()), key


# Initialisation


@every_attention
def test_initial_numbers(name):
    torch.manual_seed(0)
    net = EncoderDecoder(
        2000, VARIANTS[name].build, width=128, n_heads=4, n_layers=2, share_embeddings=False, tie_embeddings=False
    )
    seen = set()
    for key, parameter in net.named_parameters():
        if "norm" in key:
            assert torch.equal(parameter, torch.full_like(parameter, float(key.endswith("weight")))), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        elif ".e_" not in key:
            kind = key.removesuffix(".weight").rpartition("_blocks.")[2].partition(".")[2] or key
            seen.add(kind)
            # Glorot's of a matrix (4·128, 128) in feed-forward layers, 1/√D everywhere else
            std = math.sqrt(2 / (5 * 128)) if "feed_forward" in kind else 128**-0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.05), key
            assert abs(parameter.mean().item()) < 6 * std / math.sqrt(parameter.numel()), key
            if "_blocks" in key:  # uniform
                assert parameter.abs().max().item() == pytest.approx(std * math.sqrt(3), rel=0.01), key
    assert {"token_embedding.weight", "target_embedding.weight", "head.weight"} <= seen
    assert {"attention.w_q", "cross_attention.w_q", "attention.w_o", "cross_attention.w_o"} <= seen
    assert {"feed_forward.w_1", "feed_forward.w_2"} <= seen


@pytest.mark.parametrize("combine", ["add", "multiply"])
def test_head_embeddings_begin_as_the_attention_made_them(combine):
    made = []

    def factory(**kwargs):
        attention = MHE(combine=combine, embedding_std=3.0, **kwargs)
        made.append((attention, {x: getattr(attention, x).detach().clone() for x in ("e_q", "e_k", "e_v")}))
        return attention

    EncoderDecoder(VOCABULARY, factory, width=WIDTH, n_heads=HEADS, n_layers=2, max_length=LENGTH)
    assert len(made) == 6
    for attention, before in made:
        for name, numbers in before.items():
            assert torch.equal(getattr(attention, name), numbers), name


# Dropout, activation checkpointing, compilation, sizes


def test_dropout_drops_in_training_only():
    net, tokens, target_tokens = encoder_decoder(dropout=0.5), draw(1, 5), draw(1, 8)
    assert torch.equal(net(tokens, target_tokens), net(tokens, target_tokens))
    net.train()
    assert not torch.equal(net.encode(tokens), net.encode(tokens))
    source = net.encode(tokens).detach()
    assert not torch.equal(net.decode(target_tokens, source), net.decode(target_tokens, source))


@every_attention
def test_recomputed_activations_give_the_same_loss_and_gradients_to_the_bit(name):
    results = []
    tokens, target_tokens, targets, padding = pairs()
    for recompute in (False, True):
        factory = partial(VARIANTS[name].build, dropout=0.2)
        torch.manual_seed(0)
        net = EncoderDecoder(
            VOCABULARY, factory, width=WIDTH, n_heads=HEADS, n_layers=2, n_decoder_layers=1, dropout=0.2
        )
        parallelize(net, activation_checkpointing=recompute)
        calls = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        loss = net.loss(net(tokens, target_tokens, padding), targets)
        results.append({"loss": loss, **gradients(net, loss)})
        assert len(calls) == (6 if recompute else 3)
    plain, recomputed = results
    assert all(torch.equal(recomputed[key], plain[key]) for key in plain)


def test_compilation_is_of_every_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *args, **kwargs: compiled.append(module))
    net = encoder_decoder(n_layers=2, n_decoder_layers=3)
    names = list(net.state_dict())
    parallelize(net, compile=True)
    assert compiled == [*net.encoder_blocks, *net.decoder_blocks]
    assert list(net.state_dict()) == names


def test_it_can_be_made_without_memory():
    with torch.device("meta"):
        net = EncoderDecoder(37000, MHA)  # the sizes are the defaults: the paper's base model
    assert all(tensor.is_meta for tensor in [*net.parameters(), *net.buffers()])
    D, ff = 512, 2048
    attention, feed_forward, norm = 4 * (D * D + D), 2 * D * ff + ff + D, 2 * D
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    assert sum(p.numel() for p in net.parameters()) == 37000 * D + layers


@every_attention
@pytest.mark.parametrize("tie", [False, True])
def test_parts_are_counted_in_all_three_places_and_once(name, tie):
    net = encoder_decoder(name, n_decoder_layers=3, tie_embeddings=tie)
    counts = parameters_by_part(net)
    modules = [m for some in places(net).values() for m in some]
    attention = sum(p.numel() for m in modules for p in m.parameters())
    assert counts["attention_qkv"] + counts["attention_output"] == attention
    assert counts["attention_output"] == len(modules) * (WIDTH * WIDTH + WIDTH)
    assert counts["norms"] == (2 * 2 + 3 * 3) * 2 * WIDTH
    assert counts["embeddings"] == VOCABULARY * WIDTH
    assert counts["head"] == (0 if tie else VOCABULARY * WIDTH)
    assert counts["other"] == 0
    assert counts["total"] == sum(p.numel() for p in net.parameters())


def test_without_biases_only_attention_has_them():
    net = encoder_decoder("mha", bias=False)
    assert all("attention." in key for key, _ in net.named_parameters() if key.endswith("bias"))


# What is refused


def test_too_long_a_source_or_target_is_refused_with_both_lengths():
    net = encoder_decoder()
    net(draw(1, LENGTH), draw(1, LENGTH))
    for tokens, target_tokens in ((LENGTH + 1, 3), (3, LENGTH + 1)):
        with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* {LENGTH} positions"):
            net(draw(1, tokens), draw(1, target_tokens))


@torch.no_grad()
def test_too_long_a_target_over_caches_is_refused_with_its_whole_length():
    net = encoder_decoder()
    source, caches = net.encode(draw(1, 5)), net.new_caches(5)
    net.decode(draw(1, LENGTH - 2), source, caches=caches)
    with pytest.raises(ValueError, match=rf"{LENGTH + 1} tokens .* {LENGTH} positions"):
        net.decode(draw(1, 3), source, caches=caches)
    net.decode(draw(1, 2), source, caches=caches)  # what fits still does


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"n_layers": 0}, r"n_layers \(0\)"),
        ({"n_decoder_layers": 0}, r"n_decoder_layers \(0\)"),
        ({"max_length": 0}, r"max_length \(0\)"),
        ({"loss_chunk": 0}, r"loss_chunk \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"dropout": -0.1}, r"dropout \(-0.1\)"),
        ({"n_heads": 5}, r"n_heads \(5\)"),
        ({"ff_width": 0}, r"feed-forward width \(0\)"),
        ({"activation": "swish"}, "activation"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(settings, named):
    arguments = {"vocab_size": 8, "attention": MHA, "width": 16, "n_heads": 4, "n_layers": 1, **settings}
    with pytest.raises(ValueError, match=named):
        EncoderDecoder(**arguments)
