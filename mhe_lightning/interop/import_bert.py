"""BERT as transformers writes it → `Encoder` with MHA, and the head where ours is the same function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mhe_lightning.interop.import_plan import Options, Plan, Row, linear_rows, norm_rows

DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "classifier_dropout": None,
    "tie_word_embeddings": True,
    "problem_type": None,
    "num_labels": 2,
}

EMBEDDINGS = "embeddings.word_embeddings.weight"
PREDICTIONS = r"cls\.predictions\..*"
BUFFERS = {r"embeddings\.(position_ids|token_type_ids)": "a counter, which is no parameter"}
POOLER = {r"pooler\.dense\..*": "the pooler without a classifier, of which it is a part here"}
NEXT_SENTENCE = {r"cls\.seq_relationship\..*": "the prediction of the next sentence, which is no task here"}

HEAD_EPS = 1e-12
"""ε of the layer norm in the head of `MaskedLanguageModeling`, whose activation is the exact GELU."""


class Head(NamedTuple):
    """What a class of BERT adds to the net: the task here, its head's tensors, its settings, and what is left out."""

    task: str = "Task"
    rows: Sequence[Row] = ()
    settings: Mapping[str, Any] = {}
    left: Mapping[str, str] = POOLER
    copies: Mapping[str, str] = {}


def _net_alone(options: Options) -> Head:
    return Head()


def _masked_tokens(options: Options) -> Head:
    width = options.size("hidden_size")
    if not options.flag("tie_word_embeddings"):
        why = "the masked-token head, whose output is the token embedding here (tie_word_embeddings is false)"
    elif options["hidden_act"] != "gelu" or options.number("layer_norm_eps") != HEAD_EPS:
        why = (
            f"the masked-token head, which has GELU and ε = {HEAD_EPS} here (hidden_act is {options['hidden_act']}, "
            f"layer_norm_eps {options['layer_norm_eps']})"
        )
    else:
        return Head(
            task="MaskedLanguageModeling",
            rows=[
                *linear_rows("cls.predictions.transform.dense", "head.dense", width, width),
                *norm_rows("cls.predictions.transform.LayerNorm", "head.norm", width),
                Row("cls.predictions.bias", (options.size("vocab_size"),), ("head.bias",)),
            ],
            left={**POOLER, **NEXT_SENTENCE},
            copies={
                "cls.predictions.decoder.weight": EMBEDDINGS,
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        )
    return Head(left={**POOLER, **NEXT_SENTENCE, PREDICTIONS: why})


def _sequence(options: Options, n_labels: int) -> Head:
    width, dropout = options.size("hidden_size"), options["classifier_dropout"]
    return Head(
        task="SequenceClassification",
        rows=[
            *linear_rows("pooler.dense", "head.dense", width, width),
            *linear_rows("classifier", "head.classifier", width, n_labels),
        ],
        settings={
            "pooling": "first",
            "head_dropout": options.dropout("hidden_dropout_prob" if dropout is None else "classifier_dropout"),
        },
        left={},
    )


def _classes(options: Options) -> Head:
    if options["problem_type"] == "multi_label_classification":
        why = "several labels of one text (problem_type multi_label_classification), which is no task here"
        return Head(left={**POOLER, r"classifier\..*": why})
    return _sequence(options, _n_labels(options))


def _choice(options: Options) -> Head:
    return _sequence(options, 1)


def _span(options: Options) -> Head:
    if _n_labels(options) != 2:
        raise ValueError(
            f"config.json: {_n_labels(options)} labels (id2label) of a BertForQuestionAnswering cannot be imported: a "
            "span has two, its start and its end"
        )
    rows = linear_rows("qa_outputs", "head.classifier", options.size("hidden_size"), 2)
    return Head(task="ExtractiveQuestionAnswering", rows=rows)


def _n_labels(options: Options) -> int:
    labels = options.get("id2label")
    if isinstance(labels, Mapping) and not all(str(key).isdigit() for key in labels):
        raise ValueError(f"config.json: id2label must name labels by their numbers, not {', '.join(map(str, labels))}")
    return len(labels) if isinstance(labels, Mapping) else options.size("num_labels")


HEADS = {
    "BertModel": _net_alone,
    "BertForMaskedLM": _masked_tokens,
    "BertForPreTraining": _masked_tokens,
    "BertForSequenceClassification": _classes,
    "BertForMultipleChoice": _choice,
    "BertForQuestionAnswering": _span,
}


def plan_bert(architecture: str, config: Mapping[str, Any]) -> Plan:
    """What a BERT checkpoint becomes; without a head that has a place here, an `Encoder` of no task.

    Raises:
        ValueError: an option of config.json gives a function that `Encoder` has not.
    """
    options = Options(config, DEFAULTS)
    options.require("position_embedding_type", "absolute", why="an Encoder has learned absolute positions")
    options.require("is_decoder", False, why="an Encoder sees all tokens; a decoder of BERT's has no counterpart here")
    options.require("add_cross_attention", False, why="an Encoder has no cross-attention")
    options.require("pruned_heads", {}, None, why="all layers have the same heads here")
    width, layers = options.size("hidden_size"), options.layers("num_hidden_layers")
    hidden = options.size("intermediate_size")
    head = HEADS[architecture](options)
    rows = [
        Row(EMBEDDINGS, (options.size("vocab_size"), width), ("net.token_embedding.weight",)),
        Row(
            "embeddings.position_embeddings.weight",
            (options.size("max_position_embeddings"), width),
            ("net.position_embedding.weight",),
        ),
        Row(
            "embeddings.token_type_embeddings.weight",
            (options.size("type_vocab_size"), width),
            ("net.segment_embedding.weight",),
        ),
        *norm_rows("embeddings.LayerNorm", "net.norm", width),
        *(row for i in range(layers) for row in _layer(f"encoder.layer.{i}", f"net.blocks.{i}", width, hidden)),
        *head.rows,
    ]
    return Plan(
        architecture=architecture,
        task=head.task,
        settings=head.settings,
        net="Encoder",
        arguments={
            "width": width,
            "n_heads": options.heads("num_attention_heads", "hidden_size"),
            "n_layers": layers,
            "max_length": options.size("max_position_embeddings"),
            "n_segments": options.size("type_vocab_size"),
            "ff_width": None if hidden == 4 * width else hidden,
            "activation": options.activation("hidden_act"),
            "dropout": options.dropout("hidden_dropout_prob"),
            "norm_eps": options.number("layer_norm_eps"),
        },
        attention_dropout=options.dropout("attention_probs_dropout_prob"),
        prefix="bert.",
        rows=rows,
        left={**BUFFERS, **head.left},
        copies=head.copies,
        renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    )


def _layer(there: str, here: str, width: int, hidden: int) -> list[Row]:
    return [
        *linear_rows(f"{there}.attention.self.query", f"{here}.attention.w_q", width, width),
        *linear_rows(f"{there}.attention.self.key", f"{here}.attention.w_k", width, width),
        *linear_rows(f"{there}.attention.self.value", f"{here}.attention.w_v", width, width),
        *linear_rows(f"{there}.attention.output.dense", f"{here}.attention.w_o", width, width),
        *norm_rows(f"{there}.attention.output.LayerNorm", f"{here}.norm_1", width),
        *linear_rows(f"{there}.intermediate.dense", f"{here}.feed_forward.w_1", width, hidden),
        *linear_rows(f"{there}.output.dense", f"{here}.feed_forward.w_2", hidden, width),
        *norm_rows(f"{there}.output.LayerNorm", f"{here}.norm_2", width),
    ]
