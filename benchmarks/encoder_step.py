"""Training speed and memory of a small BERT-like encoder, beside Hugging Face's BertForMaskedLM of the same size.

    python benchmarks/encoder_step.py --out docs/results/encoder_step_cpu.json

needs ``pip install 'mhe-lightning[benchmark]'``. BERT is called as it is commonly trained, ``model(tokens,
labels=labels)`` with SDPA; the encoder here computes logits at the masked positions only. Each of ours, without
dropout, is exported to BertForMaskedLM, and loss and gradient must agree: the two are the same function.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from common import ATTENTIONS
from steps import Batch, Family, Ours, Theirs, run, stock_twin
from torch import Tensor, nn

from mhe_lightning.interop.hf_encoder import stock_encoder
from mhe_lightning.models import Encoder
from mhe_lightning.models.heads import MaskedTokenHead
from mhe_lightning.models.loss import IGNORE

PADDING = 0
MASK = 103
MASKED = 0.15  # share of the tokens


def make(name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> nn.Module:
    """A model that gives the mean loss over the masked tokens of a batch."""
    net = Encoder(
        options.vocab,
        partial(ATTENTIONS[name if name in ATTENTIONS else "mha"], dropout=attention_dropout),
        width=options.width,
        n_heads=options.heads,
        n_layers=options.layers,
        max_length=options.length,
        ff_width=options.feed_forward,
        dropout=dropout,
    )
    ours = Ours(net, loss, MaskedTokenHead(width=options.width, vocab_size=options.vocab))
    return ours if name in ATTENTIONS else twin(ours)[0]


def loss(net: Encoder, head: MaskedTokenHead, tokens: Tensor, targets: Tensor) -> Tensor:
    kept = (targets.flatten() != IGNORE).nonzero().flatten()
    hidden = net(tokens, kept=kept)
    return head.loss(hidden, net.token_embedding.weight, targets.flatten()[kept]) / len(kept)


def loss_inside(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    mean: Tensor = model(tokens, labels=targets).loss
    return mean


def batch(options: argparse.Namespace) -> Batch:
    """Random tokens, some of them masked, and targets: the tokens under the masks, -100 elsewhere; (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.length)
    tokens = torch.randint(PADDING + 1, options.vocab, shape, generator=generator)
    masked = torch.rand(shape, generator=generator).flatten().argsort()[: round(MASKED * tokens.numel())]
    targets = torch.full_like(tokens, IGNORE)
    targets.view(-1)[masked] = tokens.view(-1)[masked]
    tokens.view(-1)[masked] = MASK
    return tokens.to(options.device), targets.to(options.device)


def twin(ours: Ours) -> tuple[nn.Module, None]:
    """BERT with the weights of one of ours."""
    net: Any = ours.net
    return Theirs(stock_twin(stock_encoder(net, ours.head, padding=PADDING)), loss_inside), None


FAMILY = Family(
    title="A step of masked-language modelling",
    make=make,
    batch=batch,
    twin=twin,
    peers=("bert",),
    sizes={
        "width": 512,
        "heads": 8,
        "layers": 4,
        "feed_forward": 2048,
        "length": 256,
        "rows": 8,
        "vocab": 30522,
    },
    packages=("transformers",),
    equal_to="BertForMaskedLM",
)


def main(arguments: list[str] | None = None) -> None:
    run(FAMILY, __doc__, arguments)


if __name__ == "__main__":
    main()
