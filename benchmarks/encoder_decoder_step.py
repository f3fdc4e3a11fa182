"""Training speed and memory of a small encoder-decoder, beside Hugging Face's MarianMTModel of the same size.

    python benchmarks/encoder_decoder_step.py --out docs/results/encoder_decoder_step_cpu.json

needs ``pip install 'mhe-lightning[benchmark]'``. Post-norm blocks, sinusoidal positions, one embedding for source,
target and output, as in Vaswani et al. 2017; sources and targets of the same length, without padding. Marian is called
with ``labels`` and with SDPA. Each of ours is exported to MarianMTModel, and loss and gradient must agree.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from common import ATTENTIONS
from steps import Batch, Family, Ours, Theirs, run, stock_twin
from torch import Tensor, nn

from mhe_lightning.interop.hf_encoder_decoder import stock_encoder_decoder
from mhe_lightning.models import EncoderDecoder

PADDING, END = 0, 1


def make(name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> nn.Module:
    """A model that gives the mean loss of a batch."""
    net = EncoderDecoder(
        options.vocab,
        partial(ATTENTIONS[name if name in ATTENTIONS else "mha"], dropout=attention_dropout),
        width=options.width,
        n_heads=options.heads,
        n_layers=options.layers,
        max_length=options.length,
        ff_width=options.feed_forward,
        dropout=dropout,
    )
    ours = Ours(net, loss)
    return ours if name in ATTENTIONS else twin(ours)[0]


def loss(net: EncoderDecoder, sources: Tensor, begun: Tensor, targets: Tensor) -> Tensor:
    return net.loss(net(sources, begun), targets) / targets.numel()


def loss_inside(model: Any, sources: Tensor, begun: Tensor, targets: Tensor) -> Tensor:
    mean: Tensor = model(sources, decoder_input_ids=begun, labels=targets).loss
    return mean


def batch(options: argparse.Namespace) -> Batch:
    """Random sources, targets from their start token on, and targets; (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.rows, options.length)
    sources, targets = (torch.randint(END + 1, options.vocab, shape, generator=generator) for _ in range(2))
    begun = torch.cat([torch.full_like(targets[:, :1], END), targets[:, :-1]], 1)
    return sources.to(options.device), begun.to(options.device), targets.to(options.device)


def twin(ours: Ours) -> tuple[nn.Module, Tensor]:
    """Marian with the weights of one of ours; its residual stream has all even channels before all odd ones."""
    net: Any = ours.net
    order = torch.cat([torch.arange(start, net.width, 2) for start in (0, 1)])
    return Theirs(stock_twin(stock_encoder_decoder(net, end_token=END, padding=PADDING)), loss_inside), order


FAMILY = Family(
    title="A step of translation, a source and a target in each row",
    make=make,
    batch=batch,
    twin=twin,
    peers=("marian",),
    sizes={
        "width": 512,
        "heads": 8,
        "layers": 3,
        "feed_forward": 2048,
        "length": 128,
        "rows": 8,
        "vocab": 16000,
    },
    packages=("transformers",),
    equal_to="MarianMTModel",
)


def main(arguments: list[str] | None = None) -> None:
    run(FAMILY, __doc__, arguments)


if __name__ == "__main__":
    main()
