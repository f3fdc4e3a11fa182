"""GPT-2 as transformers writes it → `Decoder` with MHA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mhe_lightning.interop.import_plan import Options, Plan, Row, norm_rows

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


def plan_gpt2(architecture: str, config: Mapping[str, Any]) -> Plan:
    """What a GPT-2 checkpoint becomes.

    Its linear layers are stored transposed, queries, keys and values of a layer as one matrix. A language model's
    output projection is the token embedding, or one of its own (``tie_word_embeddings`` false).

    Raises:
        ValueError: an option of config.json gives a function that `Decoder` has not.
    """
    options = Options(config, DEFAULTS)
    options.require("scale_attn_weights", True, why="scores are always divided by √d here")
    options.require("scale_attn_by_inverse_layer_idx", False, why="no layer scales its scores otherwise here")
    options.require("add_cross_attention", False, why="a Decoder has no cross-attention")
    options.require("pruned_heads", {}, None, why="all layers have the same heads here")
    # reorder_and_upcast_attn changes only the precision in which the same scores are computed
    width, layers, tied = options.size("n_embd"), options.layers("n_layer"), options.flag("tie_word_embeddings")
    if architecture == "GPT2Model" and not tied:
        raise ValueError(
            "config.json: tie_word_embeddings (False) of a GPT2Model leaves it without an output projection, which a "
            "Decoder has; give the GPT2LMHeadModel"
        )
    hidden = 4 * width if options["n_inner"] is None else options.size("n_inner")
    vocabulary, positions = options.size("vocab_size"), options.size("n_positions")
    rows = [
        Row("wte.weight", (vocabulary, width), ("net.token_embedding.weight", *["net.head.weight"] * tied)),
        Row("wpe.weight", (positions, width), ("net.position_embedding.weight",)),
        *(row for layer in range(layers) for row in _layer(f"h.{layer}", f"net.blocks.{layer}", width, hidden)),
        *norm_rows("ln_f", "net.norm", width),
    ]
    if not tied:
        rows.append(Row("lm_head.weight", (vocabulary, width), ("net.head.weight",)))
    embedding, residual = options.dropout("embd_pdrop"), options.dropout("resid_pdrop")
    differs = f"dropout is {residual} (resid_pdrop) also of embeddings, where embd_pdrop is {embedding}; only training"
    return Plan(
        architecture=architecture,
        task="LanguageModeling",
        net="Decoder",
        arguments={
            "width": width,
            "n_heads": options.heads("n_head", "n_embd"),
            "n_layers": layers,
            "max_length": positions,
            "ff_width": None if hidden == 4 * width else hidden,
            "activation": options.activation("activation_function"),
            "dropout": residual,
            "tie_embeddings": tied,
            "norm_eps": options.number("layer_norm_epsilon"),
        },
        attention_dropout=options.dropout("attn_pdrop"),
        prefix="transformer.",
        rows=rows,
        left={r"h\.\d+\.attn\.(bias|masked_bias)": "a causal mask, which is no parameter"},
        copies={"lm_head.weight": "wte.weight"} if tied else {},
        notes=[differs] if embedding != residual else [],
    )


def _layer(there: str, here: str, width: int, hidden: int) -> list[Row]:
    queries_keys_values = [f"{here}.attention.{name}" for name in ("w_q", "w_k", "w_v")]
    rows = [
        Row(
            f"{there}.attn.c_attn.weight",
            (width, 3 * width),
            tuple(f"{name}.weight" for name in queries_keys_values),
            _transposed_thirds,
        ),
        Row(
            f"{there}.attn.c_attn.bias",
            (3 * width,),
            tuple(f"{name}.bias" for name in queries_keys_values),
            _thirds,
        ),
    ]
    for linear, name, inputs, outputs in (
        ("attn.c_proj", "attention.w_o", width, width),
        ("mlp.c_fc", "feed_forward.w_1", width, hidden),
        ("mlp.c_proj", "feed_forward.w_2", hidden, width),
    ):
        rows.append(Row(f"{there}.{linear}.weight", (inputs, outputs), (f"{here}.{name}.weight",), Tensor.t))
        rows.append(Row(f"{there}.{linear}.bias", (outputs,), (f"{here}.{name}.bias",)))
    return [*rows, *(row for i in (1, 2) for row in norm_rows(f"{there}.ln_{i}", f"{here}.norm_{i}", width))]


def _thirds(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.chunk(3)


def _transposed_thirds(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.t().chunk(3)
