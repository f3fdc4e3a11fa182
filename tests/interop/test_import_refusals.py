"""Checkpoints that ours would not compute, or that contradict themselves, are refused in one line."""

from __future__ import annotations

import pytest
import torch

from interop.stock_models import channels, edit_tensors, saved, stock
from mhe_lightning.interop.importing import import_checkpoint


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("BertModel", {"architectures": ["RobertaModel"]}, "class RobertaModel cannot be imported; these can: GPT2"),
        ("BertModel", {"architectures": ["BertForTokenClassification"]}, "class BertForTokenClassification cannot be"),
        ("BertModel", {"architectures": ...}, "must name one class in architectures, not None"),
        ("BertModel", {"architectures": ["BertModel", "BertForMaskedLM"]}, "must name one class in architectures"),
        ("BertModel", {"model_type": "roberta"}, "has model_type 'roberta' but the class BertModel"),
        ("BertModel", {"auto_map": {"AutoModel": "x.Y"}}, "asks for code of its own"),
        ("BertModel", {"quantization_config": {"bits": 4}}, "quantised"),
        ("BertModel", {"position_embedding_type": "relative_key"}, r"position_embedding_type \('relative_key'\)"),
        ("BertModel", {"is_decoder": True}, r"is_decoder \(True\)"),
        ("BertModel", {"add_cross_attention": True}, r"add_cross_attention \(True\)"),
        ("BertModel", {"hidden_act": "silu"}, r"hidden_act \('silu'\) has no counterpart here; those of gelu"),
        ("BertModel", {"num_attention_heads": 3}, r"num_attention_heads \(3\) must divide hidden_size \(8\)"),
        ("BertModel", {"num_hidden_layers": "two"}, r"num_hidden_layers \('two'\) must be a whole number"),
        ("BertModel", {"num_hidden_layers": 10**9}, r"num_hidden_layers \(1000000000\) must be .* to 1000;"),
        ("GPT2LMHeadModel", {"tie_word_embeddings": "no"}, r"tie_word_embeddings \('no'\) must be true or false"),
        ("MarianMTModel", {"max_position_embeddings": 10**9}, r"must be a whole number from 1 to 100000"),
        ("GPT2LMHeadModel", {"attn_pdrop": 1.0}, r"attn_pdrop \(1.0\) must be in \[0, 1\)"),
        ("BertModel", {"layer_norm_eps": -1.0}, r"layer_norm_eps \(-1.0\) must be a number from 0"),
        ("BertForQuestionAnswering", {"id2label": {"0": "a", "1": "b", "2": "c"}}, "a span has two"),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, r"scale_attn_weights \(False\)"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx \(True\)"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, r"add_cross_attention \(True\)"),
        ("GPT2LMHeadModel", {"activation_function": "tanh"}, r"activation_function \('tanh'\)"),
        ("GPT2LMHeadModel", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("GPT2Model", {"tie_word_embeddings": False}, "give the GPT2LMHeadModel"),
        ("MarianMTModel", {"scale_embedding": False}, r"scale_embedding \(False\)"),
        ("MarianMTModel", {"scale_embedding": ...}, r"scale_embedding \(False\)"),
        ("MarianMTModel", {"normalize_before": True}, r"normalize_before \(True\)"),
        ("MarianMTModel", {"normalize_embedding": True}, r"normalize_embedding \(True\)"),
        ("MarianMTModel", {"activation_function": "swish"}, r"activation_function \('swish'\)"),
        ("MarianMTModel", {"decoder_attention_heads": 4}, r"decoder_attention_heads \(4\)"),
        ("MarianMTModel", {"decoder_ffn_dim": 4}, r"decoder_ffn_dim \(4\)"),
        ("MarianMTModel", {"decoder_vocab_size": 4}, r"decoder_vocab_size \(4\)"),
    ],
    ids=str,
)  # fmt: skip
def test_another_function_is_refused_by_name(architecture, changes, message, tmp_path):
    folder = saved(stock(architecture), tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_an_output_of_its_own_over_shared_embeddings_of_marian(tmp_path):
    model = stock("MarianMTModel", tie_word_embeddings=False)  # which ties nothing, whatever else config.json says
    with pytest.raises(ValueError, match=r"embed_tokens.weight differs from model.shared.weight, but"):
        import_checkpoint(saved(model, tmp_path / "hf"))

    model.model.encoder.embed_tokens.weight = model.model.decoder.embed_tokens.weight = model.model.shared.weight
    state = import_checkpoint(saved(model, tmp_path / "tied")).state_dict
    assert state["net.target_embedding.weight"] is state["net.token_embedding.weight"]
    assert torch.equal(state["net.head.weight"], model.lm_head.weight[:, channels(8)])


def test_an_output_bias_of_marian_is_refused(tmp_path):
    model = stock("MarianMTModel")
    model.final_logits_bias[0, 3] = 0.25
    with pytest.raises(ValueError, match=r"final_logits_bias is not zero \(its largest entry is 0.25\)"):
        import_checkpoint(saved(model, tmp_path / "hf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"), r"lacks encoder.layer.1.output.dense.bias \(8,\)"),
        (lambda t: t.update({"bert.strange": torch.ones(2)}), "has bert.strange, which BertForMaskedLM"),
        (lambda t: t.update({"embeddings.LayerNorm.bias": torch.ones(8)}), "which are one tensor"),
        (
            lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.ones(9)}),
            r"bert.embeddings.LayerNorm.bias is \(9,\) of float32; config.json makes it \(8,\)",
        ),
        (
            lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.ones(8, dtype=torch.int64)}),
            r"is \(8,\) of int64",
        ),
        (
            lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(60, 8)}),
            "cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight",
        ),
    ],
)
def test_tensors_that_contradict_the_config_are_named(change, message, tmp_path):
    folder = edit_tensors(saved(stock("BertForMaskedLM"), tmp_path / "hf"), change)
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_layers_that_config_json_does_not_count_are_refused(tmp_path):
    folder = saved(stock("BertModel"), tmp_path / "hf", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has encoder.layer.1.attention.output.LayerNorm.bias, .* and 13 more, which"):
        import_checkpoint(folder)
