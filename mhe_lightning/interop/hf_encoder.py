"""An encoder as BERT, with the head that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from mhe_lightning.interop.stock import ACTIVATION_NAMES, Layout, NoStockClassError, StockModel, folded
from mhe_lightning.models import Encoder
from mhe_lightning.models.heads import MaskedTokenHead, SequenceHead, SpanHead
from mhe_lightning.models.layers import Block

Problem = Literal["classes", "value", "choice"]


def stock_encoder(
    net: Encoder, head: nn.Module | None, *, problem: Problem | None = None, labels: Sequence[str] = (), padding: int
) -> StockModel:
    """The encoder as BERT, its attention with keys and values for every head.

    Source: Devlin et al. 2019.

    Args:
        net: the encoder.
        head: `MaskedTokenHead`, `SequenceHead`, `SpanHead`, or None.
        problem: what a `SequenceHead` gives: scores of "classes", a "value", or the score of a "choice".
        labels: names of the classes.
        padding: token that fills rows up.

    Raises:
        NoStockClassError: BERT has no such head or attention.
    """
    blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
    prefix = "" if head is None else "bert."
    layout = Layout(net.token_embedding.weight)
    layout.put(f"{prefix}embeddings.word_embeddings.weight", net.token_embedding.weight)
    layout.put(f"{prefix}embeddings.position_embeddings.weight", net.position_embedding.weight)
    layout.put(f"{prefix}embeddings.token_type_embeddings.weight", net.segment_embedding.weight)
    layout.norm(f"{prefix}embeddings.LayerNorm", net.norm)
    for i, block in enumerate(blocks):
        _put_block(layout, f"{prefix}encoder.layer.{i}", block)
    activation = blocks[0].feed_forward.activation
    config: dict[str, Any] = {
        "model_type": "bert",
        "vocab_size": net.vocab_size,
        "hidden_size": net.width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attention.n_heads,
        "intermediate_size": blocks[0].feed_forward.w_1.out_features,
        "hidden_act": ACTIVATION_NAMES[activation],
        "hidden_dropout_prob": net.dropout.p,
        "attention_probs_dropout_prob": blocks[0].attention.dropout,
        "max_position_embeddings": net.max_length,
        "type_vocab_size": net.segment_embedding.num_embeddings,
        "layer_norm_eps": net.norm.eps,
        "position_embedding_type": "absolute",  # CTranslate2's converter asks for it
        "pad_token_id": padding,
        "tie_word_embeddings": True,
    }
    if head is None:
        layout.linear("pooler.dense", torch.zeros(net.width, net.width), None)
        note = "It has no pooler: `pooler_output` is zero. Use `last_hidden_state`."
        return StockModel("BertModel", "AutoModel", "feature-extraction", config, layout.tensors, notes=(note,))
    if isinstance(head, MaskedTokenHead):
        _put_masked_token_head(layout, head, activation, net.norm.eps)
        return StockModel("BertForMaskedLM", "AutoModelForMaskedLM", "fill-mask", config, layout.tensors)
    if isinstance(head, SpanHead):
        layout.linear("qa_outputs", head.classifier.weight, head.classifier.bias)
        name, auto = "BertForQuestionAnswering", "AutoModelForQuestionAnswering"
        return StockModel(name, auto, "question-answering", config, layout.tensors)
    assert isinstance(head, SequenceHead)
    return _with_sequence_head(layout, config, head, problem, labels)


def _put_block(layout: Layout, name: str, block: Block) -> None:
    attention = folded(block.attention).with_kv_heads(block.attention.n_heads)
    layout.linear(f"{name}.attention.self.query", attention.w_q.flatten(0, 1), attention.b_q.flatten())
    layout.linear(f"{name}.attention.self.key", attention.w_k.flatten(0, 1), attention.b_k.flatten())
    layout.linear(f"{name}.attention.self.value", attention.w_v.flatten(0, 1), attention.b_v.flatten())
    layout.linear(f"{name}.attention.output.dense", attention.w_o.flatten(1), attention.b_o)
    layout.norm(f"{name}.attention.output.LayerNorm", block.norm_1)
    layout.linear(f"{name}.intermediate.dense", block.feed_forward.w_1.weight, block.feed_forward.w_1.bias)
    layout.linear(f"{name}.output.dense", block.feed_forward.w_2.weight, block.feed_forward.w_2.bias)
    layout.norm(f"{name}.output.LayerNorm", block.norm_2)


def _put_masked_token_head(layout: Layout, head: MaskedTokenHead, activation: str, eps: float) -> None:
    if (head.activation, head.norm.eps) != (activation, eps):
        raise NoStockClassError(
            f"BERT has one activation and one layer-norm ε for its layers and its masked-token head; this model has "
            f"{activation} and {eps:g} in the layers, {head.activation} and {head.norm.eps:g} in the head. Train with "
            f"--model.net.activation={head.activation} --model.net.norm_eps={head.norm.eps:g} to export it"
        )
    layout.linear("cls.predictions.transform.dense", head.dense.weight, head.dense.bias)
    layout.norm("cls.predictions.transform.LayerNorm", head.norm)
    layout.put("cls.predictions.bias", head.bias)


def _with_sequence_head(
    layout: Layout, config: dict[str, Any], head: SequenceHead, problem: Problem | None, labels: Sequence[str]
) -> StockModel:
    if head.pooling != "first":
        raise NoStockClassError(
            f"BERT classifies the state of the first token, this model the {head.pooling} one; train it with "
            "--model.pooling=first, or export --format onnx"
        )
    if head.n_spans:
        raise NoStockClassError(
            f"BERT's classifier sees the first token alone, this model's {head.n_spans} spans of the text besides; no "
            "stock class has that"
        )
    layout.linear("bert.pooler.dense", head.dense.weight, head.dense.bias)
    layout.linear("classifier", head.classifier.weight, head.classifier.bias)
    config = {**config, "classifier_dropout": head.dropout.p}
    if problem == "choice":
        name, auto = "BertForMultipleChoice", "AutoModelForMultipleChoice"
        return StockModel(name, auto, "multiple-choice", config, layout.tensors)
    kind = "regression" if problem == "value" else "single_label_classification"
    count = head.classifier.out_features
    names = list(labels) if len(labels) == count else [f"LABEL_{i}" for i in range(count)]
    config["problem_type"] = kind
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    name, auto = "BertForSequenceClassification", "AutoModelForSequenceClassification"
    return StockModel(name, auto, "text-classification", config, layout.tensors)
