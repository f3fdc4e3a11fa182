"""What is exported as ONNX computes in ONNX Runtime what the trained model does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch

from attention.oracle import VARIANTS
from interop.natives import TEXTS, WIDTH, native
from mhe_lightning.attention import GQA, MHE, SHA
from mhe_lightning.interop import onnx_builder
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.onnx import Session, cached, export_to_onnx, generate
from mhe_lightning.interop.stock import NoStockClassError
from mhe_lightning.models import generation
from mhe_lightning.models.heads import SequenceHead

NEAR = dict(atol=1e-5, rtol=0)


def export(folder: Path, model: Native):
    return export_to_onnx(model, folder / "out", TEXTS, 1e-4)


def decoder_session(folder: Path, model: Native) -> Session:
    export(folder, model)
    return Session(folder / "out" / "model.onnx")


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_every_model_is_equal(kind, variant, tmp_path):
    exported = export(tmp_path, native(kind, variant))

    assert exported.agreement.difference < 2e-5
    assert exported.agreement.largest > 1
    assert exported.agreement.generated == (0 if kind == "headless" else 16 * len(TEXTS))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    models = {"encoder_model.onnx", "decoder_model.onnx"} if kind == "encoder_decoder" else {"model.onnx"}
    assert files == models | {"config.yaml", "tokenizer.json", "README.md"}


@pytest.mark.parametrize("kind", ["masked", "classes", "value", "choice", "span"])
def test_every_head_of_an_encoder_is_in_the_graph(kind, tmp_path):
    model = native(kind)
    assert export(tmp_path, model).agreement.difference < 2e-5
    outputs = Session(tmp_path / "out" / "model.onnx").outputs
    assert outputs == (["start_logits", "end_logits"] if kind == "span" else ["logits"])


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_every_pooling_is_in_the_graph(pooling, tmp_path):
    head = SequenceHead(width=WIDTH, n_labels=2, pooling=pooling, dropout=0.1).eval()
    with torch.no_grad():
        head.dense.weight.normal_()
        head.classifier.weight.normal_()
    agreement = export(tmp_path, replace(native("classes"), head=head)).agreement
    assert agreement.difference < 2e-5
    assert agreement.largest > 0.1


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 1e-3, "activation": "relu"},
        {"activation": "gelu", "norm_eps": 1e-12},
        {"activation": "gelu_tanh"},
        {"attention": partial(SHA, bias=False), "bias": False},
    ],
)
def test_what_a_net_can_be_changed_in_is_kept(kind, changes, tmp_path):
    assert export(tmp_path, native(kind, **changes)).agreement.difference < 2e-5


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("decoder", {"tie_embeddings": False}), ("encoder_decoder", {"tie_embeddings": False, "share_embeddings": False})],
)
def test_embeddings_of_their_own_are_kept(kind, changes, tmp_path):
    assert export(tmp_path, native(kind, **changes)).agreement.difference < 2e-5


def test_different_attentions_in_the_three_places_are_equal(tmp_path):
    model = native(
        "encoder_decoder",
        encoder_attention=partial(GQA, n_kv_heads=2),
        decoder_attention=partial(MHE, combine="multiply"),
        cross_attention=SHA,
        n_decoder_layers=3,
    )
    assert export(tmp_path, model).agreement.difference < 2e-5


@pytest.mark.parametrize("variant", ["mhe_add", "gqa2", "mha"])
@torch.no_grad()
def test_tokens_one_by_one_in_parts_or_at_once_give_the_same_logits(variant, tmp_path):
    model = native("decoder", variant)
    session = decoder_session(tmp_path, model)
    tokens = torch.randint(model.net.vocab_size, (3, 23), generator=torch.Generator().manual_seed(1))
    expected = model.net.logits(model.net(tokens))

    for sizes in ([23], [1] * 23, [7, 1, 15]):
        cache, found, begin = session.empty_cache(3), [], 0
        for size in sizes:
            end = begin + size
            inputs = {"input_ids": tokens[:, begin:end], "attention_mask": torch.ones_like(tokens[:, :end])}
            outputs = session.run({**inputs, **cache})
            cache, begin = cached(outputs), end
            found.append(outputs["logits"])
        torch.testing.assert_close(torch.cat(found, 1), expected, **NEAR)


@pytest.mark.parametrize("variant", ["mhe_multiply", "skv"])
def test_greedy_text_of_prompts_padded_on_the_left_is_ours(variant, tmp_path):
    model = native("decoder", variant, tie_embeddings=False)
    session = decoder_session(tmp_path, model)
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [9, 9, 0, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }

    tokens, _ = generate(session, inputs, session.empty_cache(2), 30)

    expected = generation.generate(model.net, [[0, 5, 6, 7], [0, 8]], max_new_tokens=30, temperature=0)
    assert tokens.tolist() == expected
    assert min(len(set(new)) for new in expected) > 5  # not one token for ever


def test_the_cache_has_the_heads_that_the_variant_has(tmp_path):
    heads = {variant: _cache_heads(tmp_path / variant, variant) for variant in ("mha", "gqa2", "mqa", "mhe_add", "sha")}
    assert heads == {"mha": 4, "gqa2": 2, "mqa": 1, "mhe_add": 1, "sha": 1}


def _cache_heads(folder: Path, variant: str) -> int:
    session = decoder_session(folder, native("decoder", variant))
    heads = {shape[1] for name, shape in session.inputs.items() if name.startswith("past_key_values")}
    assert len(heads) == 1
    return int(heads.pop())


def test_names_are_optimums(tmp_path):
    session = decoder_session(tmp_path, native(n_layers=1))
    assert list(session.inputs) == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert session.outputs == ["logits", "present.0.key", "present.0.value"]


def test_operators_are_standard_ones_of_one_version(tmp_path):
    export(tmp_path, native("encoder_decoder"))
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        model = onnx.load(tmp_path / "out" / name)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", onnx_builder.OPSET)]


def test_tied_embeddings_are_stored_once(tmp_path):
    tied, untied = native(), native(tie_embeddings=False)
    export(tmp_path / "tied", tied)
    export(tmp_path / "untied", untied)

    sizes = [(tmp_path / name / "out" / "model.onnx").stat().st_size for name in ("tied", "untied")]

    assert sizes[1] - sizes[0] == pytest.approx(4 * untied.net.head.weight.numel(), abs=100)


def test_large_weights_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_builder, "EXTERNAL", 1)
    model = native()
    export(tmp_path, model)

    out = tmp_path / "out"
    assert (out / "model.onnx.data").stat().st_size > 4 * model.net.token_embedding.weight.numel()
    assert (out / "model.onnx").stat().st_size < 40_000
    assert Session(out / "model.onnx").outputs[0] == "logits"  # also where the folder has got its name


def test_a_head_that_reads_spans_is_refused(tmp_path):
    head = SequenceHead(width=WIDTH, n_labels=2, n_spans=2, pooling="first", dropout=0.0)
    with pytest.raises(NoStockClassError, match="2 spans"):
        export(tmp_path, replace(native("classes"), head=head))
