"""Our nets as CTranslate2's specifications, weight by weight.

CTranslate2's own converters for Hugging Face's classes change some models: GPTBigCode's leaves the layer-norm ε out,
for which the engine then takes 1e-5; Marian's drops the last row of the vocabulary and lets the decoder begin with a
zero embedding. The specification classes, which those converters fill, have room for what our models compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.interop.engine import vocabulary
from mhe_lightning.interop.hf_tokenizer import stock_tokenizer
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import folded, stacked
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import SequenceHead
from mhe_lightning.models.layers import Block, CrossBlock

ACTIVATIONS = {"gelu": "GELU", "gelu_tanh": "GELUTanh", "relu": "RELU"}
"""Our name of an activation → that of CTranslate2."""


def specification(native: Native) -> Any:
    """The model as a `ctranslate2.specs.ModelSpec` that computes the same.

    Self-attention keeps the heads of keys and values that it has when folded. Of a decoder with one of them, as in
    MHE, MQA and SHA, CTranslate2 caches 2d numbers per token; with more, and in the other models, it caches a copy for
    every head. Encoders and encoder-decoders are not told to cache one: the engine then refuses batches of different
    lengths. In cross-attention it gives wrong numbers for one head and several queries at once: there each has its own.

    Raises:
        NoStockClassError: its attention is of a kind that CTranslate2 does not compute.
    """
    net = native.net
    if isinstance(net, Decoder):
        spec = _decoder(net)
    elif isinstance(net, EncoderDecoder):
        spec = _encoder_decoder(net)
    else:
        assert isinstance(net, Encoder)
        spec = _encoder(net, native.head)
    end = native.tokenizer.id_to_token(end_of_text_id(native.tokenizer))
    # without an unknown token that is in the vocabulary the engine does not load the model
    _, names = stock_tokenizer(native.tokenizer, net, native.max_length)
    spec.config.unk_token = names["unk_token"]
    spec.config.bos_token = names.get("cls_token", end)
    spec.config.eos_token = end
    spec.config.layer_norm_epsilon = blocks_of(net)[0].norm_1.eps
    tokens = vocabulary(native)
    if isinstance(net, EncoderDecoder):
        spec.config.decoder_start_token = end
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
    else:
        spec.register_vocabulary(tokens)
    return spec


def _specs() -> Any:
    return require("ctranslate2.specs.transformer_spec", "ctranslate2", "export a model to it")


def _common() -> Any:
    return require("ctranslate2.specs.common_spec", "ctranslate2", "export a model to it")


def blocks_of(net: nn.Module) -> list[Block]:
    return list(net.blocks)  # type: ignore[arg-type]


def _activation(block: Block) -> Any:
    return _common().Activation[ACTIVATIONS[block.feed_forward.activation]]


def kv_heads(blocks: Sequence[Block]) -> int | None:
    """Heads of keys and values in a stack; None where each head has its own, which CTranslate2 calls so."""
    heads = max(folded(block.attention).n_kv_heads for block in blocks)
    return None if heads == blocks[0].attention.n_heads else heads


def _decoder(net: Decoder) -> Any:
    blocks = blocks_of(net)
    heads = kv_heads(blocks)
    spec = _specs().TransformerDecoderModelSpec.from_config(
        len(blocks),
        blocks[0].attention.n_heads,
        pre_norm=True,
        activation=_activation(blocks[0]),
        num_heads_kv=heads,
        multi_query_attention=heads == 1,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = _stored(net.token_embedding.weight)
    decoder.position_encodings.encodings = _stored(net.position_embedding.weight)
    decoder.projection.weight = _stored(net.head.weight)
    _norm(decoder.layer_norm, net.norm)
    for layer, block in zip(decoder.layer, blocks, strict=True):
        _block(layer, block, heads)
        if heads == 1:
            # the engine caches one head only under this flag, for which its specification has no field (nor does its
            # converter for GPTBigCode set it); with num_heads_kv alone it caches n copies of the head
            vars(layer.self_attention)["multi_query"] = True
    return spec


def _encoder_decoder(net: EncoderDecoder) -> Any:
    specs = _specs()
    sides = []
    for kind, own in (
        (specs.TransformerEncoderSpec, net.encoder_blocks),
        (specs.TransformerDecoderSpec, net.decoder_blocks),
    ):
        blocks: list[Block] = list(own)  # type: ignore[arg-type]
        heads = kv_heads(blocks)
        side = kind(
            len(blocks),
            blocks[0].attention.n_heads,
            pre_norm=False,
            activation=_activation(blocks[0]),
            num_heads_kv=heads,
            multi_query_attention=heads == 1,
        )
        side.scale_embeddings = True
        side.position_encodings.encodings = _stored(net.positions)
        for layer, block in zip(side.layer, blocks, strict=True):
            _block(layer, block, heads)
            if isinstance(block, CrossBlock):
                _cross_attention(layer.attention, block)
        sides.append(side)
    encoder, decoder = sides
    encoder.embeddings[0].weight = _stored(net.token_embedding.weight)
    decoder.embeddings.weight = _stored(net.target_embedding.weight)
    decoder.projection.weight = _stored(net.head.weight)
    return specs.TransformerSpec(encoder, decoder)


def _encoder(net: Encoder, head: nn.Module | None) -> Any:
    specs, common = _specs(), _common()
    blocks = blocks_of(net)
    heads = kv_heads(blocks)
    encoder = specs.TransformerEncoderSpec(
        len(blocks),
        blocks[0].attention.n_heads,
        pre_norm=False,
        activation=_activation(blocks[0]),
        layernorm_embedding=True,
        num_source_embeddings=2,
        embeddings_merge=common.EmbeddingsMerge.ADD,
        num_heads_kv=heads,
        multi_query_attention=heads == 1,
    )
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight = _stored(net.token_embedding.weight)
    encoder.embeddings[1].weight = _stored(net.segment_embedding.weight)
    encoder.position_encodings.encodings = _stored(net.position_embedding.weight)
    _norm(encoder.layernorm_embedding, net.norm)
    for layer, block in zip(encoder.layer, blocks, strict=True):
        _block(layer, block, heads)
    pooler = pooler_of(head)
    spec = specs.TransformerEncoderModelSpec(
        encoder, pooling_layer=pooler is not None, pooling_activation=common.Activation.Tanh
    )
    if pooler is not None:
        _linear(spec.pooler_dense, pooler.weight, pooler.bias)
    return spec


def pooler_of(head: nn.Module | None) -> nn.Linear | None:
    """What CTranslate2's pooling layer computes of the first token's state, if the head does."""
    return head.dense if isinstance(head, SequenceHead) and head.pooling == "first" and not head.n_spans else None


def _block(spec: Any, block: Block, heads: int | None) -> None:
    attention = folded(block.attention).with_kv_heads(heads or block.attention.n_heads)
    _linear(spec.self_attention.linear[0], *stacked(attention, "qkv"))
    _linear(spec.self_attention.linear[1], attention.w_o.flatten(1), attention.b_o)
    _norm(spec.self_attention.layer_norm, block.norm_1)
    _linear(spec.ffn.linear_0, block.feed_forward.w_1.weight, block.feed_forward.w_1.bias)
    _linear(spec.ffn.linear_1, block.feed_forward.w_2.weight, block.feed_forward.w_2.bias)
    _norm(spec.ffn.layer_norm, block.norm_2)


def _cross_attention(spec: Any, block: CrossBlock) -> None:
    n_heads = block.cross_attention.n_heads
    attention = folded(block.cross_attention).with_kv_heads(n_heads)
    if hasattr(spec, "num_heads_kv"):  # the decoder's, which is of its self-attention
        spec.num_heads_kv = np.int32(n_heads)
    _linear(spec.linear[0], *stacked(attention, "q"))
    _linear(spec.linear[1], *stacked(attention, "kv"))
    _linear(spec.linear[2], attention.w_o.flatten(1), attention.b_o)
    _norm(spec.layer_norm, block.norm_cross)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _linear(spec: Any, weight: Tensor, bias: Tensor | None) -> None:
    spec.weight = _stored(weight)
    if bias is not None:
        spec.bias = _stored(bias)


def _norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma = _stored(norm.weight)
    spec.beta = _stored(torch.zeros_like(norm.weight) if norm.bias is None else norm.bias)
