"""What is exported computes what the trained model does, in the classes that transformers has in stock."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from attention.oracle import VARIANTS
from interop.natives import KINDS, TEXTS, native, tokenizer
from mhe_lightning.interop import exporting
from mhe_lightning.interop.exporting import export_to_hf, stock_model
from mhe_lightning.interop.native import labels_of
from mhe_lightning.interop.stock import NoStockClassError
from mhe_lightning.interop.verification import NotEqualError, verify
from mhe_lightning.models.generation import generate
from mhe_lightning.models.heads import SequenceHead
from mhe_lightning.models.layers import ACTIVATIONS
from mhe_lightning.models.search import beam_search

SHARED = ("mhe_add", "mhe_add_shared_scores", "mhe_multiply", "mqa", "sha")


def export(tmp_path, model):
    return export_to_hf(model, tmp_path / "out", TEXTS, 1e-4)


def stock_class(kind: str, variant: str) -> str:
    return {
        "decoder": "GPTBigCodeForCausalLM" if variant in SHARED else "GPT2LMHeadModel",
        "masked": "BertForMaskedLM",
        "classes": "BertForSequenceClassification",
        "value": "BertForSequenceClassification",
        "choice": "BertForMultipleChoice",
        "span": "BertForQuestionAnswering",
        "headless": "BertModel",
        "encoder_decoder": "MarianMTModel",
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_every_model_is_equal_in_a_stock_class(kind, variant, tmp_path):
    norm_eps = {"masked": 1e-12}.get(kind, 1e-5)
    exported = export(tmp_path, native(kind, variant, norm_eps=norm_eps))

    assert exported.stock.architecture == stock_class(kind, variant)
    assert exported.agreement.float64 < 2e-6
    assert exported.agreement.float32 < 1e-4
    assert exported.agreement.largest > 0.1
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert ("generation_config.json" in files) == (kind in ("decoder", "encoder_decoder"))


OPTIONS = [
    *((kind, {"activation": name}) for kind in ("decoder", "headless", "encoder_decoder") for name in ACTIVATIONS),
    *((kind, {"bias": False}) for kind in ("decoder", "headless", "encoder_decoder")),
    *((kind, {"norm_eps": eps}) for kind in ("decoder", "headless") for eps in (1e-3, 1e-12)),
    ("decoder", {"tie_embeddings": False}),
    ("encoder_decoder", {"tie_embeddings": False}),
    ("encoder_decoder", {"share_embeddings": False}),
    ("encoder_decoder", {"share_embeddings": False, "tie_embeddings": False}),
]


@pytest.mark.parametrize(("kind", "changes"), OPTIONS, ids=str)
def test_options_of_a_net_that_change_it_quietly_are_kept(kind, changes, tmp_path):
    assert export(tmp_path, native(kind, **changes)).agreement.float64 < 2e-6


@pytest.mark.parametrize(("option", "wrong"), [("activation_function", "gelu"), ("layer_norm_epsilon", 1e-3)])
def test_what_is_not_equal_is_not_left_on_disk(option, wrong, tmp_path, monkeypatch):
    right = exporting.stock_model

    def wrongly(model):
        stock = right(model)
        return replace(stock, config={**stock.config, option: wrong})

    monkeypatch.setattr(exporting, "stock_model", wrongly)
    with pytest.raises(NotEqualError, match=r"differ from ours by up to .* more than the tolerance of 0\.0001"):
        export(tmp_path, native("decoder"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["left out", "of another name"])
def test_weights_that_the_stock_class_does_not_take_are_an_error(change, tmp_path, monkeypatch):
    right = exporting.stock_model

    def wrongly(model):
        stock = right(model)
        tensors = dict(stock.tensors)
        bias = tensors.pop("transformer.ln_f.bias")
        return replace(stock, tensors=tensors if change == "left out" else {**tensors, "transformer.final.bias": bias})

    monkeypatch.setattr(exporting, "stock_model", wrongly)
    with pytest.raises(NotEqualError, match=r"missing keys: transformer.ln_f.bias"):
        export(tmp_path, native("decoder"))


def test_a_tokenizer_that_makes_other_tokens_is_an_error(tmp_path, monkeypatch):
    right = exporting.stock_tokenizer
    monkeypatch.setattr(exporting, "stock_tokenizer", lambda _, *rest: right(tokenizer("unigram"), *rest))
    with pytest.raises(NotEqualError, match="its tokenizer makes"):
        export(tmp_path, native("decoder"))


@pytest.mark.parametrize("variant", ["mhe_add", "mhe_multiply", "mqa", "sha", "mha", "gqa2"])
def test_the_cache_of_a_decoder_has_one_head_where_keys_and_values_are_shared(variant, tmp_path):
    export(tmp_path, native("decoder", variant))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    keys = cache.layers[0].keys
    assert keys.numel() // 3 == 6 * (1 if variant in SHARED else 4)  # d = 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_equal_for_prompts_of_different_lengths(variant, tmp_path):
    model = native("decoder", variant)
    export(tmp_path, model)
    prompts = [[0, 40, 41, 42], [0, 50], [0, 60, 61]]
    expected = generate(model.net, prompts, max_new_tokens=12, temperature=0.0)

    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.zeros(3, 4, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, 4 - len(prompt) :] = torch.tensor(prompt)
    real = torch.arange(4) >= torch.tensor([[4 - len(prompt)] for prompt in prompts])
    found = stock.generate(tokens, attention_mask=real.long(), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found[:, 4:].tolist() == expected


@pytest.mark.parametrize("variant", ["mha", "mhe_add", "mhe_multiply", "el"])
def test_greedy_translations_are_equal(variant, tmp_path):
    model = native("encoder_decoder", variant)
    export(tmp_path, model)
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    found_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    end = found_tokenizer.eos_token_id
    for text in TEXTS:
        source = found_tokenizer(text, return_tensors="pt")
        (best,) = beam_search(
            model.net, source["input_ids"], start_token=end, end_token=end, beam_size=1, extra_tokens=0
        )
        limit = source["input_ids"].shape[1] - 1
        found = stock.generate(**source, num_beams=1, do_sample=False, max_new_tokens=limit, bad_words_ids=None)[
            0, 1:
        ].tolist()
        found = found[: found.index(end)] if end in found else found
        assert found == best[0].tokens


def test_the_card_says_what_was_compared_and_the_config_names_the_classes(tmp_path):
    exported = export(tmp_path, native("classes"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert f"{exported.agreement.float64:.1e} in float64" in card
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert labels == {"0": "yes", "1": "no", "2": "maybe"}


def test_files_have_the_permissions_of_any_other(tmp_path):
    old = os.umask(0o022)
    try:
        export(tmp_path, native("decoder"))
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_tied_weights_are_stored_once_and_untied_ones_twice(tmp_path):
    for tied in (True, False):
        export_to_hf(native("decoder", tie_embeddings=tied), tmp_path / str(tied), TEXTS, 1e-4)
        with safe_open(tmp_path / str(tied) / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118 - no mapping


def _with_pooling(pooling):
    model = native("classes")
    return replace(model, head=SequenceHead(width=24, n_labels=3, pooling=pooling, dropout=0.0))


REFUSED = {
    "mean pooling": (lambda: _with_pooling("mean"), r"the mean one; train it with --model.pooling=first"),
    "spans": (
        lambda: replace(
            native("classes"), head=SequenceHead(width=24, n_labels=3, n_spans=2, pooling="first", dropout=0.0)
        ),
        "2 spans of the text",
    ),
    "another activation in the head": (
        lambda: native("masked", activation="relu", norm_eps=1e-12),
        r"relu and 1e-12 in the layers, gelu and 1e-12 in the head",
    ),
    "another epsilon in the head": (
        lambda: native("masked", norm_eps=1e-5),
        r"gelu and 1e-05 in the layers, gelu and 1e-12 in the head",
    ),
    "another epsilon than Marian's": (
        lambda: native("encoder_decoder", norm_eps=1e-3),
        r"ε = 1e-05, this model's 0.001; train it with --model.net.norm_eps=1e-05",
    ),
    "a decoder that classifies": (
        lambda: replace(native("decoder"), head=nn.Linear(24, 2)),
        "a decoder with a classifier of its own has no stock class",
    ),
    "a net of a user's own": (lambda: replace(native("decoder"), net=nn.Linear(2, 2)), "Linear has no stock class"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_stock_class_is_refused_with_the_reason(case):
    make, reason = REFUSED[case]
    with pytest.raises(NoStockClassError, match=reason):
        stock_model(make())


def test_a_text_as_long_as_the_model_reads_is_compared(tmp_path):
    model = native("decoder")
    with torch.no_grad():  # a wrong position that short texts do not reach
        model.net.position_embedding.weight[36] *= 3.0
    stock = stock_model(model)
    exporting.write_hf(model, stock, tmp_path)
    assert verify(model, stock, tmp_path, TEXTS * 9, 1e-4).tokens > 36 + 16

    with torch.no_grad():
        model.net.position_embedding.weight[36] /= 3.0
    with pytest.raises(NotEqualError, match="differ from ours"):
        verify(model, stock, tmp_path, TEXTS * 9, 1e-4)


def test_text_that_spells_out_a_special_token_is_not_compared(tmp_path):
    texts = [f"{text} <|endoftext|>" for text in TEXTS]
    assert export_to_hf(native("decoder"), tmp_path / "out", [*texts, *TEXTS], 1e-4).agreement.texts == len(TEXTS) + 1
    with pytest.raises(ValueError, match="no text has a beginning that fits"):
        export_to_hf(native("decoder"), tmp_path / "other", texts, 1e-4)


IMPORTED = {"format": "transformers", "source": "a/cross-encoder", "architecture": "BertForSequenceClassification"}
CONVERTED = {"format": "mhe_lightning", "source": "runs/bert", "to": {}, "source_origin": IMPORTED}


@pytest.mark.parametrize("origin", [IMPORTED, CONVERTED], ids=["imported", "imported, then converted"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, ("classes", ("no", "yes"))),
        ({"id2label": {"0": "LABEL_0"}}, ("value", ())),  # as transformers takes one label without a problem_type
        ({"problem_type": "regression", "id2label": {"0": "a"}}, ("value", ())),
        ({"problem_type": "single_label_classification", "id2label": {"0": "a"}}, ("classes", ("a",))),
    ],
)
def test_what_was_imported_keeps_its_problem_and_its_labels(origin, given, expected):
    root = {**IMPORTED, "config": given}
    assert labels_of({}, root if origin is IMPORTED else {**origin, "source_origin": root}) == expected


def test_the_card_of_what_was_not_trained_here_says_where_it_is_from(tmp_path):
    export(tmp_path, replace(native("decoder"), origin=CONVERTED))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not trained here: converted from runs/bert, not trained since." in card
    assert "trained with mhe_lightning" not in card
    assert "train.py fit" not in card


@pytest.mark.parametrize("position", [2, 36], ids=["in short texts", "in the longest alone"])
def test_a_model_that_gives_no_numbers_is_not_exported(position, tmp_path):
    model = native("decoder")
    with torch.no_grad():
        model.net.position_embedding.weight[position] = float("nan")
    with pytest.raises(NotEqualError, match="differ from ours by up to nan"):
        export_to_hf(model, tmp_path / "out", TEXTS * 9, 1e-4)
    assert list(tmp_path.iterdir()) == []
