"""Speed of generation with KV caches that grow and with static ones, and what giving the text as it comes costs.

    python benchmarks/generation.py --threads 1 --clock cpu --out docs/results/generation_cpu.json

Decoders with random weights continue prompts of different lengths by ``--length`` tokens each, greedily. Three ways are
timed: ``growing`` and ``static`` are `generate` with caches of either kind; ``text`` is `stream_text` over growing
caches, whose tokens are also decoded one by one. Tokens of growing and static caches must be the same; where rounding
decides between nearly equal logits they may not, and how many prompts differ is reported.

Each round times every attention in every way, one after another, so that whatever else the machine does falls on all of
them; medians and quartiles over the rounds are reported, those of a ratio over the ratios of each round. On a GPU
static caches are replayed as a CUDA graph, whose capture is a part of what is timed. With ``--clock cpu`` the process's
own seconds are taken, which others on the machine disturb less: of one thread, and not of a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import ATTENTIONS, machine, write_results
from tokenizers import Tokenizer

from mhe_lightning.attention import AttentionFactory
from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.data.tokenizer import end_of_text_id, train_tokenizer
from mhe_lightning.models import Decoder, generate
from mhe_lightning.models.generation import stream_text

WAYS = ("growing", "static", "text")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Timed:
    """One attention's net, with the times of its generations."""

    def __init__(self, attention: AttentionFactory, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.net = Decoder(
            tokenizer.get_vocab_size(),
            attention,
            width=options.width,
            n_heads=options.heads,
            n_layers=options.layers,
            max_length=2 * options.prompt + options.length,
            dropout=0.0,
        )
        self.net.to(options.device).eval()
        self.tokenizer = tokenizer
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.found: dict[str, list[list[int]]] = {}

    def run(self, way: str, prompts: list[str], options: argparse.Namespace) -> None:
        settings: dict[str, Any] = {"max_new_tokens": options.length, "temperature": 0, "static": way == "static"}
        end = end_of_text_id(self.tokenizer)
        clock = CLOCKS[options.clock]
        begun = clock()
        if way == "text":
            steps = sum(1 for _ in stream_text(self.net, self.tokenizer, end, prompts, **settings)) - 1
            if steps != options.length:
                raise RuntimeError(f"the texts ended after {steps} tokens and not {options.length}; take another size")
        else:
            ids = [[end, *self.tokenizer.encode(prompt).ids] for prompt in prompts]
            self.found[way] = generate(self.net, ids, **settings)
        self.seconds[way].append(clock() - begun)


def quartiles(numbers: list[float], digits: int) -> dict[str, Any]:
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return {"median": round(median, digits), "quartiles": [round(low, digits), round(high, digits)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("width", 256),
        ("heads", 8),
        ("layers", 4),
        ("vocab", 4096),
        ("prompt", 64),
        ("length", 192),
        ("rounds", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="how many prompts at a time")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["mha", "mhe_add", "mqa"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    torch.set_num_threads(options.threads)
    texts = [piece.text for piece, _ in zip(EmbeddedSource().pieces("train"), range(200), strict=False)]
    tokenizer = train_tokenizer(texts, "bpe", options.vocab)
    nets = {name: Timed(ATTENTIONS[name], tokenizer, options) for name in options.attention}
    batches: dict[str, Any] = {}
    for count in options.prompts:
        ids = tokenizer.encode(" ".join(texts)).ids
        lengths = [options.prompt // (1 + row % 4) - 1 for row in range(count)]  # and the end-of-text token before
        prompts = [tokenizer.decode(ids[row * options.prompt :][:n]) for row, n in enumerate(lengths)]
        for timed in nets.values():
            timed.seconds = {way: [] for way in WAYS}
        for _ in range(options.rounds + 1):
            for timed in nets.values():
                for way in WAYS:
                    timed.run(way, prompts, options)
        rows: dict[str, Any] = {}
        for name, timed in nets.items():
            seconds = {way: measured[1:] for way, measured in timed.seconds.items()}  # the first round allocates
            rows[name] = {
                **{
                    f"{way}_tokens_per_second": quartiles([count * options.length / s for s in measured], 1)
                    for way, measured in seconds.items()
                },
                **{
                    f"{way}_to_growing": quartiles(
                        [a / b for a, b in zip(seconds["growing"], seconds[way], strict=True)], 3
                    )
                    for way in ("static", "text")
                },
                "prompts_that_differ": sum(
                    a != b for a, b in zip(timed.found["growing"], timed.found["static"], strict=True)
                ),
            }
            medians = {key: value["median"] for key, value in rows[name].items() if isinstance(value, dict)}
            print(f"{count} prompts, {name:8s}", medians, rows[name]["prompts_that_differ"], "differ")
        batches[str(count)] = rows
    if options.out:
        write_results(options.out, options, machine(), prompts=batches)


if __name__ == "__main__":
    main()
