"""A decoder as GPTBigCode, where all heads share keys and values, or else as GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhe_lightning.interop.stock import ACTIVATION_NAMES, Layout, StockModel, folded, stacked
from mhe_lightning.models import Decoder
from mhe_lightning.models.layers import Block


def stock_decoder(net: Decoder, *, end_of_text: int) -> StockModel:
    """The decoder as the stock class that computes the same.

    MHE, MQA and SHA, folded, are multi-query attention, which GPTBigCode has: its KV cache holds 2d numbers per token
    and layer, as ours. All others become GPT-2, whose cache holds 2nd.

    Source: Li et al. 2023, *StarCoder*, arXiv 2305.06161 (GPTBigCode); Radford et al. 2019 (GPT-2).

    Args:
        net: the decoder.
        end_of_text: token that begins and ends documents.

    Raises:
        NoStockClassError: its attention is of a kind that no stock class computes.
    """
    blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
    attentions = [folded(block.attention) for block in blocks]
    kv_heads = max(attention.n_kv_heads for attention in attentions)
    n_heads = blocks[0].attention.n_heads
    multi_query = kv_heads == 1
    layout = Layout(net.token_embedding.weight)
    layout.put("transformer.wte.weight", net.token_embedding.weight)
    layout.put("transformer.wpe.weight", net.position_embedding.weight)
    for i, (block, attention) in enumerate(zip(blocks, attentions, strict=True)):
        name = f"transformer.h.{i}"
        put = layout.linear if multi_query else _transposed(layout)
        layout.norm(f"{name}.ln_1", block.norm_1)
        put(f"{name}.attn.c_attn", *stacked(attention if multi_query else attention.with_kv_heads(n_heads), "qkv"))
        put(f"{name}.attn.c_proj", attention.w_o.flatten(1), attention.b_o)
        layout.norm(f"{name}.ln_2", block.norm_2)
        put(f"{name}.mlp.c_fc", block.feed_forward.w_1.weight, block.feed_forward.w_1.bias)
        put(f"{name}.mlp.c_proj", block.feed_forward.w_2.weight, block.feed_forward.w_2.bias)
    layout.norm("transformer.ln_f", net.norm)
    tied = net.head.weight is net.token_embedding.weight
    if not tied:
        layout.put("lm_head.weight", net.head.weight)
    config: dict[str, Any] = {
        "vocab_size": net.vocab_size,
        "n_positions": net.max_length,
        "n_embd": net.width,
        "n_layer": len(blocks),
        "n_head": n_heads,
        "n_inner": blocks[0].feed_forward.w_1.out_features,
        "activation_function": ACTIVATION_NAMES[blocks[0].feed_forward.activation],
        "resid_pdrop": blocks[0].dropout.p,
        "embd_pdrop": net.dropout.p,
        "attn_pdrop": blocks[0].attention.dropout,
        "layer_norm_epsilon": net.norm.eps,
        "scale_attn_weights": True,
        "tie_word_embeddings": tied,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }
    generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    if multi_query:
        return StockModel(
            "GPTBigCodeForCausalLM",
            "AutoModelForCausalLM",
            "text-generation",
            {"model_type": "gpt_bigcode", "multi_query": True, **config},
            layout.tensors,
            generation,
        )
    notes: tuple[str, ...] = ()
    if kv_heads < n_heads:
        notes = (
            f"GPT-2 has keys and values for each of its {n_heads} heads; here groups of {n_heads // kv_heads} heads "
            "have equal ones, and the KV cache is that much larger than the model's own.",
        )
    return StockModel(
        "GPT2LMHeadModel",
        "AutoModelForCausalLM",
        "text-generation",
        {"model_type": "gpt2", **config},
        layout.tensors,
        generation,
        notes,
    )


def _transposed(layout: Layout) -> Any:
    """GPT-2's projections are stored (in, out)."""

    def put(name: str, weight: Tensor, bias: Tensor | None) -> None:
        layout.put(f"{name}.weight", weight.T)
        layout.put(f"{name}.bias", weight.new_zeros(weight.shape[0]) if bias is None else bias)

    return put
