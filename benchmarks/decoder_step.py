"""Training speed of a small decoder with every attention, interleaved in one process.

    python benchmarks/decoder_step.py --threads 1 --out docs/results/decoder_step_cpu.json

Each round times one training step (forward, backward, AdamW) of every variant, one after another, so that whatever else
the machine does falls on all of them; medians and quartiles over the rounds are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import ATTENTIONS, machine, write_results

from mhe_lightning.attention import AttentionFactory
from mhe_lightning.models import Decoder


class Trained:
    """A decoder with its optimizer and the times of its steps."""

    def __init__(self, attention: AttentionFactory, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.net = Decoder(
            options.vocab,
            attention,
            width=options.width,
            n_heads=options.heads,
            n_layers=options.layers,
            max_length=options.length,
            dropout=0.0,
        )
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, fused=True)
        self.seconds: list[float] = []

    def step(self, tokens: torch.Tensor) -> None:
        begun = time.perf_counter()
        loss = self.net.loss(self.net(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("width", 128),
        ("heads", 4),
        ("layers", 4),
        ("length", 128),
        ("rows", 16),
        ("vocab", 4096),
        ("rounds", 40),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(options.vocab, (options.rows, options.length + 1))
    models = {name: Trained(attention, options) for name, attention in ATTENTIONS.items()}
    for _ in range(options.rounds):
        for model in models.values():
            model.step(tokens)
    per_step = options.rows * options.length
    reference = statistics.median(models["mha"].seconds[3:])  # the first steps allocate
    rows = {}
    for name, model in models.items():
        low, median, high = statistics.quantiles(model.seconds[3:], n=4)
        rows[name] = {
            "tokens_per_second": round(per_step / median, 1),
            "quartiles": [round(per_step / high, 1), round(per_step / low, 1)],
            "ratio_to_mha": round(reference / median, 3),
        }
        print(f"{name:8s} {per_step / median:8.0f} tokens/s  {reference / median:.2f} × MHA")
    if options.out:
        write_results(options.out, options, machine(), variants=rows)


if __name__ == "__main__":
    main()
