"""Our nets as ONNX graphs, node by node.

They are built from the folded weights rather than traced: the graph is the same with every version of torch, its names
are ours, and keys and values keep the heads that they have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from mhe_lightning.attention.folding import GroupedQuery
from mhe_lightning.interop.onnx_builder import Graph
from mhe_lightning.interop.stock import NoStockClassError, folded, stacked
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import MaskedTokenHead, SequenceHead, SpanHead
from mhe_lightning.models.layers import Block, CrossBlock

HIDDEN = torch.finfo(torch.float32).min
"""Score of a key that is not seen. It is finite, so that a query which sees none, a padded one, gives no NaN."""


class KeyValue(NamedTuple):
    """Names of a layer's keys and values in a graph, each (B, g, S, d)."""

    key: str
    value: str


def decoder_graph(net: Decoder) -> Graph:
    """Logits of tokens that follow those of earlier calls, and keys and values for later ones.

    Inputs, outputs and their order are as in Optimum: ``input_ids`` (B, T), ``attention_mask`` (B, P + T) of what is
    cached and what is new, 0 = padding, on either side; ``past_key_values.i.key`` and ``.value`` (B, g, P, d) of layer
    i, P = 0 at the first call. Out: ``logits`` (B, T, V), ``present.i.key`` and ``.value`` (B, g, P + T, d).
    """
    graph = Graph()
    tokens = graph.input("input_ids", ["batch", "new"], tokens=True)
    real = graph.input("attention_mask", ["batch", "total"], tokens=True)
    blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
    attentions = [folded(block.attention) for block in blocks]
    past = _pasts(graph, "past_key_values.{}", attentions, "past")
    T, S = graph.size(tokens, 1), graph.size(real, 1)
    counted = graph.op("Sub", graph.op("CumSum", real, graph.integers(1)), graph.integers(1))
    counted = graph.op("Max", counted, graph.integers(0))  # positions count real tokens
    newest = graph.op("Slice", counted, graph.op("Neg", T), graph.integers(2**62), graph.integers(1))
    places = graph.op("Gather", graph.weight("position_embedding", net.position_embedding.weight), newest)
    table = graph.weight("token_embedding", net.token_embedding.weight)
    x = graph.op("Add", graph.op("Gather", table, tokens), places)
    mask = graph.op("And", _key_mask(graph, real), _causal_mask(graph, T, S))  # (B, 1, 1, T, S)
    present = []
    for i, (block, attention) in enumerate(zip(blocks, attentions, strict=True)):
        normed = graph.norm(f"blocks.{i}.norm_1", x, block.norm_1)
        found, kept = _self_attention(graph, f"blocks.{i}.attention", normed, attention, mask, S, past[i])
        present.append(kept)
        x = graph.op("Add", x, found)
        x = graph.op(
            "Add", x, _feed_forward(graph, f"blocks.{i}", graph.norm(f"blocks.{i}.norm_2", x, block.norm_2), block)
        )
    x = graph.norm("norm", x, net.norm)
    tied = net.head.weight is net.token_embedding.weight
    logits = graph.scores(x, table if tied else graph.weight("head", net.head.weight), net.vocab_size, net.width)
    graph.output("logits", logits, ["batch", "new", net.vocab_size])
    _give_out(graph, "present.{}", present, attentions, "total")
    return graph


def encoder_graph(net: Encoder, head: nn.Module | None) -> Graph:
    """What an encoder and its head give.

    In: ``input_ids``, ``attention_mask`` (0 = padding) and ``token_type_ids``, (B, T). Out: ``last_hidden_state``
    (B, T, D) without a head; ``logits`` (B, T, V) of masked tokens, or (B, labels) of a sequence; ``start_logits`` and
    ``end_logits`` (B, T) of a span.

    Raises:
        NoStockClassError: the head reads spans of the text.
    """
    if isinstance(head, SequenceHead) and head.n_spans:
        raise NoStockClassError(
            f"this model's head sees {head.n_spans} spans of the text, for which the graph has no input; export a "
            "model of a task without spans"
        )
    graph = Graph()
    tokens, real, segments = (
        graph.input(name, ["batch", "tokens"], tokens=True)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    table = graph.weight("token_embedding", net.token_embedding.weight)
    positions = graph.weight("position_embedding", net.position_embedding.weight)
    T = graph.size(tokens, 1)
    x = graph.op("Add", graph.op("Gather", table, tokens), _first(graph, positions, graph.integers(0), T))
    segment_table = graph.weight("segment_embedding", net.segment_embedding.weight)
    x = graph.op("Add", x, graph.op("Gather", segment_table, segments))
    x = graph.norm("norm", x, net.norm)
    mask = _key_mask(graph, real)
    for i, block in enumerate(net.blocks):
        x, _ = _post_norm(graph, f"blocks.{i}", x, block, mask, T, None)  # type: ignore[arg-type]
    if head is None:
        graph.output("last_hidden_state", x, ["batch", "tokens", net.width])
    elif isinstance(head, MaskedTokenHead):
        y = graph.activation(head.activation, graph.linear("head.dense", x, head.dense.weight, head.dense.bias))
        logits = graph.scores(graph.norm("head.norm", y, head.norm), table, net.vocab_size, net.width)
        logits = graph.op("Add", logits, graph.weight("head.bias", head.bias))
        graph.output("logits", logits, ["batch", "tokens", net.vocab_size])
    elif isinstance(head, SpanHead):
        y = graph.linear("head.classifier", x, head.classifier.weight, head.classifier.bias)
        for name, part in zip(("start_logits", "end_logits"), graph.split(y, (1, 1)), strict=True):
            graph.output(name, graph.op("Squeeze", part, graph.integers(2)), ["batch", "tokens"])
    else:
        assert isinstance(head, SequenceHead)
        pooled = _pooled(graph, x, real, head)
        y = graph.op("Tanh", graph.linear("head.dense", pooled, head.dense.weight, head.dense.bias))
        y = graph.linear("head.classifier", y, head.classifier.weight, head.classifier.bias)
        graph.output("logits", y, ["batch", head.classifier.out_features])
    return graph


def source_graph(net: EncoderDecoder) -> Graph:
    """An encoder-decoder's encoder, and what the decoder keeps of the source.

    In: ``input_ids`` and ``attention_mask`` (B, S). Out: ``last_hidden_state`` (B, S, D), and of decoder layer i
    ``present.i.encoder.key`` and ``.value`` (B, g, S, d), to be fed to each call of the decoder.
    """
    graph = Graph()
    tokens, real = (graph.input(name, ["batch", "source"], tokens=True) for name in ("input_ids", "attention_mask"))
    table = graph.weight("token_embedding", net.token_embedding.weight)
    S = graph.size(tokens, 1)
    x = _scaled(graph, net, table, tokens, graph.integers(0), S)
    mask = _key_mask(graph, real)
    for i, block in enumerate(net.encoder_blocks):
        x, _ = _post_norm(graph, f"encoder_blocks.{i}", x, block, mask, S, None)  # type: ignore[arg-type]
    graph.output("last_hidden_state", x, ["batch", "source", net.width])
    attentions = [folded(block.cross_attention) for block in net.decoder_blocks]  # type: ignore[arg-type]
    kept = []
    for i, attention in enumerate(attentions):
        sizes = [attention.n_kv_heads * attention.w_k.shape[1]] * 2
        parts = graph.split(_projected(graph, f"decoder_blocks.{i}.cross_attention.kv", x, attention, "kv"), sizes)
        kept.append(KeyValue(*(_heads(graph, part, attention) for part in parts)))
    _give_out(graph, "present.{}.encoder", kept, attentions, "source")
    return graph


def target_graph(net: EncoderDecoder) -> Graph:
    """An encoder-decoder's decoder: logits of target tokens that follow those of earlier calls.

    In: ``input_ids`` (B, T), ``encoder_attention_mask`` (B, S), of layer i ``past_key_values.i.decoder.key`` and
    ``.value`` (B, g, P, d) of the target so far and ``past_key_values.i.encoder.key`` and ``.value`` (B, g, S, d) of
    the source. Out: ``logits`` (B, T, V), ``present.i.decoder.key`` and ``.value`` (B, g, P + T, d).
    """
    graph = Graph()
    tokens = graph.input("input_ids", ["batch", "new"], tokens=True)
    real = graph.input("encoder_attention_mask", ["batch", "source"], tokens=True)
    blocks: list[CrossBlock] = list(net.decoder_blocks)  # type: ignore[arg-type]
    attentions = [folded(block.attention) for block in blocks]
    crosses = [folded(block.cross_attention) for block in blocks]
    past = _pasts(graph, "past_key_values.{}.decoder", attentions, "past")
    source = _pasts(graph, "past_key_values.{}.encoder", crosses, "source")
    T, P, S = graph.size(tokens, 1), graph.size(past[0].key, 2), graph.size(real, 1)
    total = graph.op("Add", P, T)
    table = graph.weight("token_embedding", net.target_embedding.weight)
    x = _scaled(graph, net, table, tokens, P, total)
    causal, visible = _causal_mask(graph, T, total), _key_mask(graph, real)
    present = []
    for i, block in enumerate(blocks):
        name = f"decoder_blocks.{i}"
        found, kept = _self_attention(graph, f"{name}.attention", x, attentions[i], causal, total, past[i])
        present.append(kept)
        x = graph.norm(f"{name}.norm_1", graph.op("Add", x, found), block.norm_1)
        q = _projected(graph, f"{name}.cross_attention.q", x, crosses[i], "q")
        found = _attended(graph, f"{name}.cross_attention", q, source[i], crosses[i], visible, S)
        x = graph.norm(f"{name}.norm_cross", graph.op("Add", x, found), block.norm_cross)
        x = graph.norm(f"{name}.norm_2", graph.op("Add", x, _feed_forward(graph, name, x, block)), block.norm_2)
    tied = net.head.weight is net.target_embedding.weight
    logits = graph.scores(x, table if tied else graph.weight("head", net.head.weight), net.vocab_size, net.width)
    graph.output("logits", logits, ["batch", "new", net.vocab_size])
    _give_out(graph, "present.{}.decoder", present, attentions, "total")
    return graph


def _post_norm(
    graph: Graph, name: str, x: str, block: Block, mask: str, S: str, past: KeyValue | None
) -> tuple[str, KeyValue]:
    found, kept = _self_attention(graph, f"{name}.attention", x, folded(block.attention), mask, S, past)
    x = graph.norm(f"{name}.norm_1", graph.op("Add", x, found), block.norm_1)
    return graph.norm(f"{name}.norm_2", graph.op("Add", x, _feed_forward(graph, name, x, block)), block.norm_2), kept


def _feed_forward(graph: Graph, name: str, x: str, block: Block) -> str:
    layer = block.feed_forward
    hidden = graph.activation(layer.activation, graph.linear(f"{name}.w_1", x, layer.w_1.weight, layer.w_1.bias))
    return graph.linear(f"{name}.w_2", hidden, layer.w_2.weight, layer.w_2.bias)


def _self_attention(
    graph: Graph, name: str, x: str, attention: GroupedQuery, mask: str, S: str, past: KeyValue | None
) -> tuple[str, KeyValue]:
    """Its output (B, T, D), and its keys and values with those before."""
    n, d = attention.b_q.shape
    sizes = [n * d, *[attention.n_kv_heads * d] * 2]
    q, k, v = graph.split(_projected(graph, f"{name}.qkv", x, attention, "qkv"), sizes)
    kept = KeyValue(*(_heads(graph, part, attention) for part in (k, v)))
    if past is not None:
        kept = KeyValue(*(graph.op("Concat", old, new, axis=2) for old, new in zip(past, kept, strict=True)))
    return _attended(graph, name, q, kept, attention, mask, S), kept


def _projected(graph: Graph, name: str, x: str, attention: GroupedQuery, which: str) -> str:
    """Some of queries, keys and values as one projection; queries are divided by √d."""
    scale = 1 / math.sqrt(attention.b_q.shape[1])
    scaled = attention._replace(w_q=attention.w_q * scale, b_q=attention.b_q * scale)
    return graph.linear(name, x, *stacked(scaled, which))


def _heads(graph: Graph, projected: str, attention: GroupedQuery) -> str:
    """Keys or values (B, S, g·d) → (B, g, S, d)."""
    split = graph.reshape(projected, 0, 0, attention.n_kv_heads, attention.w_k.shape[1])
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _attended(graph: Graph, name: str, q: str, stored: KeyValue, attention: GroupedQuery, mask: str, S: str) -> str:
    """Output (B, T, D) of queries (B, T, n·d); the r = n/g heads that share keys are so many more queries to them."""
    (n, d), g = attention.b_q.shape, attention.n_kv_heads
    T = graph.size(q, 1)
    q = graph.op("Transpose", graph.reshape(q, 0, 0, g, n // g, d), perm=[0, 2, 3, 1, 4])  # (B, g, r, T, d)
    keys = graph.op("Transpose", stored.key, perm=[0, 1, 3, 2])  # (B, g, d, S)
    scores = graph.op("MatMul", graph.reshape(q, 0, g, -1, d), keys)  # (B, g, r·T, S)
    scores = graph.op("Where", mask, graph.reshape(scores, 0, g, n // g, T, S), graph.number(HIDDEN))
    weights = graph.op("Softmax", scores, axis=-1)
    found = graph.op(
        "MatMul", graph.reshape(weights, 0, g, graph.op("Mul", T, graph.integers(n // g)), S), stored.value
    )
    found = graph.op("Transpose", graph.reshape(found, 0, g, n // g, T, d), perm=[0, 3, 1, 2, 4])  # (B, T, g, r, d)
    return graph.linear(f"{name}.w_o", graph.reshape(found, 0, 0, n * d), attention.w_o.flatten(1), attention.b_o)


def _key_mask(graph: Graph, real: str) -> str:
    """(B, S) int64 → (B, 1, 1, 1, S) boolean."""
    return graph.op("Greater", graph.op("Unsqueeze", real, graph.integers(1, 2, 3)), graph.integers(0))


def _causal_mask(graph: Graph, T: str, S: str) -> str:
    """Which of S keys are seen by the T queries that are the last of them, (T, S) boolean."""
    last, step = (graph.op("Squeeze", size) for size in (S, graph.integers(1)))
    first, zero = (graph.op("Squeeze", size) for size in (graph.op("Sub", S, T), graph.integers(0)))
    queries = graph.op("Unsqueeze", graph.op("Range", first, last, step), graph.integers(1))
    return graph.op("LessOrEqual", graph.op("Range", zero, last, step), queries)


def _first(graph: Graph, table: str, start: str, end: str) -> str:
    """Rows from ``start`` up to ``end`` of a table."""
    return graph.op("Slice", table, start, end, graph.integers(0))


def _scaled(graph: Graph, net: EncoderDecoder, table: str, tokens: str, start: str, end: str) -> str:
    """An encoder-decoder's input: embeddings times √D, and sinusoids."""
    x = graph.op("Mul", graph.op("Gather", table, tokens), graph.number(math.sqrt(net.width)))
    return graph.op("Add", x, _first(graph, graph.weight("positions", net.positions), start, end))


def _pooled(graph: Graph, x: str, real: str, head: SequenceHead) -> str:
    """The state that a sequence's label is read from, (B, D)."""
    if head.pooling == "first":
        return graph.op("Gather", x, graph.op("Squeeze", graph.integers(0)), axis=1)
    ones = graph.op("Cast", graph.op("Greater", real, graph.integers(0)), to=1)  # (B, T) float32
    count = graph.op("ReduceSum", ones, graph.integers(1), keepdims=1)  # (B, 1)
    if head.pooling == "last":
        index = graph.op("Sub", graph.op("Cast", count, to=7), graph.integers(1))  # (B, 1) int64
        return graph.op("GatherND", x, index, batch_dims=1)
    weights = graph.op("Unsqueeze", graph.op("Div", ones, count), graph.integers(1))  # (B, 1, T)
    return graph.op("Squeeze", graph.op("MatMul", weights, x), graph.integers(1))


def _shape(attention: GroupedQuery, length: str) -> list[int | str]:
    return ["batch", attention.n_kv_heads, length, attention.w_k.shape[1]]


def _pasts(graph: Graph, name: str, attentions: Sequence[GroupedQuery], length: str) -> list[KeyValue]:
    """Inputs for the keys and values of each layer."""
    return [
        KeyValue(*(graph.input(f"{name.format(i)}.{kind}", _shape(attention, length)) for kind in KeyValue._fields))
        for i, attention in enumerate(attentions)
    ]


def _give_out(
    graph: Graph, name: str, kept: Sequence[KeyValue], attentions: Sequence[GroupedQuery], length: str
) -> None:
    """Outputs with the keys and values of each layer."""
    for i, (attention, stored) in enumerate(zip(attentions, kept, strict=True)):
        for kind, value in zip(KeyValue._fields, stored, strict=True):
            graph.output(f"{name.format(i)}.{kind}", value, _shape(attention, length))
