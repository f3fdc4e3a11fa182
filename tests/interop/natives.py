"""Tiny trained-like models to export: random weights far from their first values."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from attention.oracle import VARIANTS
from mhe_lightning.data.tokenizer import train_tokenizer
from mhe_lightning.interop.native import Native
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import MaskedTokenHead, SequenceHead, SpanHead

TEXTS = [
    "a small model reads a few words of text",
    "the other text is no longer than this one",
    "attention is what all of them compute",
    "keys and values are shared by its heads",
]
WIDTH = 24
KINDS = ("decoder", "masked", "classes", "value", "choice", "span", "headless", "encoder_decoder")
TOKENIZERS = {"decoder": "bpe", "encoder_decoder": "unigram"}


@cache
def tokenizer(kind: str) -> Tokenizer:
    return train_tokenizer(TEXTS * 3, kind, 300)


def native(kind: str = "decoder", variant: str = "mhe_add", **changes: Any) -> Native:
    """A model of one of `KINDS` with one of the attentions; ``changes`` go to its net."""
    torch.manual_seed(0)
    words = tokenizer(TOKENIZERS.get(kind, "wordpiece"))
    settings: dict[str, Any] = {
        "vocab_size": words.get_vocab_size(),
        "attention": VARIANTS[variant].build,
        "width": WIDTH,
        "n_heads": 4,
        "n_layers": 2,
        "max_length": 48,
        "ff_width": 32,
        **changes,
    }
    net = {"decoder": Decoder, "encoder_decoder": EncoderDecoder}.get(kind, Encoder)(**settings)
    head: nn.Module | None = {
        "masked": lambda: MaskedTokenHead(width=WIDTH, vocab_size=settings["vocab_size"]),
        "classes": lambda: SequenceHead(width=WIDTH, n_labels=3, pooling="first", dropout=0.1),
        "value": lambda: SequenceHead(width=WIDTH, n_labels=1, pooling="first", dropout=0.1),
        "choice": lambda: SequenceHead(width=WIDTH, n_labels=1, pooling="first", dropout=0.1),
        "span": lambda: SpanHead(width=WIDTH),
    }.get(kind, lambda: None)()
    for module in (net, head):
        for parameter in () if module is None else module.parameters():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    config = {
        "model": {"init_args": {"net": {"init_args": {"attention": {"class_path": "mhe_lightning.attention.MHE"}}}}}
    }
    problem = kind if kind in ("classes", "value", "choice") else None
    labels = ("yes", "no", "maybe") if kind == "classes" else ()
    return Native(
        Path("run/checkpoints/step=1.ckpt"),
        net.eval(),
        None if head is None else head.eval(),
        words,
        config,
        {},
        1,
        problem,  # type: ignore[arg-type]
        labels,
    )
