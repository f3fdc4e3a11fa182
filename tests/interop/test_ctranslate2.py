"""What is exported to CTranslate2 computes there what the trained model does."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import torch

from attention.oracle import VARIANTS
from interop.natives import TEXTS, WIDTH, native, tokenizer
from mhe_lightning.attention import GQA, MHE, SHA
from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.interop.ctranslate2 import export_to_ctranslate2
from mhe_lightning.interop.engine import check_greedy, vocabulary
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.verification import NotEqualError, fitting_pairs, native_batch
from mhe_lightning.models.generation import generate
from mhe_lightning.models.heads import SequenceHead
from mhe_lightning.models.search import beam_search

ONE_THREAD = {"intra_threads": 1, "compute_type": "float32"}


def export(folder: Path, model: Native):
    return export_to_ctranslate2(model, folder / "out", TEXTS, 1e-4)


def decoder_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    generator = ctranslate2.Generator(str(folder), **ONE_THREAD)
    return torch.from_numpy(np.array(generator.forward_batch([ids])))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_every_model_is_equal(kind, variant, tmp_path):
    exported = export(tmp_path, native(kind, variant))

    assert exported.agreement.difference < 2e-5
    assert exported.agreement.largest > 1
    assert exported.agreement.generated == (0 if kind == "headless" else 16 * len(TEXTS))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.bin", "config.json", "config.yaml", "tokenizer.json", "README.md"} <= files


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.3])
def test_any_layer_norm_epsilon_is_kept(kind, eps, tmp_path):
    assert export(tmp_path, native(kind, norm_eps=eps)).agreement.difference < 2e-5


@torch.no_grad()
def test_a_config_without_the_epsilon_computes_with_another(tmp_path):
    model = native(norm_eps=1e-3)
    export(tmp_path, model)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("layer_norm_epsilon") == 1e-3
    path.write_text(json.dumps(config))

    expected = model.net.logits(model.net(torch.tensor([[0, 5, 6]])))

    assert (decoder_logits(tmp_path / "out", [0, 5, 6]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_every_activation_is_kept(kind, activation, tmp_path):
    assert export(tmp_path, native(kind, activation=activation)).agreement.difference < 2e-5


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "headless"])
def test_a_model_without_biases_is_equal(kind, tmp_path):
    assert export(tmp_path, native(kind, attention=partial(SHA, bias=False), bias=False)).agreement.difference < 2e-5


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("decoder", {"tie_embeddings": False}), ("encoder_decoder", {"tie_embeddings": False, "share_embeddings": False})],
)
def test_embeddings_of_their_own_are_kept(kind, changes, tmp_path):
    assert export(tmp_path, native(kind, **changes)).agreement.difference < 2e-5


def test_tied_embeddings_are_stored_once(tmp_path):
    tied, untied = native(), native(tie_embeddings=False)
    export(tmp_path / "tied", tied)
    export(tmp_path / "untied", untied)

    sizes = [(tmp_path / name / "out" / "model.bin").stat().st_size for name in ("tied", "untied")]

    assert sizes[1] - sizes[0] == pytest.approx(4 * untied.net.head.weight.numel(), abs=100)


def test_different_attentions_in_the_three_places_are_equal(tmp_path):
    model = native(
        "encoder_decoder",
        encoder_attention=partial(GQA, n_kv_heads=2),
        decoder_attention=partial(MHE, combine="multiply"),
        cross_attention=SHA,
    )
    assert export(tmp_path, model).agreement.difference < 2e-5


def test_encoder_and_decoder_of_different_depths_are_equal(tmp_path):
    assert export(tmp_path, native("encoder_decoder", n_layers=1, n_decoder_layers=3)).agreement.difference < 2e-5


@pytest.mark.parametrize("kind", ["masked", "classes", "value", "choice", "span"])
def test_an_encoders_head_lies_beside_it(kind, tmp_path):
    model = native(kind)
    exported = export(tmp_path, model)

    assert exported.agreement.difference < 2e-5
    assert type(model.head).__name__ in exported.notes[0]
    with np.load(tmp_path / "out" / "head.npz", allow_pickle=False) as stored:
        assert {name: stored[name].tolist() for name in stored} == {
            name: weight.tolist() for name, weight in model.head.state_dict().items()
        }


@pytest.mark.parametrize(("pooling", "pooled"), [("first", True), ("mean", False)])
@torch.no_grad()
def test_the_pooled_state_is_given_where_the_engine_can_compute_it(pooling, pooled, tmp_path):
    head = SequenceHead(width=WIDTH, n_labels=2, pooling=pooling, dropout=0.0).eval()
    model = replace(native("classes"), head=head)
    export(tmp_path, model)

    encoder = ctranslate2.Encoder(str(tmp_path / "out"), **ONE_THREAD)
    found = encoder.forward_batch([[2, 7, 3]]).pooler_output

    assert (found is not None) == pooled
    if pooled:
        expected = torch.tanh(head.dense(model.net(torch.tensor([[2, 7, 3]]))[:, 0]))
        torch.testing.assert_close(torch.from_numpy(np.array(found)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["mhe_add", "gqa2"])
def test_greedy_text_is_ours_token_by_token(variant, tmp_path):
    model = native("decoder", variant, tie_embeddings=False)
    export(tmp_path, model)
    prompts = [[0, 5, 6, 7], [0, 9]]

    generator = ctranslate2.Generator(str(tmp_path / "out"), **ONE_THREAD)
    names = vocabulary(model)
    found = generator.generate_batch(
        [[names[i] for i in prompt] for prompt in prompts], max_length=30, include_prompt_in_result=False
    )

    expected = generate(model.net, prompts, max_new_tokens=30, temperature=0, stop_token=0)
    assert [result.sequences_ids[0] for result in found] == expected
    assert min(len(set(new)) for new in expected) > 5  # not one token for ever


@pytest.mark.parametrize(("variant", "flagged"), [("mhe_add", True), ("sha", True), ("gqa2", False), ("mha", False)])
def test_the_engine_is_told_to_cache_one_head_where_there_is_one(variant, flagged, tmp_path):
    export(tmp_path, native("decoder", variant))
    assert (b"self_attention/multi_query" in (tmp_path / "out" / "model.bin").read_bytes()) == flagged


@torch.no_grad()
def test_texts_of_different_lengths_are_scored_one_by_one(tmp_path):
    """Where one head is cached CTranslate2 4.8 refuses them in one batch."""
    model = native("decoder")
    exported = export(tmp_path, model)
    names, texts = vocabulary(model), [[0, 5, 6, 7], [0, 9]]

    generator = ctranslate2.Generator(str(tmp_path / "out"), **ONE_THREAD)
    found = generator.score_batch([[names[i] for i in text] for text in texts], max_batch_size=1)

    for text, one in zip(texts, found, strict=True):
        ours = model.net.logits(model.net(torch.tensor([text]))).log_softmax(-1)[0]
        expected = ours[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=0)
    assert "max_batch_size=1" in exported.notes[1]


@torch.no_grad()
def test_greedy_translations_are_ours_token_by_token(tmp_path):
    model = native("encoder_decoder", tie_embeddings=False, share_embeddings=False)
    for block in model.net.decoder_blocks:  # so that it does not repeat one token
        for module in (block.norm_2, block.feed_forward.w_2, block.cross_attention.w_o):
            module.bias.zero_()
        block.norm_2.weight.fill_(1.0)
        block.cross_attention.w_o.weight.mul_(0.5)
    export(tmp_path, model)
    batch, end = native_batch(model, fitting_pairs(model, TEXTS)), end_of_text_id(model.tokenizer)
    names = vocabulary(model)

    translator = ctranslate2.Translator(str(tmp_path / "out"), **ONE_THREAD)
    found = translator.translate_batch(
        [[names[i] for i in row[kept]] for row, kept in zip(batch["tokens"], batch["padding"], strict=True)],
        beam_size=1,
        max_decoding_length=20,
        min_decoding_length=0,
    )

    search = {"start_token": end, "end_token": end, "beam_size": 1, "extra_tokens": 30}
    ours = beam_search(model.net, batch["tokens"], batch["padding"], **search)
    expected = [[names[i] for i in best.tokens[:20]] for (best,) in ours]
    assert [result.hypotheses[0] for result in found] == expected
    assert min(len(set(new)) for new in expected) > 3


@pytest.mark.parametrize("variant", ["mhe_add", "mha"])
@torch.no_grad()
def test_the_score_of_a_beam_searchs_translation_is_ours(variant, tmp_path):
    """A beam search moves cached keys and values between its hypotheses."""
    model = native("encoder_decoder", variant, tie_embeddings=False)
    export(tmp_path, model)
    source, end = [7, 8, 9, 1], end_of_text_id(model.tokenizer)
    names = vocabulary(model)

    translator = ctranslate2.Translator(str(tmp_path / "out"), **ONE_THREAD)
    limits = {"max_decoding_length": 12, "min_decoding_length": 0}  # a least length changes probabilities
    options = {"beam_size": 4, "num_hypotheses": 4, "length_penalty": 0}
    found = translator.translate_batch([[names[i] for i in source]], return_scores=True, **limits, **options)[0]

    ids = {name: i for i, name in enumerate(names)}
    for tokens, score in zip(found.hypotheses, found.scores, strict=True):
        target = torch.tensor([ids[token] for token in tokens] + ([end] if len(tokens) < 12 else []))
        inputs = torch.tensor([[end, *target[:-1]]])
        ours = model.net.logits(model.net(torch.tensor([source]), inputs)).log_softmax(-1)[0]
        assert score == pytest.approx(float(ours.gather(1, target[:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
@torch.no_grad()
def test_a_text_that_ends_at_once_is_compared(kind, tmp_path):
    model = native(kind, tie_embeddings=False)
    end = end_of_text_id(model.tokenizer)
    norm = model.net.norm if kind == "decoder" else model.net.decoder_blocks[-1].norm_2
    norm.bias.fill_(3.0)
    model.net.head.weight[end] = 3.0

    assert export(tmp_path, model).agreement.generated == len(TEXTS)  # the end tokens


def test_an_encoder_decoder_starts_from_its_end_token_and_keeps_its_vocabulary(tmp_path):
    model = native("encoder_decoder")
    export(tmp_path, model)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tokens = json.loads((tmp_path / "out" / "shared_vocabulary.json").read_text())

    assert config["decoder_start_token"] == config["eos_token"] == "</s>"
    assert tokens == [model.tokenizer.id_to_token(i) for i in range(model.net.vocab_size)]


def test_rows_without_a_token_get_names(tmp_path):
    model = native(vocab_size=tokenizer("bpe").get_vocab_size() + 3)
    export(tmp_path, model)

    tokens = json.loads((tmp_path / "out" / "vocabulary.json").read_text())

    assert len(tokens) == len(set(tokens)) == model.net.vocab_size


def test_a_token_that_is_not_our_likeliest_is_found():
    model = native()
    likeliest = generate(model.net, [[0, 5]], max_new_tokens=3, temperature=0)[0]
    assert check_greedy(model, {}, [[0, 5]], [likeliest], 1e-4) == 3

    likeliest[1] = (likeliest[1] + 1) % model.net.vocab_size
    with pytest.raises(NotEqualError, match="of text 0 the engine's token 2 is"):
        check_greedy(model, {}, [[0, 5]], [likeliest], 1e-4)
