"""Training speed and memory of a decoder, beside those of transformers and x-transformers of the same size.

    python benchmarks/decoder_step.py --out docs/results/decoder_step_cpu.json

needs ``pip install 'mhe-lightning[benchmark]'``. Every model computes the next token at every position:

* ``gpt2``: transformers' GPT2LMHeadModel with SDPA, as its config has it, with a GELU written in several operations;
  ``gpt2_fused_gelu``: the same with torch's one operation for it, as ours and GPTBigCode have.
* ``gpt_bigcode``: GPTBigCodeForCausalLM, whose heads share keys and values.
* ``x_transformers`` and ``x_transformers_one_kv_head``: its decoder with flash attention and learned positions.

Each of ours is exported to the class of transformers that computes the same (GPT-2, or GPTBigCode where all heads share
keys and values), and loss and gradient must agree. x-transformers has other biases and norms, and is not compared.

The speeds from which docs/scaling.md plans are those of all attentions at a smaller size:

    python benchmarks/decoder_step.py --peers --attentions mha gqa skv mqa el mhe_add mhe_mul sha --memory_steps 0 \\
        --width 128 --heads 4 --feed_forward 512 --length 128 --rows 16 --vocab 4096 --rounds 37 --threads 1 \\
        --out docs/results/small_decoder_step_cpu.json
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import ATTENTIONS, peer
from steps import Batch, Family, Ours, Theirs, run, stock_twin
from torch import Tensor, nn

from mhe_lightning.interop.hf_decoder import stock_decoder
from mhe_lightning.models import Decoder

END = 0


def make(name: str, options: argparse.Namespace, dropout: float, attention_dropout: float) -> nn.Module:
    """A model that gives the mean loss of a batch."""
    if name.startswith("x_transformers"):
        return Theirs(x_transformers(options, dropout, attention_dropout, name.endswith("one_kv_head")), loss_of_logits)
    attention = {"gpt2": "mha", "gpt2_fused_gelu": "mha", "gpt_bigcode": "mqa"}.get(name, name)
    net = Decoder(
        options.vocab,
        partial(ATTENTIONS[attention], dropout=attention_dropout),
        width=options.width,
        n_heads=options.heads,
        n_layers=options.layers,
        max_length=options.length,
        ff_width=options.feed_forward,
        dropout=dropout,
    )
    if name in ATTENTIONS:
        return Ours(net, loss)
    overrides = {"activation_function": "gelu_new"} if name == "gpt2" else {}
    return Theirs(stock_twin(stock_decoder(net, end_of_text=END), **overrides), loss_inside)


def x_transformers(options: argparse.Namespace, dropout: float, attention_dropout: float, one_kv_head: bool) -> Any:
    """Its decoder at the same size."""
    library = peer("x_transformers", "pip install 'mhe-lightning[benchmark]'")
    layers = library.Decoder(
        dim=options.width,
        depth=options.layers,
        heads=options.heads,
        attn_dim_head=options.width // options.heads,
        attn_flash=True,
        attn_one_kv_head=one_kv_head,
        attn_dropout=attention_dropout,
        ff_mult=options.feed_forward / options.width,
        ff_dropout=dropout,
    )
    return library.TransformerWrapper(
        num_tokens=options.vocab,
        max_seq_len=options.length,
        emb_dropout=dropout,
        tie_embedding=True,
        attn_layers=layers,
    )


def loss(net: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    return net.loss(net(tokens), targets) / targets.numel()


def loss_inside(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """By transformers' own loss, over targets that are already shifted; without its cache, which is for generation."""
    mean: Tensor = model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    return mean


def loss_of_logits(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def batch(options: argparse.Namespace) -> Batch:
    """Random tokens and those that follow them, (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, options.vocab, (options.rows, options.length + 1), generator=generator)
    return tokens[:, :-1].contiguous().to(options.device), tokens[:, 1:].contiguous().to(options.device)


def twin(ours: Ours) -> tuple[nn.Module, None]:
    """The stock class with the weights of one of ours."""
    net: Any = ours.net
    return Theirs(stock_twin(stock_decoder(net, end_of_text=END)), loss_inside), None


FAMILY = Family(
    title="A training step of a decoder",
    make=make,
    batch=batch,
    twin=twin,
    peers=("gpt2", "gpt2_fused_gelu", "gpt_bigcode", "x_transformers", "x_transformers_one_kv_head"),
    sizes={
        "width": 512,
        "heads": 8,
        "layers": 4,
        "feed_forward": 2048,
        "length": 256,
        "rows": 8,
        "vocab": 30522,
    },
    packages=("transformers", "x-transformers"),
    equal_to="the stock class",
)


def main(arguments: list[str] | None = None) -> None:
    run(FAMILY, __doc__, arguments)


if __name__ == "__main__":
    main()
