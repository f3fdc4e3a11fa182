"""At 12 heads an exported MHE decoder's KV cache is a twelfth of MHA's, by the engines' own accounting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from interop.natives import TEXTS, native
from mhe_lightning.interop.exporting import export_to_hf
from mhe_lightning.interop.gguf import export_to_gguf, read
from mhe_lightning.interop.onnx import Session, cached, export_to_onnx

TOKENS = torch.zeros(2, 9, dtype=torch.long)


def decoder(variant: str):
    return native("decoder", variant, n_heads=12, width=24)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def bytes_in_transformers(folder: Path, variant: str) -> int:
    export_to_hf(decoder(variant), folder, TEXTS, 1e-4)
    cache = transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS, use_cache=True).past_key_values
    return bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def bytes_in_onnxruntime(folder: Path, variant: str) -> int:
    export_to_onnx(decoder(variant), folder, TEXTS, 1e-4)
    session = Session(folder / "model.onnx")
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    return bytes_of(cached(session.run({**inputs, **session.empty_cache(len(TOKENS))})).values())


def bytes_in_llama_cpp(folder: Path, variant: str) -> int:
    """It makes a cache of the heads of keys and values, and of the size of a head, that the file states."""
    export_to_gguf(decoder(variant), folder, TEXTS, 1e-4)
    metadata, _ = read(folder / "model.gguf")
    architecture = metadata["general.architecture"]
    heads, kv_heads = (metadata[f"{architecture}.attention.head_count{kind}"] for kind in ("", "_kv"))
    per_token = 2 * kv_heads * metadata[f"{architecture}.embedding_length"] // heads
    return 4 * per_token * metadata[f"{architecture}.block_count"] * TOKENS.numel()


@pytest.mark.parametrize("variant", ["mhe_add", "mhe_multiply"])
@pytest.mark.parametrize("measure", [bytes_in_transformers, bytes_in_onnxruntime, bytes_in_llama_cpp])
def test_the_cache_of_mhe_is_a_twelfth_of_mhas(measure, variant, tmp_path):
    mha = measure(tmp_path / "mha", "mha")
    assert mha == 2 * 2 * 24 * 4 * TOKENS.numel()  # keys and values, layers, width, bytes
    assert measure(tmp_path / variant, variant) * 12 == mha
