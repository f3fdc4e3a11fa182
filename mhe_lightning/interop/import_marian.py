"""Marian as transformers writes it → `EncoderDecoder` with MHA, with the channels of its residual stream in our order.

Positions there have their sines in the first half of the channels and their cosines in the second; here they alternate.
Everything else is the same function whatever the order of the channels, so all that reads or writes the residual
stream is permuted alike: the channel 2i here is i there, and 2i + 1 is D/2 + i.

The tables themselves are no weights: here they are computed in float32, there in float64 and then rounded, so that they
differ by up to 3e-5 at 512 positions and 6e-5 at 1024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhe_lightning.interop.import_plan import Options, Plan, Row
from mhe_lightning.models.layers import sinusoids

ARCHITECTURES = ("MarianMTModel",)

NORM_EPS = 1e-5
"""ε of all layer norms there; no option of config.json."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 58101,
    "decoder_vocab_size": None,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 58100,
    "eos_token_id": 0,
    "scale_embedding": False,
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
}

ENCODER_EMBEDDING = "encoder.embed_tokens.weight"
DECODER_EMBEDDING = "decoder.embed_tokens.weight"
FINAL_BIAS = "final_logits_bias"
TABLES = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")

MOST_POSITIONS = 100_000
"""No tensor says how many there are, and a table is made of them."""

TABLE_TOLERANCE = 1e-3
"""Between a table there and ours: rounding is below it, another order of the channels far above."""


def plan_marian(architecture: str, config: Mapping[str, Any]) -> Plan:
    """What a Marian checkpoint becomes.

    Raises:
        ValueError: an option of config.json gives a function that `EncoderDecoder` has not.
    """
    options = Options(config, DEFAULTS)
    _check(options)
    width, vocabulary = options.size("d_model"), options.size("vocab_size")
    hidden, layers = options.size("encoder_ffn_dim"), options.layers("encoder_layers")
    decoder_layers, positions = (
        options.layers("decoder_layers"),
        options.size("max_position_embeddings", MOST_POSITIONS),
    )
    shared, tied = options.flag("share_encoder_decoder_embeddings"), options.flag("tie_word_embeddings")
    stream = _Stream(width)
    return Plan(
        architecture=architecture,
        task="Translation",
        net="EncoderDecoder",
        arguments={
            "width": width,
            "n_heads": options.heads("encoder_attention_heads", "d_model"),
            "n_layers": layers,
            "n_decoder_layers": None if decoder_layers == layers else decoder_layers,
            "max_length": positions,
            "ff_width": None if hidden == 4 * width else hidden,
            "activation": options.activation("activation_function"),
            "dropout": options.dropout("dropout"),
            "share_embeddings": shared,
            "tie_embeddings": tied,
            "norm_eps": NORM_EPS,
        },
        attention_dropout=options.dropout("attention_dropout"),
        prefix="model.",
        rows=[
            *_embeddings(stream, vocabulary, shared, tied),
            Row(FINAL_BIAS, (1, vocabulary), (), _no_bias),
            *(Row(table, (positions, width), (), stream.sinusoids, optional=True) for table in TABLES),
            *(
                row
                for layer in range(layers)
                for row in stream.layer(f"encoder.layers.{layer}", f"net.encoder_blocks.{layer}", hidden)
            ),
            *(
                row
                for layer in range(decoder_layers)
                for row in stream.layer(f"decoder.layers.{layer}", f"net.decoder_blocks.{layer}", hidden, True)
            ),
        ],
        copies=_copies(shared, tied),
        left=dict.fromkeys(map(re.escape, TABLES), "the table of sinusoidal positions, which is computed here"),
        notes=_notes(options),
    )


def _check(options: Options) -> None:
    options.require("scale_embedding", True, why="token embeddings are multiplied by √D here")
    options.require("normalize_before", False, why="layers are post-norm here")
    options.require("normalize_embedding", False, why="embeddings are not normalised here")
    options.require("add_final_layer_norm", False, why="no norm follows the last layer here")
    options.require("static_position_embeddings", True, why="positions are sinusoids here")
    options.require("is_decoder", False, why="an EncoderDecoder has both parts")
    for there, name in (("decoder_attention_heads", "encoder_attention_heads"), ("decoder_ffn_dim", "encoder_ffn_dim")):
        options.require(there, options[name], why=f"encoder and decoder have the same here, and {name} is another")
    options.require("decoder_vocab_size", None, options["vocab_size"], why="both languages have one vocabulary here")


def _notes(options: Options) -> list[str]:
    notes = [
        f"{name} ({options[name]}) is left out, which matters only in training"
        for name in ("activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
        if options.number(name) > 0
    ]
    start, end = options["decoder_start_token_id"], options["eos_token_id"]
    if start != end:
        notes.append(
            f"the decoder was trained to begin with token {start} (decoder_start_token_id); `translate` begins with "
            f"the end token, {end}, so translations differ"
        )
    return notes


def _embeddings(stream: _Stream, vocabulary: int, shared: bool, tied: bool) -> list[Row]:
    source, target, output = (f"net.{name}.weight" for name in ("token_embedding", "target_embedding", "head"))
    shape = (vocabulary, stream.width)
    first = [source, *[target] * shared, *[output] * (shared and tied)]
    rows = [Row("shared.weight" if shared else ENCODER_EMBEDDING, shape, tuple(first), stream.inputs)]
    if not shared:
        rows.append(Row(DECODER_EMBEDDING, shape, (target, *[output] * tied), stream.inputs))
    if not tied:
        rows.append(Row("lm_head.weight", shape, (output,), stream.inputs))
    return rows


def _copies(shared: bool, tied: bool) -> dict[str, str]:
    copies = {ENCODER_EMBEDDING: "shared.weight", DECODER_EMBEDDING: "shared.weight"} if shared else {}
    if tied:
        copies["lm_head.weight"] = "shared.weight" if shared else DECODER_EMBEDDING
    return copies


def _no_bias(bias: Tensor) -> tuple[()]:
    if bias.any():
        raise ValueError(
            f"{FINAL_BIAS} is not zero (its largest entry is {bias.abs().max().item():.3g}); the output of an "
            "EncoderDecoder has no bias, so this checkpoint cannot be imported"
        )
    return ()


class _Stream:
    """Rows of the tensors that read or write a residual stream of ``width`` channels, permuted.

    Args:
        width: model width D.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        half = (width + 1) // 2  # as many sines
        self.order = torch.tensor([channel // 2 + channel % 2 * half for channel in range(width)])

    def inputs(self, matrix: Tensor) -> Tensor:
        """(outputs, D): what reads the stream, and embeddings (V, D)."""
        return matrix[:, self.order]

    def outputs(self, tensor: Tensor) -> Tensor:
        """(D, inputs) or (D,): what writes the stream."""
        return tensor[self.order]

    def sinusoids(self, table: Tensor) -> tuple[()]:
        """Nothing, of a table of positions (T, D) that is the one computed here."""
        largest = (self.inputs(table) - sinusoids(*table.shape)).abs().max().item()
        if not largest <= TABLE_TOLERANCE:
            raise ValueError(
                f"embed_positions.weight is not Marian's table of sinusoids (it differs by {largest:.3g}); an "
                "EncoderDecoder computes that, so this checkpoint cannot be imported"
            )
        return ()

    def layer(self, there: str, here: str, hidden: int, crosses: bool = False) -> list[Row]:
        """The rows of a layer, with cross-attention where it ``crosses``."""
        rows = [
            *self._attention(f"{there}.self_attn", f"{here}.attention"),
            *self._norm(f"{there}.self_attn_layer_norm", f"{here}.norm_1"),
            *self._reader(f"{there}.fc1", f"{here}.feed_forward.w_1", hidden),
            *self._writer(f"{there}.fc2", f"{here}.feed_forward.w_2", hidden),
            *self._norm(f"{there}.final_layer_norm", f"{here}.norm_2"),
        ]
        if crosses:
            rows += self._attention(f"{there}.encoder_attn", f"{here}.cross_attention")
            rows += self._norm(f"{there}.encoder_attn_layer_norm", f"{here}.norm_cross")
        return rows

    def _attention(self, there: str, here: str) -> list[Row]:
        names = (("q_proj", "w_q"), ("k_proj", "w_k"), ("v_proj", "w_v"))
        return [
            *(row for theirs, ours in names for row in self._reader(f"{there}.{theirs}", f"{here}.{ours}", self.width)),
            *self._writer(f"{there}.out_proj", f"{here}.w_o", self.width),
        ]

    def _reader(self, there: str, here: str, outputs: int) -> list[Row]:
        return [
            Row(f"{there}.weight", (outputs, self.width), (f"{here}.weight",), self.inputs),
            Row(f"{there}.bias", (outputs,), (f"{here}.bias",)),
        ]

    def _writer(self, there: str, here: str, inputs: int) -> list[Row]:
        return [
            Row(f"{there}.weight", (self.width, inputs), (f"{here}.weight",), self.outputs),
            Row(f"{there}.bias", (self.width,), (f"{here}.bias",), self.outputs),
        ]

    def _norm(self, there: str, here: str) -> list[Row]:
        return [Row(f"{there}.{kind}", (self.width,), (f"{here}.{kind}",), self.outputs) for kind in ("weight", "bias")]
