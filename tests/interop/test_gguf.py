"""What is exported as GGUF is the trained decoder, in the names and the order that llama.cpp reads."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attention.oracle import VARIANTS
from interop.natives import TEXTS, native, tokenizer
from mhe_lightning.attention import SHA
from mhe_lightning.interop import gguf as exporting
from mhe_lightning.interop.gguf import contents, export_to_gguf, logits, read
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import NoStockClassError
from mhe_lightning.interop.verification import NotEqualError

KV_HEADS = {
    "mha": 4,
    "sha": 1,
    "mhe_add": 1,
    "mhe_add_shared_scores": 1,
    "mhe_multiply": 1,
    "mqa": 1,
    "gqa2": 2,
    "skv": 4,
    "el": 4,
}


def export(folder: Path, model: Native):
    return export_to_gguf(model, folder / "out", TEXTS, 1e-4)


def written(folder: Path, model: Native):
    export(folder, model)
    return read(folder / "out" / "model.gguf")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_equal(variant, tmp_path):
    model = native("decoder", variant)
    exported = export(tmp_path, model)

    metadata, tensors = read(tmp_path / "out" / "model.gguf")
    architecture = "gpt2" if KV_HEADS[variant] == 4 else "starcoder"
    assert exported.agreement.difference < 2e-5
    assert exported.agreement.largest > 1
    assert metadata["general.architecture"] == architecture
    assert metadata[f"{architecture}.attention.head_count_kv"] == KV_HEADS[variant]
    _, expected = contents(model, model.net)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("variant", "architecture"), [("mha", "GPT2"), ("mhe_add", "STARCODER")])
def test_tensors_are_those_that_the_architecture_names(variant, architecture, tmp_path):
    _, tensors = written(tmp_path, native("decoder", variant, tie_embeddings=False))
    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[architecture]]
    expected = {gguf.TENSOR_NAMES[kind].format(bid=i) for kind in kinds for i in range(2)}
    assert {re.sub(r"\.(weight|bias)$", "", name) for name in tensors} == expected


def test_shapes_are_those_that_llama_cpp_asks_for(tmp_path):
    _, tensors = written(tmp_path, native())
    assert tensors["token_embd.weight"].shape == (300, 24)
    assert tensors["position_embd.weight"].shape == (48, 24)
    assert tensors["blk.1.attn_qkv.weight"].shape == (24 + 2 * 6, 24)
    assert tensors["blk.1.attn_qkv.bias"].shape == (24 + 2 * 6,)
    assert tensors["blk.1.ffn_up.weight"].shape == (32, 24)
    assert tensors["blk.1.ffn_down.weight"].shape == (24, 32)


def test_metadata_are_those_that_llama_cpp_reads(tmp_path):
    metadata, _ = written(tmp_path, native(norm_eps=1e-6))
    assert {key: value for key, value in metadata.items() if not isinstance(value, list)} == {
        "general.architecture": "starcoder",
        "general.name": "Decoder",
        "general.file_type": 0,
        "starcoder.context_length": 48,
        "starcoder.embedding_length": 24,
        "starcoder.block_count": 2,
        "starcoder.feed_forward_length": 32,
        "starcoder.attention.head_count": 4,
        "starcoder.attention.head_count_kv": 1,
        "starcoder.attention.layer_norm_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def test_a_tokenizer_made_from_the_file_makes_the_same_tokens(tmp_path):
    model = native()
    metadata, _ = written(tmp_path, model)

    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()

    for text in [*TEXTS, "other letters: ä ß 漢 🙂\n  and\tspaces "]:
        assert made.encode(text).ids == model.tokenizer.encode(text).ids


def test_token_types_tell_special_and_unused_tokens(tmp_path):
    size = tokenizer("bpe").get_vocab_size()
    metadata, _ = written(tmp_path, native(vocab_size=size + 2))
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.UNUSED] * 2
    assert len(set(metadata["tokenizer.ggml.tokens"])) == size + 2


def test_a_head_of_its_own_is_stored_and_a_tied_one_is_not(tmp_path):
    model = native(tie_embeddings=False)
    _, untied = written(tmp_path / "untied", model)
    _, tied = written(tmp_path / "tied", native())
    assert torch.equal(untied["output.weight"], model.net.head.weight)
    assert "output.weight" not in tied


def test_a_model_without_biases_is_equal(tmp_path):
    assert export(tmp_path, native(attention=partial(SHA, bias=False), bias=False)).agreement.difference < 2e-5


def test_the_epsilon_of_the_file_is_what_the_comparison_computes_with(tmp_path):
    model = native(norm_eps=0.3)
    export(tmp_path, model)
    tokens = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(
            logits(tmp_path / "out" / "model.gguf", tokens), model.net.logits(model.net(tokens)), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_another_activation_than_llama_cpps_is_refused(activation, tmp_path):
    with pytest.raises(NoStockClassError, match=f"tanh GELU, this model '{activation}'"):
        export(tmp_path, native(activation=activation))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "name"), [("headless", "Encoder"), ("encoder_decoder", "EncoderDecoder")])
def test_only_a_decoder_is_exported(kind, name, tmp_path):
    with pytest.raises(NoStockClassError, match=f"no architecture that is our {name}"):
        export(tmp_path, native(kind))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_another_tokenizer_than_byte_level_bpe_is_refused(kind, tmp_path):
    words = tokenizer(kind)
    model = replace(native(vocab_size=words.get_vocab_size()), tokenizer=words)
    with pytest.raises(NoStockClassError, match="not GPT-2's byte-level BPE"):
        export(tmp_path, model)


def test_a_tokenizer_that_adds_a_space_before_a_text_is_refused(tmp_path):
    words = Tokenizer.from_str(tokenizer("bpe").to_str())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(NoStockClassError, match="not GPT-2's byte-level BPE"):
        export(tmp_path, replace(native(), tokenizer=words))


@pytest.mark.parametrize("part", ["metadata", "tensors"])
def test_a_file_with_other_content_is_found_and_not_left_on_disk(part, tmp_path, monkeypatch):
    write = exporting._write

    def wrongly(path, metadata, tensors):
        if part == "metadata":
            metadata = {**metadata, "starcoder.context_length": 47}
        else:
            tensors = {**tensors, "blk.0.ffn_up.bias": tensors["blk.0.ffn_up.bias"] + 1e-6}
        write(path, metadata, tensors)

    monkeypatch.setattr(exporting, "_write", wrongly)
    with pytest.raises(NotEqualError, match=r"context_length|blk\.0\.ffn_up\.bias"):
        export(tmp_path, native())
    assert list(tmp_path.iterdir()) == []
