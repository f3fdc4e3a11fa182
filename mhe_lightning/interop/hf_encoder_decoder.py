"""An encoder-decoder as Marian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.interop.stock import ACTIVATION_NAMES, Layout, NoStockClassError, StockModel, folded
from mhe_lightning.models import EncoderDecoder
from mhe_lightning.models.layers import Block, CrossBlock

NORM_EPS = 1e-5
"""Of Marian's layer norms, which its config cannot change."""


def stock_encoder_decoder(net: EncoderDecoder, *, end_token: int, padding: int) -> StockModel:
    """The encoder-decoder as Marian, its attention with keys and values for every head.

    Marian's sinusoids have all sines before all cosines, ours have them in turn: the channels of the residual stream
    are permuted, in all weights that read or write it. The tables of positions are written as well, rounded as ours
    are: a copy that `save_pretrained` makes leaves them out, and then has Marian's, which differ by up to 3e-5 at
    position 500.

    Source: Junczys-Dowmunt et al. 2018, *Marian*, arXiv 1804.00344; Vaswani et al. 2017.

    Args:
        net: the encoder-decoder.
        end_token: ends sentences, and begins the decoder's input.
        padding: token that fills rows up.

    Raises:
        NoStockClassError: Marian computes something else.
    """
    encoder: list[Block] = list(net.encoder_blocks)  # type: ignore[arg-type]
    decoder: list[CrossBlock] = list(net.decoder_blocks)  # type: ignore[arg-type]
    eps = encoder[0].norm_1.eps
    if eps != NORM_EPS:
        raise NoStockClassError(
            f"Marian's layer norms have ε = {NORM_EPS:g}, this model's {eps:g}; train it with "
            f"--model.net.norm_eps={NORM_EPS:g} to export it"
        )
    if net.width % 2:
        raise NoStockClassError(f"Marian's positions need an even width; this model's is {net.width}")
    layout = _Permuted(net.token_embedding.weight, net.width)
    tied = net.head.weight is net.target_embedding.weight
    # Marian has one table for both languages only if its output projection is that too
    shared = tied and net.target_embedding is net.token_embedding
    if shared:
        layout.reads("model.shared", net.token_embedding)
    else:
        layout.reads("model.encoder.embed_tokens", net.token_embedding)
        layout.reads("model.decoder.embed_tokens", net.target_embedding)
    for side in ("encoder", "decoder"):
        layout.put(f"model.{side}.embed_positions.weight", net.positions[:, layout.order])
    for i, block in enumerate(encoder):
        _put_block(layout, f"model.encoder.layers.{i}", block)
    for i, cross in enumerate(decoder):
        _put_block(layout, f"model.decoder.layers.{i}", cross)
        layout.attention(f"model.decoder.layers.{i}.encoder_attn", cross.cross_attention)
        layout.permuted_norm(f"model.decoder.layers.{i}.encoder_attn_layer_norm", cross.norm_cross)
    if not tied:
        layout.reads("lm_head", net.head)
    layout.put("final_logits_bias", torch.zeros(1, net.vocab_size))
    width = encoder[0].feed_forward.w_1.out_features
    heads = encoder[0].attention.n_heads
    config: dict[str, Any] = {
        "model_type": "marian",
        "is_encoder_decoder": True,
        "vocab_size": net.vocab_size,
        "decoder_vocab_size": net.vocab_size,
        "d_model": net.width,
        "encoder_layers": len(encoder),
        "decoder_layers": len(decoder),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "activation_function": ACTIVATION_NAMES[encoder[0].feed_forward.activation],
        "dropout": net.dropout.p,
        "attention_dropout": encoder[0].attention.dropout,
        "activation_dropout": 0.0,
        "max_position_embeddings": net.max_length,
        "scale_embedding": True,
        "static_position_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": False,
        "share_encoder_decoder_embeddings": shared,
        "tie_word_embeddings": tied,
        "decoder_start_token_id": end_token,
        "eos_token_id": end_token,
        "pad_token_id": padding,
    }
    generation: dict[str, Any] = {
        "decoder_start_token_id": end_token,
        "eos_token_id": end_token,
        "pad_token_id": padding,
        "max_length": net.max_length,
        "num_beams": 4,
    }
    if padding != end_token:
        generation["bad_words_ids"] = [[padding]]
    note = (
        "The decoder begins with the end token, not with padding: converters that assume the latter (CTranslate2's for "
        "Marian does) change the model. `export --format ctranslate2` makes one that does not."
    )
    penalty = (
        "Beam search in transformers divides by the number of tokens to a power, ours by ((5 + n) / 6)^α: outputs of "
        "the two searches can differ."
    )
    return StockModel(
        "MarianMTModel",
        "AutoModelForSeq2SeqLM",
        "translation",
        config,
        layout.tensors,
        generation,
        (note, penalty),
    )


class _Permuted(Layout):
    """A layout whose residual stream has Marian's order of channels: even ones of ours first, then odd ones."""

    def __init__(self, like: Tensor, width: int) -> None:
        super().__init__(like)
        self.order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)]).to(like.device)

    def reads(self, name: str, table: nn.Embedding | nn.Linear) -> None:
        """Add a matrix of rows that are as wide as the stream, (…, D)."""
        self.put(f"{name}.weight", table.weight[:, self.order])

    def permuted_norm(self, name: str, norm: nn.LayerNorm) -> None:
        """Add a layer norm of the stream."""
        bias = norm.weight.new_zeros(norm.weight.shape) if norm.bias is None else norm.bias
        self.put(f"{name}.weight", norm.weight[self.order])
        self.put(f"{name}.bias", bias[self.order])

    def from_stream(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Add a projection of the stream."""
        self.linear(name, weight[:, self.order], bias)

    def to_stream(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Add a projection whose output is added to the stream."""
        self.linear(name, weight[self.order], None if bias is None else bias[self.order])

    def attention(self, name: str, attention: Attention) -> None:
        """Add an attention with keys and values for every head."""
        heads = folded(attention).with_kv_heads(attention.n_heads)
        self.from_stream(f"{name}.q_proj", heads.w_q.flatten(0, 1), heads.b_q.flatten())
        self.from_stream(f"{name}.k_proj", heads.w_k.flatten(0, 1), heads.b_k.flatten())
        self.from_stream(f"{name}.v_proj", heads.w_v.flatten(0, 1), heads.b_v.flatten())
        self.to_stream(f"{name}.out_proj", heads.w_o.flatten(1), heads.b_o)


def _put_block(layout: _Permuted, name: str, block: Block) -> None:
    layout.attention(f"{name}.self_attn", block.attention)
    layout.permuted_norm(f"{name}.self_attn_layer_norm", block.norm_1)
    layout.from_stream(f"{name}.fc1", block.feed_forward.w_1.weight, block.feed_forward.w_1.bias)
    layout.to_stream(f"{name}.fc2", block.feed_forward.w_2.weight, block.feed_forward.w_2.bias)
    layout.permuted_norm(f"{name}.final_layer_norm", block.norm_2)
