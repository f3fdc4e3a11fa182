"""Finetuning steps with and without padding, on the lengths of real data sets.

    python benchmarks/unpadded.py --data /path/to/data --tasks sst2 mrpc --out docs/results/unpadded_cpu.json

``--data`` has the data sets in the Hub's layout (``glue/``). For each task, batches of the training split are taken as
the data module deals them out: of examples of similar length (its default), and in random order, as other programs do.
A step is forward, backward, AdamW and zero_grad of sequence classification, in float32, without dropout, so that both
sides compute the same: losses of the first steps are compared. Each round takes one step on each of the same batches.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ATTENTIONS, compared, description, interleaved, machine_sentence, markdown_table, save, spread
from torch import Tensor

from mhe_lightning.data import GlueData
from mhe_lightning.models import Encoder
from mhe_lightning.models.heads import SequenceHead

TOLERANCE = 1e-4
"""Relative difference of losses after the steps of the warm-up, in float32."""


class Trained:
    """A classifier with its optimizer and the batches that it takes steps on.

    Args:
        batches: of tokens, segments, labels and, where some are shorter, padding and the places of real tokens.
        unpadded: whether to compute real tokens alone.
    """

    def __init__(self, batches: list[dict[str, Any]], vocab_size: int, options: argparse.Namespace, unpadded: bool):
        torch.manual_seed(0)
        self.net = Encoder(
            vocab_size,
            partial(ATTENTIONS[options.attention]),
            width=options.width,
            n_heads=options.heads,
            n_layers=options.layers,
            max_length=options.length,
            dropout=0.0,
        )
        self.head = SequenceHead(width=options.width, n_labels=2, pooling="first", dropout=0.0)
        parameters = [*self.net.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
        names = ("segments", "padding", "real") if unpadded else ("segments", "padding")
        self.batches = [
            (batch["tokens"], {name: batch[name] for name in names if name in batch}, batch["labels"].long())
            for batch in batches
        ]
        self.losses: list[float] = []

    def steps(self) -> None:
        for tokens, inputs, labels in self.batches:
            self.losses.append(self.step(tokens, inputs, labels).item())

    def step(self, tokens: Tensor, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        scores = self.head(self.net(tokens, **inputs), inputs.get("padding"))
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def measure(task: str, grouped: bool, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    data = GlueData(
        task=task,
        path=str(options.data / "glue"),
        tokenizer="wordpiece",
        max_length=options.length,
        batch_size=options.rows,
        seed=0,
        group_by_length=grouped,
        cache_dir=cache,
    )
    if not data.prepared:
        data.prepare()
    data.setup("fit")
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(options.batches)]
    real = sum(int(batch["padding"].sum()) if "padding" in batch else batch["tokens"].numel() for batch in batches)
    padding = 1 - real / sum(batch["tokens"].numel() for batch in batches)
    sides = {name: Trained(batches, data.vocab_size, options, name == "unpadded") for name in ("padded", "unpadded")}
    seconds = interleaved({name: side.steps for name, side in sides.items()}, rounds=options.rounds)
    first, second = (torch.tensor(side.losses[: options.batches]) for side in sides.values())
    difference = float(((first - second) / first).abs().max())
    if difference > TOLERANCE:
        raise SystemExit(f"{task}: the losses with and without padding differ by {difference:.1e}")
    lengths = real / (options.rows * options.batches)
    return {
        "task": task,
        "batches": "of similar length" if grouped else "in random order",
        "mean_length": round(lengths, 1),
        "padding": round(padding, 3),
        "loss_difference": difference,
        **compared({name: [s / options.batches for s in own] for name, own in seconds.items()}, "padded"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MHE_DATA_ROOT"), help="folder of data sets")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc"])
    parser.add_argument("--attention", choices=list(ATTENTIONS), default="mha")
    for name, value in (
        ("width", 256),
        ("heads", 4),
        ("layers", 4),
        ("length", 128),
        ("rows", 32),
        ("batches", 10),
        ("rounds", 10),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="JSON file to write, with a Markdown file beside it")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data must name a folder that has glue/ in the Hub's layout")
    options.data = Path(options.data)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as cache:
        results = [measure(task, grouped, options, cache) for task in options.tasks for grouped in (False, True)]
    described = description("mhe_lightning")
    print(table({"results": results}))
    options.data = options.data.name  # where a machine has it tells nobody else anything
    save(options, described, page, results=results)


def table(record: Mapping[str, Any]) -> str:
    """The steps' times, in Markdown."""
    rows = [
        [
            f"{row['task']}, {row['batches']}",
            row["mean_length"],
            f"{row['padding']:.1%}",
            spread(row["padded"]["seconds"], 1, 1e3),
            spread(row["unpadded"]["seconds"], 1, 1e3),
            spread(row["unpadded"]["times_padded"]),
        ]
        for row in record["results"]
    ]
    return markdown_table(["batches", "mean length", "padding", "padded, ms", "unpadded, ms", "times faster"], rows)


def page(record: Mapping[str, Any]) -> str:
    """The table with what it is of."""
    settings = record["settings"]
    sizes = ", ".join(f"{name} {settings[name]}" for name in ("width", "heads", "layers", "length", "rows"))
    return (
        f"Steps of finetuning an encoder with {settings['attention']}: {sizes}, where length is the most tokens of a "
        f"row; medians (quartiles) over {settings['rounds']} rounds. {machine_sentence(record['machine'])}\n\n"
        f"{table(record)}"
    )


if __name__ == "__main__":
    main()
