"""Speed of beam search over KV caches and over whole prefixes, and the caches' bytes, by attention.

    python benchmarks/beam_search.py --threads 1 --out docs/results/beam_search_cpu.json

Encoder-decoders with random weights search outputs of exactly ``--length`` tokens: the end token is out of the beam's
reach until it is forced. Both searches encode the sources once. The one over caches is the package's `beam_search`; the
other is the same function with a net that keeps the hypotheses' tokens instead of keys and values and reads them from
the first in each step, so that the two differ in nothing but the decoder's steps. Both must find the same hypotheses;
where rounding decides between nearly equal ones they may not, and how many differ is reported.

Each round times one search of every variant in both ways, one after another, so that whatever else the machine does
falls on all of them; medians and quartiles over the rounds are reported, those of a ratio over the ratios of each
round. Tokens per second count the tokens of the best hypothesis of each source, not those of the rest of the beam.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ATTENTIONS, machine, write_results
from torch import Tensor

from mhe_lightning.attention import AttentionFactory, KVCache
from mhe_lightning.models import EncoderDecoder, Hypothesis, beam_search
from mhe_lightning.models.layers import LayerCaches

START, END = 0, 1
REFERENCE = "mha"
UNREACHABLE = -30.0  # logit of the end token; the others are of size 1


class Cached(EncoderDecoder):
    """Ends only where it must, and keeps its last caches to be measured."""

    caches: list[LayerCaches]

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).index_fill(-1, torch.tensor([END]), UNREACHABLE)

    def new_caches(self, source_length: int, max_length: int | None = None) -> list[LayerCaches]:
        self.caches = super().new_caches(source_length, max_length)
        return self.caches


class Recomputing(Cached):
    """Reads all of a target's tokens in each step: its one cache holds them, for the search to reorder."""

    def new_caches(self, source_length: int, max_length: int | None = None) -> list[LayerCaches]:
        return [LayerCaches(KVCache(max_length or self.max_length), KVCache(source_length))]

    def decode(
        self,
        tokens: Tensor,
        source: Tensor,
        padding: Tensor | None = None,
        caches: Sequence[LayerCaches] | None = None,
    ) -> Tensor:
        assert caches is not None
        (prefixes,) = caches[0].own.append(tokens[:, None, :, None])  # (B·k, 1, T, 1)
        return super().decode(prefixes[:, 0, :, 0], source, padding)[:, -1:]


class Searched:
    """One attention's two nets, of equal weights, with the times and the results of their searches."""

    def __init__(self, attention: AttentionFactory, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.cached, self.recomputing = (
            net_class(
                options.vocab,
                attention,
                width=options.width,
                n_heads=options.heads,
                n_layers=options.layers,
                max_length=max(options.length + 1, options.source_length),
                dropout=0.0,
            ).eval()
            for net_class in (Cached, Recomputing)
        )
        self.recomputing.load_state_dict(self.cached.state_dict())
        self.seconds: dict[str, list[float]] = {"cached": [], "recomputing": []}
        self.found: dict[str, list[list[Hypothesis]]] = {}

    def search(self, way: str, tokens: Tensor, options: argparse.Namespace) -> None:
        begun = time.perf_counter()
        self.found[way] = beam_search(
            getattr(self, way),
            tokens,
            start_token=START,
            end_token=END,
            beam_size=options.beam,
            n_best=options.beam,
            extra_tokens=options.length + 1 - options.source_length,
        )
        self.seconds[way].append(time.perf_counter() - begun)
        lengths = {len(hypothesis.tokens) for row in self.found[way] for hypothesis in row}
        if lengths != {options.length}:
            raise RuntimeError(f"the hypotheses have {sorted(lengths)} tokens and not {options.length}")

    def differing(self) -> int:
        """How many of the sources' hypotheses are not the same in both ways."""
        return sum(
            a.tokens != b.tokens
            for rows in zip(self.found["cached"], self.found["recomputing"], strict=True)
            for a, b in zip(*rows, strict=True)
        )

    def cache_bytes(self) -> int:
        """Of the decoder's self-attention, in all layers, at the end of a search."""
        return sum(cache.own.nbytes for cache in self.cached.caches)


def quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; those of one number are that number."""
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3
    return low, median, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("width", 256),
        ("heads", 8),
        ("layers", 3),
        ("vocab", 8000),
        ("sources", 2),
        ("source_length", 32),
        ("length", 128),
        ("beam", 4),
        ("rounds", 3),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--attention", nargs="+", choices=ATTENTIONS, default=["mha", "mhe_add", "mhe_mul", "mqa", "sha"]
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if REFERENCE not in options.attention:
        parser.error(f"--attention must have {REFERENCE} among it, to which the others are compared")
    if options.length + 1 < options.source_length:
        parser.error("--length + 1 must be at least --source_length: a limit is not below the source's length")
    torch.set_num_threads(options.threads)
    tokens = torch.randint(END + 1, options.vocab, (options.sources, options.source_length))
    variants = {name: Searched(ATTENTIONS[name], options) for name in options.attention}
    for _ in range(options.rounds):
        for variant in variants.values():
            for way in ("cached", "recomputing"):
                variant.search(way, tokens, options)
    generated = options.sources * options.length
    reference = variants[REFERENCE]
    rows: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        row: dict[str, Any] = {}
        for way, seconds in variant.seconds.items():
            low, median, high = quartiles([generated / s for s in seconds])
            row[f"{way}_tokens_per_second"] = round(median, 1)
            row[f"{way}_quartiles"] = [round(low, 1), round(high, 1)]
        for key, numerator, denominator in (
            ("cached_to_recomputing", variant.seconds["recomputing"], variant.seconds["cached"]),
            ("cached_to_mha", reference.seconds["cached"], variant.seconds["cached"]),
        ):
            low, median, high = quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])
            row[key] = round(median, 2)
            row[f"{key}_quartiles"] = [round(low, 2), round(high, 2)]
        row["cache_bytes"] = variant.cache_bytes()
        row["cache_bytes_to_mha"] = variant.cache_bytes() / reference.cache_bytes()
        row["hypotheses"] = options.sources * options.beam
        row["differing_hypotheses"] = variant.differing()
        rows[name] = row
        print(
            f"{name:8s} {row['cached_tokens_per_second']:7.1f} tokens/s with caches, "
            f"{row['recomputing_tokens_per_second']:6.1f} without ({row['cached_to_recomputing']:.1f} ×), "
            f"{row['cached_to_mha']:.2f} × MHA; {row['cache_bytes']} bytes ({row['cache_bytes_to_mha']:.4f} of MHA); "
            f"{row['differing_hypotheses']} of {row['hypotheses']} hypotheses differ"
        )
    if options.out:
        write_results(options.out, options, machine(), variants=rows)


if __name__ == "__main__":
    main()
