"""Conversions: exact where the attention is one of the new kind already, near where it is not, and of real tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import yaml

from mhe_lightning.attention import GQA, MHA, MHE, MQA, SHA, SKV, ELAttention
from mhe_lightning.checkpoint import RECORD, config_of, read_checkpoint
from mhe_lightning.data.tokenizer import train_tokenizer
from mhe_lightning.interop.calibration import (
    AttentionInput,
    first_calls,
    inputs_of,
    measure,
    real_queries,
    texts_as_batches,
)
from mhe_lightning.interop.conversion import convert_attention, convert_net
from mhe_lightning.interop.solving import problem_of, solve
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.nets import load_net
from mhe_lightning.text_batches import TokenBatch, attentions_of
from mhe_lightning.verbs.convert import calibration_texts, converted_spec
from mhe_lightning.weights_only import ORIGIN, write_weights

MUL, ADD = partial(MHE, combine="multiply"), partial(MHE, combine="add")
TARGETS = {
    "mhe_mul": MUL,
    "mhe_add": ADD,
    "mqa": MQA,
    "gqa": partial(GQA, n_kv_heads=2),
    "sha": SHA,
    "skv": SKV,
    "el": ELAttention,
}
SIZES = dict(width=16, n_heads=4, n_layers=2, max_length=16, dropout=0.0)
VOCABULARY = 40
NETS = [Encoder, Decoder, EncoderDecoder]
TEXT = ["the cat sings under a tree", "", "a dog runs slowly over the stone", "birds sleep with light"] * 4


def net_of(kind, attention, seed=0, **sizes):
    """A model in float64 whose attentions have weights that are far from zero."""
    torch.manual_seed(seed)
    net = kind(vocab_size=VOCABULARY, attention=attention, **{**SIZES, **sizes}).double()
    with torch.no_grad():
        for module in attentions_of(net).values():
            for name, parameter in module.named_parameters():
                parameter.normal_(std=0.5 if "weight" in name else 0.3)
    return net.eval()


def batches_for(net, rows=6, count=3, seed=5, padded=True):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = torch.randint(VOCABULARY, (rows, 10), generator=draw)
        lengths = torch.randint(4, 11, (rows, 1), generator=draw) if padded else torch.full((rows, 1), 10)
        real = torch.arange(10) < lengths
        if isinstance(net, EncoderDecoder):
            targets = torch.randint(VOCABULARY, (rows, 9), generator=draw)
            found.append(TokenBatch(tokens, real, targets, torch.arange(9) < lengths - 1))
        else:
            found.append(TokenBatch(tokens, real))
    return found


@torch.no_grad()
def states(net, batch):
    """Hidden states (N, D) of the real tokens."""
    if batch.target_tokens is None:
        return net(batch.tokens, padding=batch.padding)[batch.padding]
    return net(batch.tokens, batch.target_tokens, padding=batch.padding)[batch.target_padding]


@torch.no_grad()
def as_mha(net, kind):
    """The same function with MHA: each head gets its own copy of what heads share."""
    twin = net_of(kind, MHA)
    shared = {k: v for k, v in net.state_dict().items() if "attention." not in k}
    twin.load_state_dict(shared, strict=False)
    for place, old in attentions_of(net).items():
        new, n, d = attentions_of(twin)[place], old.n_heads, old.head_dim
        scale, scale_v = torch.ones(n, d).double(), torch.ones(n, d).double()
        bias, out = torch.zeros(n, d).double(), torch.zeros(n, d).double()
        if isinstance(old, MHE) and old.combine == "multiply":
            scale, scale_v = (1 + old.e_q) * (1 + old.e_k), 1 + old.e_v
        elif isinstance(old, MHE):
            bias, out = old.e_q, old.e_v
        w_q, b_q = old.w_q.weight.view(-1, d, old.width), old.w_q.bias.view(-1, d)
        new.w_q.weight.copy_((w_q * scale[..., None]).flatten(0, 1))
        new.w_q.bias.copy_((b_q * scale + bias).flatten())
        for name in ("w_k", "w_v"):
            theirs = getattr(old, name)
            copies = n * d // len(theirs.weight)
            getattr(new, name).weight.copy_(
                theirs.weight.view(-1, d, old.width).repeat_interleave(copies, 0).flatten(0, 1)
            )
            getattr(new, name).bias.copy_(theirs.bias.view(-1, d).repeat_interleave(copies, 0).flatten())
        new.w_o.weight.copy_(old.w_o.weight * scale_v.flatten())
        new.w_o.bias.copy_(old.w_o.bias + old.w_o.weight @ out.flatten())
    return twin


@pytest.mark.parametrize("fit", [True, False], ids=["fitted", "solved"])
@pytest.mark.parametrize("name", ["mhe_mul", "mhe_add", "mqa", "gqa"])
@pytest.mark.parametrize("kind", NETS)
def test_heads_that_share_what_the_new_attention_shares_are_recovered_exactly(kind, name, fit):
    source = as_mha(net_of(kind, TARGETS[name]), kind)
    target = net_of(kind, TARGETS[name], seed=9)

    layers = convert_net(source, target, batches_for(source), fit=fit)

    new = batches_for(source, seed=77, count=1)[0]
    torch.testing.assert_close(states(target, new), states(source, new), rtol=0, atol=1e-8)
    assert max(max(layer.scores, layer.values, layer.fitted) for layer in layers) < 1e-12


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", NETS)
def test_a_conversion_is_nearer_than_random_attentions(kind, name):
    source, target = net_of(kind, MHA), net_of(kind, TARGETS[name], seed=9)
    batches = batches_for(source, rows=24)
    new = batches_for(source, seed=77, count=1)[0]
    blank = net_of(kind, TARGETS[name], seed=9)
    blank.load_state_dict({k: v for k, v in source.state_dict().items() if "attention." not in k}, strict=False)

    convert_net(source, target, batches)

    errors = [(states(net, new) - states(source, new)).square().sum() for net in (target, blank)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", NETS)
def test_every_attention_is_reported_in_the_order_in_which_it_was_converted(kind, name):
    source, target = net_of(kind, MHA), net_of(kind, TARGETS[name])
    told = []

    layers = convert_net(source, target, batches_for(source), progress=told.append)

    assert told == layers
    assert {(layer.place, layer.layer) for layer in layers} == set(attentions_of(source))
    # what fits W_O is the sum over tokens, and the ridge keeps it from the least of it
    assert all(0 <= layer.fitted <= layer.output + 1e-12 for layer in layers)


@pytest.mark.parametrize("name", TARGETS)
def test_attentions_without_biases_are_converted(name):
    def unbiased(cls):
        return partial(cls, bias=False)

    source, target = net_of(Decoder, unbiased(MHA)), net_of(Decoder, unbiased(TARGETS[name]))

    layers = convert_net(source, target, batches_for(source))

    assert all(layer.fitted < 1 for layer in layers)


def test_without_biases_what_is_solved_has_none_either():
    source = net_of(Decoder, partial(MHA, bias=False))
    problem = problem_of(first_attention(source), measure(first_attention(source), first_inputs(source)), 1e-2)

    with torch.no_grad():
        for name in ("mhe_mul", "mqa", "sha"):
            new = TARGETS[name](width=16, n_heads=4, bias=False).double()
            assert solve(new, problem).queries[:, -1].abs().max() < 1e-10


def first_attention(net):
    return net.blocks[0].attention


def first_inputs(net, **options):
    batches = batches_for(net, **options)
    block = net.blocks[0]
    with torch.no_grad():
        return inputs_of(block.attention, block, first_calls(net, block, batches), real_queries(batches, "self"))


@pytest.mark.parametrize("name", ["mhe_mul", "mqa", "gqa"])
def test_the_data_s_metric_gives_better_scores_and_values_than_none(name):
    source = net_of(Encoder, MHA)
    attention, inputs = first_attention(source), first_inputs(source, rows=12)
    scale = torch.logspace(0, -2, 16).double()
    inputs = [one._replace(x=one.x * scale) for one in inputs]  # hidden states that take some directions hardly
    measured = measure(attention, inputs)
    flat = measured._replace(
        queries=torch.eye(17).double(),
        keys=torch.eye(16).double().repeat(4, 1, 1),
        values=torch.eye(16).double().repeat(4, 1, 1),
    )
    weighted, unweighted = (problem_of(attention, moments, 1e-6) for moments in (measured, flat))
    new = TARGETS[name](width=16, n_heads=4).double()

    with torch.no_grad():
        found = [solve(new, problem).errors(weighted) for problem in (weighted, unweighted)]

    assert all(ours < 0.9 * theirs for ours, theirs in zip(*found, strict=True))


def test_fitting_the_output_projection_helps_on_new_text():
    source = net_of(Encoder, MHA)
    batches, new = batches_for(source, rows=64), batches_for(source, rows=64, seed=77, count=1)[0]
    errors = []
    for fit in (True, False):
        target = net_of(Encoder, MUL)
        convert_net(source, target, batches, fit=fit)
        errors.append((states(target, new) - states(source, new)).square().mean())

    assert errors[0] < 0.95 * errors[1]


def test_moments_are_those_of_the_definition():
    source = net_of(Encoder, MHA)
    attention, inputs = first_attention(source), first_inputs(source, count=2)

    found = measure(attention, inputs)

    rows, keys, attended = [], [[] for _ in range(4)], [[] for _ in range(4)]
    for one in inputs:
        weights = attention.weights(one.x, mask=one.mask)
        for b, t in one.real.nonzero().tolist():
            rows.append(torch.cat([one.x[b, t], torch.ones(1).double()]))
            for i in range(4):
                p, c = weights[b, i, t], one.x[b]
                attended[i].append(p @ c)
                keys[i].append((c - p @ c).T @ (p[:, None] * (c - p @ c)))
    rows = torch.stack(rows)
    torch.testing.assert_close(found.queries, rows.T @ rows / len(rows))
    torch.testing.assert_close(found.keys, torch.stack([torch.stack(head).mean(0) for head in keys]))
    states_ = torch.stack([torch.stack(head) for head in attended])
    torch.testing.assert_close(found.attended, states_.mean(1))
    torch.testing.assert_close(found.values, torch.stack([torch.cov(head.T, correction=0) for head in states_]))


@pytest.mark.parametrize("kind", NETS)
def test_padding_changes_nothing(kind):
    source = net_of(kind, MHA)
    batches = batches_for(source)
    other = [TokenBatch(*scrambled(batch)) for batch in batches]
    assert not torch.equal(other[0].tokens, batches[0].tokens)
    nets = [net_of(kind, MUL) for _ in range(2)]

    layers = [convert_net(source, net, some) for net, some in zip(nets, (batches, other), strict=True)]

    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert [layer.scores for layer in layers[0]] == pytest.approx([layer.scores for layer in layers[1]])


def scrambled(batch):
    """Other tokens wherever there is padding."""
    for tokens, real in ((batch.tokens, batch.padding), (batch.target_tokens, batch.target_padding)):
        yield None if tokens is None else torch.where(real, tokens, (tokens + 1) % VOCABULARY)
        yield real


def test_equal_input_gives_equal_bits():
    source = net_of(Decoder, MHA)
    nets = [net_of(Decoder, MUL, seed=seed) for seed in (1, 2)]

    for net in nets:
        convert_net(source, net, batches_for(source))

    assert all(torch.equal(x, y) for x, y in zip(*(net.parameters() for net in nets), strict=True))


def test_all_but_the_attentions_is_copied():
    source, target = net_of(Encoder, MHA), net_of(Encoder, MUL, seed=3)

    convert_net(source, target, batches_for(source))

    theirs = source.state_dict()
    for name, value in target.state_dict().items():
        if ".attention." not in name:
            assert torch.equal(value, theirs[name]), name


def test_the_source_is_left_as_it_was():
    source, target = net_of(Encoder, MHA), net_of(Encoder, MUL, seed=3)
    before = {name: value.clone() for name, value in source.state_dict().items()}

    convert_net(source, target, batches_for(source))

    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_attention_inputs_can_come_from_one_s_own_model():
    torch.manual_seed(0)
    old, new = MHA(width=16, n_heads=4).double(), MUL(width=16, n_heads=4).double()
    x = torch.randn(8, 12, 16).double()
    inputs = [AttentionInput(x, None, None, False, torch.ones(8, 12, dtype=torch.bool))]

    with torch.no_grad():
        scores, values, output, fitted = convert_attention(old, new, inputs, inputs, inputs, ridge=1e-2, fit=True)

    assert 0 < scores < 1
    assert 0 < values < 1
    assert fitted < output < 1


# Refusals


@pytest.mark.parametrize("attention", [MUL, MQA, SHA, partial(GQA, n_kv_heads=2), ELAttention])
def test_other_sources_than_mha_are_refused_by_name(attention):
    source = net_of(Encoder, attention)
    name = type(first_attention(source)).__name__

    with pytest.raises(ValueError, match=f"the self attention of layer 0 is {name}; only MHA can be converted"):
        convert_net(source, net_of(Encoder, MUL), batches_for(source))


def test_mha_as_a_target_is_refused():
    source = net_of(Encoder, MHA)

    with pytest.raises(ValueError, match="MHA already"):
        convert_net(source, net_of(Encoder, MHA), batches_for(source))


def test_an_attention_of_one_s_own_is_refused_as_a_target():
    class Own(SHA.__mro__[1]):
        def __init__(self, *, width, n_heads):
            super().__init__(width=width, n_heads=n_heads)

        def query(self, x):
            return self._split_heads(x)

        def key_value(self, context):
            return (self._split_heads(context),)

    source = net_of(Encoder, MHA)

    with pytest.raises(ValueError, match="attention Own cannot be made from MHA; choose MHE"):
        convert_net(source, net_of(Encoder, Own), batches_for(source))


def test_nets_that_differ_in_more_than_attentions_are_refused():
    source = net_of(Encoder, MHA)

    with pytest.raises(ValueError, match=r"Encoder with 2 attentions cannot become a Decoder with 2"):
        convert_net(source, net_of(Decoder, MUL), batches_for(source))


@pytest.mark.parametrize(
    ("batches", "ridge", "told"), [([], 1e-2, "no batches"), (None, -1.0, r"ridge \(-1.0\) must not be negative")]
)
def test_nothing_to_calibrate_with_is_refused(batches, ridge, told):
    source = net_of(Encoder, MHA)

    with pytest.raises(ValueError, match=told):
        convert_net(source, net_of(Encoder, MUL), batches_for(source) if batches is None else batches, ridge=ridge)


# Texts


@pytest.mark.parametrize("kind", NETS)
def test_texts_become_rows_of_real_tokens(kind):
    tokenizer = train_tokenizer(TEXT, "wordpiece", 160)
    torch.manual_seed(0)
    net = kind(vocab_size=160, attention=MHA, **SIZES).eval()

    batches = texts_as_batches(net, tokenizer, TEXT, count=7, max_tokens=8, batch_size=3)

    assert sum(len(batch.tokens) for batch in batches) == 7
    assert max(batch.tokens.shape[1] for batch in batches) <= 8
    assert all((batch.target_tokens is not None) == (kind is EncoderDecoder) for batch in batches)


def test_a_text_without_words_is_refused():
    net = net_of(Encoder, MHA)

    with pytest.raises(ValueError, match="no text to calibrate with"):
        texts_as_batches(net, train_tokenizer(TEXT, "wordpiece", 160), [" "], count=7, max_tokens=8, batch_size=3)


def test_texts_are_taken_evenly_from_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"text {i}" for i in range(10)) + "\n\n", encoding="utf-8")

    assert calibration_texts(str(path), 5) == [f"text {i}" for i in (0, 2, 4, 6, 8)]
    assert len(calibration_texts(str(path), 50)) == 10


def test_the_embedded_corpus_is_the_default_text():
    assert len(calibration_texts(None, 300)) == 300


# The command line


@pytest.fixture
def trained(tmp_path):
    """A run directory of a decoder with MHA."""
    tokenizer = train_tokenizer(TEXT, "bpe", 280)
    spec = {
        "class_path": "mhe_lightning.models.Decoder",
        "init_args": {
            **SIZES,
            "attention": {"class_path": "mhe_lightning.attention.MHA", "init_args": {"dropout": 0.1}},
        },
    }
    torch.manual_seed(0)
    net = Decoder(vocab_size=280, attention=partial(MHA, dropout=0.1), **SIZES)
    config = {"model": {"class_path": "mhe_lightning.tasks.LanguageModeling", "init_args": {"net": spec, "lr": 1e-3}}}
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    out = tmp_path / "trained"
    write_weights(out, config=config, state_dict=state, tokenizer_json=tokenizer.to_str(), origin={"format": "test"})
    return out


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return path


def overlay(tmp_path, text="class_path: mhe_lightning.attention.MHE\ninit_args: {combine: multiply}\n"):
    path = tmp_path / "mul.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def convert(command):
    """The verb."""
    return partial(command, "convert")


def test_a_run_is_converted_to_a_run_of_the_new_attention(trained, texts, tmp_path, convert):
    out = tmp_path / "converted"

    code, printed, errors = convert(
        str(trained), str(out), "--to", overlay(tmp_path), "--calibration", str(texts), "--texts", "8"
    )

    assert (code, errors) == (0, "")
    assert "self         0" in printed
    assert "saved)" in printed
    checkpoint = read_checkpoint(out / "checkpoints" / "step=00000000.ckpt")
    net = load_net(checkpoint)
    assert {type(module) for module in attentions_of(net).values()} == {MHE}
    assert {module.dropout for module in attentions_of(net).values()} == {0.1}
    assert checkpoint[RECORD][ORIGIN]["source_origin"] == {"format": "test"}
    assert len(checkpoint[RECORD][ORIGIN]["layers"]) == 2
    assert (out / "tokenizer.json").is_file()


def test_the_spec_of_a_converted_net_is_resolved_and_keeps_the_rest(trained):
    (path,) = (trained / "checkpoints").glob("*.ckpt")
    net = config_of(read_checkpoint(path))["model"]["init_args"]["net"]

    found = converted_spec(net, {"class_path": "mhe_lightning.attention.GQA", "init_args": {"n_kv_heads": 2}})

    attention = found["init_args"].pop("attention")
    assert attention["init_args"] == {"n_kv_heads": 2, "dropout": 0.1, "bias": True}
    assert {k: found["init_args"][k] for k in SIZES} == SIZES
    assert "vocab_size" not in found["init_args"]
    assert found["init_args"]["loss_chunk"] == 512


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--texts", "0"], "texts (0) must be at least 1"),
        (["--batch_size", "0"], "batch_size (0) must be at least 1"),
        (["--max_tokens", "2"], "max_length (2) must be at least 5"),
        (["--ridge", "-1"], "ridge (-1.0) must be positive"),
    ],
)
def test_options_out_of_range_end_in_one_line(trained, texts, tmp_path, convert, options, told):
    out = tmp_path / "converted"

    code, _, errors = convert(str(trained), str(out), "--to", overlay(tmp_path), "--calibration", str(texts), *options)

    assert code == 2
    assert told in errors
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("combine: multiply\n", "needs a class_path"),
        ("class_path: [\n", "is no YAML"),
        ("class_path: mhe_lightning.attention.MHE\ninit_args: {combined: add}\n", "combined"),
        ("class_path: mhe_lightning.attention.MHA\n", "MHA already"),
    ],
)
def test_an_overlay_that_names_no_other_attention_is_refused(trained, texts, tmp_path, convert, text, told):
    out = tmp_path / "converted"

    code, _, errors = convert(str(trained), str(out), "--to", overlay(tmp_path, text), "--calibration", str(texts))

    assert code == 2
    assert told in errors
    assert not out.exists()


def test_an_output_that_exists_is_refused(trained, texts, tmp_path, convert):
    code, _, errors = convert(str(trained), str(trained), "--to", overlay(tmp_path), "--calibration", str(texts))

    assert code == 2
    assert "exists; remove it" in errors


def test_a_resolved_config_is_written(trained, texts, tmp_path, convert):
    out = tmp_path / "converted"
    convert(str(trained), str(out), "--to", overlay(tmp_path), "--calibration", str(texts), "--texts", "4")

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))

    attention = config["model"]["init_args"]["net"]["init_args"]["attention"]
    assert attention["class_path"] == "mhe_lightning.attention.MHE"
    assert attention["init_args"]["combine"] == "multiply"
    assert config["model"]["init_args"]["lr"] == 1e-3
