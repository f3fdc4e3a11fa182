"""A decoder as a GGUF file, which llama.cpp and what is built on it run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning.data.tokenizer import end_of_text_id
from mhe_lightning.extras import require
from mhe_lightning.interop.engine import (
    EngineAgreement,
    EngineExport,
    expected_scores,
    export_folder,
    largest_difference,
    refuse_unknown,
    vocabulary,
)
from mhe_lightning.interop.native import Native
from mhe_lightning.interop.stock import NoStockClassError, folded, stacked
from mhe_lightning.interop.verification import NotEqualError, fitting_pairs, native_batch
from mhe_lightning.models import Decoder
from mhe_lightning.models.layers import Block

MODEL = "model.gguf"


def export_to_gguf(native: Native, out: Path, texts: Sequence[str], tolerance: float) -> EngineExport:
    """Write a decoder as a GGUF file, read it back, and compare the two; what differs is not left on disk.

    The tensors and the metadata that are read must be those that were written, bit by bit; and the logits that follow
    from them, computed by torch as llama.cpp's graph does, those of our model. llama.cpp itself is not run.

    Args:
        native: our model.
        out: the folder to make.
        texts: to compare on.
        tolerance: the largest difference of logits that is let pass.

    Raises:
        NoStockClassError: llama.cpp has no architecture or tokenizer that is the model's.
        NotEqualError: what was written is not what the model is.
        ValueError: the folder is there already, or gguf is not installed.
    """
    require("gguf", "gguf", "export a model to it")
    refuse_unknown(native)
    net = native.net
    if not isinstance(net, Decoder):
        raise NoStockClassError(
            f"llama.cpp has no architecture that is our {type(net).__name__}; export --format ctranslate2 or onnx"
        )
    metadata, tensors = contents(native, net)

    def write(folder: Path) -> EngineExport:
        path = folder / MODEL
        _write(path, metadata, tensors)
        _check_file(path, metadata, tensors)
        note = (
            "On a CPU llama.cpp reads GELU from a table in float16, and its KV cache is in float16 unless it is told "
            "otherwise (`type_k`, `type_v`): its logits are less exact than these."
        )
        compared = "Logits computed from the file by torch, as llama.cpp's graph does (it was not run),"
        return EngineExport("llama.cpp", "a decoder", compared, _compare(native, path, texts, tolerance), (note,))

    return export_folder(native, out, _USAGE, write)


def contents(native: Native, net: Decoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and float32 tensors of the file.

    llama.cpp's graphs of "starcoder" and "gpt2" are the same: pre-norm blocks with learned positions, one projection to
    queries, keys and values, and tanh GELU. Both take any number of heads of keys and values that divides that of
    queries, so that grouped-query attention needs no copies.

    Raises:
        NoStockClassError: see `export_to_gguf`.
    """
    blocks: list[Block] = list(net.blocks)  # type: ignore[arg-type]
    activation = blocks[0].feed_forward.activation
    if activation != "gelu_tanh":
        raise NoStockClassError(
            f"llama.cpp's decoders with learned positions have tanh GELU, this model {activation!r}; train it with "
            "--model.net.activation=gelu_tanh, or export --format onnx or ctranslate2"
        )
    attentions = [folded(block.attention) for block in blocks]
    heads = blocks[0].attention.n_heads
    kv_heads = max(attention.n_kv_heads for attention in attentions)
    architecture = "gpt2" if kv_heads == heads else "starcoder"
    metadata = {
        "general.architecture": architecture,
        "general.name": type(net).__name__,
        "general.file_type": 0,  # all tensors are float32
        f"{architecture}.context_length": net.max_length,
        f"{architecture}.embedding_length": net.width,
        f"{architecture}.block_count": len(blocks),
        f"{architecture}.feed_forward_length": blocks[0].feed_forward.w_1.out_features,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.layer_norm_epsilon": net.norm.eps,
        **_tokenizer(native),
    }
    tensors: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        tensors[f"{name}.weight"] = _stored(weight)
        if bias is not None:
            tensors[f"{name}.bias"] = _stored(bias)

    def linear(name: str, weight: Tensor, bias: Tensor | None) -> None:
        put(name, weight, weight.new_zeros(weight.shape[0]) if bias is None else bias)

    def norm(name: str, module: nn.LayerNorm) -> None:
        linear(name, module.weight, module.bias)

    put("token_embd", net.token_embedding.weight)
    put("position_embd", net.position_embedding.weight)
    for i, (block, attention) in enumerate(zip(blocks, attentions, strict=True)):
        norm(f"blk.{i}.attn_norm", block.norm_1)
        linear(f"blk.{i}.attn_qkv", *stacked(attention.with_kv_heads(kv_heads), "qkv"))
        linear(f"blk.{i}.attn_output", attention.w_o.flatten(1), attention.b_o)
        norm(f"blk.{i}.ffn_norm", block.norm_2)
        linear(f"blk.{i}.ffn_up", block.feed_forward.w_1.weight, block.feed_forward.w_1.bias)
        linear(f"blk.{i}.ffn_down", block.feed_forward.w_2.weight, block.feed_forward.w_2.bias)
    norm("output_norm", net.norm)
    if net.head.weight is not net.token_embedding.weight:
        put("output", net.head.weight)
    return metadata, tensors


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _tokenizer(native: Native) -> dict[str, Any]:
    """What llama.cpp reads of a byte-level BPE tokenizer.

    Raises:
        NoStockClassError: it is another one.
    """
    model, merges = _byte_level(native.tokenizer)
    gguf = require("gguf", "gguf", "export a model to it")
    kinds = gguf.TokenType
    special = {i for i, token in native.tokenizer.get_added_tokens_decoder().items() if token.special}
    known = set(native.tokenizer.get_vocab(with_added_tokens=True))
    names = vocabulary(native)
    types = [
        kinds.UNUSED if name not in known else kinds.CONTROL if i in special
        else kinds.NORMAL if name in model else kinds.USER_DEFINED
        for i, name in enumerate(names)
    ]  # fmt: skip
    end = end_of_text_id(native.tokenizer)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.add_bos_token": True,  # each document that the model was trained on followed such a token
        "tokenizer.ggml.add_eos_token": False,
    }


def _byte_level(tokenizer: Tokenizer) -> tuple[Mapping[str, int], list[str]]:
    """Vocabulary and merges of a tokenizer that splits text as GPT-2's does.

    Raises:
        NoStockClassError: it does not.
    """
    parts = json.loads(tokenizer.to_str())
    model, before = parts["model"], parts["pre_tokenizer"] or {}
    plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"))
    splits = before.get("type") == "ByteLevel" and not before["add_prefix_space"] and before.get("use_regex", True)
    if model["type"] != "BPE" or not plain or not splits or parts["normalizer"] or model.get("ignore_merges"):
        raise NoStockClassError(
            f"the tokenizer ({model['type']} after {before.get('type', 'nothing')}) is not GPT-2's byte-level BPE, the "
            "one of our kinds that llama.cpp has; train the model with a tokenizer of kind bpe, or export --format "
            "onnx or ctranslate2"
        )
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    gguf = require("gguf", "gguf", "export a model to it")
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])  # which writes the architecture
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a GGUF file."""
    reader = require("gguf", "gguf", "check what is exported").GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    # ggml counts dimensions from the innermost, numpy from the outermost
    return metadata, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def _check_file(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """That a file holds what was to be written.

    Raises:
        NotEqualError: it does not.
    """
    found, stored = read(path)
    rounded = {k: float(torch.tensor(v)) if isinstance(v, float) else v for k, v in metadata.items()}
    different = sorted(key for key in found.keys() | rounded.keys() if found.get(key) != rounded.get(key))
    if different:
        raise NotEqualError(f"the file's metadata are other than what was written: {', '.join(different[:5])}")
    if found.keys() != rounded.keys() or stored.keys() != tensors.keys():
        raise NotEqualError("the file has other tensors than were written")
    different = [name for name, tensor in tensors.items() if not torch.equal(stored[name], tensor)]
    if different:
        raise NotEqualError(f"tensors of the file are other than what was written: {', '.join(different[:5])}")


def _compare(native: Native, path: Path, texts: Sequence[str], tolerance: float) -> EngineAgreement:
    batch = native_batch(native, fitting_pairs(native, texts))
    real = batch["padding"]
    expected = expected_scores(native, batch)
    difference = largest_difference(logits(path, batch["tokens"]), expected, real, tolerance)
    return EngineAgreement(len(real), int(real.sum()), difference, float(expected[real].abs().max()))


@torch.no_grad()
def logits(path: Path, tokens: Tensor) -> Tensor:
    """What llama.cpp's graph of a file of ours computes, by torch in float32.

    Args:
        path: of the file.
        tokens: (B, T) token ids; padding, which no token before it sees, on the right.

    Returns:
        (B, T, V).
    """
    metadata, tensors = read(path)
    architecture = metadata["general.architecture"]
    eps = metadata[f"{architecture}.attention.layer_norm_epsilon"]
    n, g = (metadata[f"{architecture}.attention.head_count{kind}"] for kind in ("", "_kv"))
    d = metadata[f"{architecture}.embedding_length"] // n

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    x = tensors["token_embd.weight"][tokens] + tensors["position_embd.weight"][: tokens.shape[1]]  # (B, T, D)
    for i in range(metadata[f"{architecture}.block_count"]):
        parts = linear(f"blk.{i}.attn_qkv", norm(f"blk.{i}.attn_norm", x)).split([n * d, g * d, g * d], -1)
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)  # (B, n or g, T, d)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=g != n)
        x = x + linear(f"blk.{i}.attn_output", heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blk.{i}.ffn_up", norm(f"blk.{i}.ffn_norm", x)), approximate="tanh")
        x = x + linear(f"blk.{i}.ffn_down", hidden)
    return norm("output_norm", x) @ tensors.get("output.weight", tensors["token_embd.weight"]).T


_USAGE = (
    "from llama_cpp import Llama",
    "",
    'model = Llama("{name}/model.gguf")',
    'print(model("A text", max_tokens=50)["choices"][0]["text"])',
)
