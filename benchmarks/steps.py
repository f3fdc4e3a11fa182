"""What the benchmarks of whole training steps share: models trained in turn, their memory, FLOPs, and the table.

A step is forward, mean cross-entropy, backward, fused AdamW and zero_grad, on the same batch for every model.

Memory: each model trains a few steps in a new process; counted is the highest resident memory above what the process
held before, with everything imported and one step of a tiny model done (Linux); on a GPU, the highest that torch
allocated. Time: each round times a few steps of every model in one process, in an order that is reversed from round to
round; medians and quartiles over the rounds are reported, those of a ratio over the ratios of each round. FLOPs are
those of the matrix products that are called, counted by torch in a step; a causal mask saves nothing in that count.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    ATTENTIONS,
    add_freed_memory,
    compared,
    description,
    freed_memory_sentence,
    handle_freed_memory,
    interleaved,
    machine_sentence,
    markdown_table,
    peer,
    save,
    spread,
)
from roofline import measure, sentence
from torch import Tensor, nn

from mhe_lightning.interop.stock import StockModel
from mhe_lightning.tracing import count_flops

Batch = tuple[Tensor, ...]

CHECKED = {"rows": 2, "length": 64, "layers": 2}
"""Largest size at which functions are compared."""

MAX_DIFFERENCE = {"loss": 1e-5, "gradient": 1e-4}  # relative


class Ours(nn.Module):
    """One of our nets with its loss.

    Args:
        net: the net, whose ``token_embedding`` is compared.
        mean_loss: from the net and a batch to the mean cross-entropy.
        head: of the net, where it has one.
    """

    def __init__(self, net: nn.Module, mean_loss: Callable[..., Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.head, self.mean_loss = net, head, mean_loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.mean_loss(self.net, *batch) if self.head is None else self.mean_loss(self.net, self.head, *batch)


class Theirs(nn.Module):
    """A peer's model, called as its users do.

    Args:
        model: the model.
        mean_loss: from the model and a batch to the mean cross-entropy.
    """

    def __init__(self, model: nn.Module, mean_loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.mean_loss = model, mean_loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.mean_loss(self.model, *batch)


TINY = {"width": 8, "heads": 2, "layers": 1, "feed_forward": 16, "length": 8, "rows": 2, "vocab": 200}
"""Options for the first step of a process, which loads what is loaded at first use."""


@dataclass(frozen=True)
class Family:
    """What is timed.

    Args:
        title: of the table.
        make: a model by its name, the options, dropout and attention dropout; called with a batch it gives the mean
            loss.
        batch: a batch for the options.
        twin: from one of our models the peer that computes the same, with its weights, and the order of our embedding's
            channels there.
        peers: names of the peers' models, the reference first.
        sizes: integer options and their defaults.
        packages: peers' packages, whose versions are kept.
        attentions: ours, if not chosen.
        equal_to: what ``twin`` is, in words.
    """

    title: str
    make: Callable[[str, argparse.Namespace, float, float], nn.Module]
    batch: Callable[[argparse.Namespace], Batch]
    twin: Callable[[Any], tuple[nn.Module, Tensor | None]]
    peers: Sequence[str]
    sizes: Mapping[str, int]
    packages: Sequence[str]
    equal_to: str
    attentions: Sequence[str] = ("mha", "mhe_add", "mhe_mul", "mqa", "sha")


def stock_twin(stock: StockModel, **overrides: Any) -> nn.Module:
    """The model of transformers that a net was exported as, with the net's weights, by SDPA.

    Args:
        stock: the exported net.
        overrides: options of its config that are others.
    """
    transformers = peer("transformers", "pip install 'mhe-lightning[benchmark]'")
    options = {**stock.config, **overrides}
    config = transformers.AutoConfig.for_model(options.pop("model_type"), attn_implementation="sdpa", **options)
    model: nn.Module = getattr(transformers, stock.architecture)(config)
    unexpected = model.load_state_dict(dict(stock.tensors), strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"{stock.architecture} has no {', '.join(unexpected)}")
    return model.train()


class Trained:
    """A model with its optimizer."""

    def __init__(self, family: Family, name: str, options: argparse.Namespace, dropouts: tuple[float, float]) -> None:
        torch.manual_seed(0)
        self.model = family.make(name, options, *dropouts).train().to(options.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.dtype = getattr(torch, options.dtype)
        self.device = torch.device(options.device).type

    def step(self, batch: Batch) -> None:
        with self._precision():
            loss = self.model(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, batch: Batch, number: int) -> None:
        for _ in range(number):
            self.step(batch)

    def flops(self, batch: Batch) -> int:
        """Of a step, which is done."""
        with count_flops() as counter:
            self.step(batch)
        return counter.get_total_flops()

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, dtype=self.dtype)


def check_same_function(family: Family, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Relative differences of loss and embedding's gradient between each of ours and the peer with its weights.

    Raises:
        RuntimeError: they compute something else.
    """
    small = copy.copy(options)
    for name, most in CHECKED.items():
        setattr(small, name, min(most, getattr(options, name)))
    small.device = "cpu"
    batch = family.batch(small)
    differences = {}
    for name in options.attentions:
        torch.manual_seed(0)
        ours: Any = family.make(name, small, 0.0, 0.0)
        theirs, order = family.twin(ours)
        losses = []
        for model in (ours, theirs):
            loss = model(*batch)
            loss.backward()
            losses.append(loss.item())
        mine = ours.net.token_embedding.weight.grad
        other = theirs.model.get_input_embeddings().weight.grad  # type: ignore[union-attr, operator]
        mine = mine if order is None else mine[:, order]
        found = {
            "loss": abs(losses[0] - losses[1]) / losses[1],
            "gradient": float((mine - other).norm() / other.norm()),
        }
        for what, value in found.items():
            if not value <= MAX_DIFFERENCE[what]:
                allowed = MAX_DIFFERENCE[what]
                raise RuntimeError(
                    f"{name}: {what} is {value:.1e} from {family.equal_to}'s, at most {allowed:.0e} allowed"
                )
        differences[name] = {what: float(f"{value:.2g}") for what, value in found.items()}
    return differences


def measure_memory(
    family: Family, name: str, options: argparse.Namespace, dropouts: tuple[float, float]
) -> dict[str, Any]:
    """Peak of training a model, in MiB above what this process, a new one, holds before the model is made.

    Unless freed memory is left to the C library, it goes back to the system, so that the peak is what is in use. A
    library that keeps some of it adds up to a third, and another amount in each run.
    """
    torch.set_num_threads(options.threads)
    on_gpu = torch.device(options.device).type == "cuda"
    if not on_gpu and options.freed_memory != "default":
        handle_freed_memory("returned")
    tiny = argparse.Namespace(**{**vars(options), **TINY})
    Trained(family, name, tiny, dropouts).step(family.batch(tiny))  # loads what is loaded at first use
    gc.collect()
    before = 0.0 if on_gpu else _resident("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trained = Trained(family, name, options, dropouts)
    trained.steps(family.batch(options), options.memory_steps)
    # not getrusage's ru_maxrss, which a new process takes over from the one that started it
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else _resident("VmHWM") - before
    kept = 3 * sum(p.numel() * p.element_size() for p in trained.model.parameters()) / 2**20  # AdamW keeps two moments
    return {
        "before_mib": round(before, 1),
        "peak_mib": round(peak, 1),
        "weights_and_optimizer_mib": round(kept, 1),
        "peak_above_these_mib": round(peak - kept, 1),
    }


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory_of_all(
    family: Family, options: argparse.Namespace, dropouts: tuple[float, float]
) -> dict[str, dict[str, Any]]:
    """`measure_memory` of every model, each in a process of its own, and as a share of the reference's."""
    rows: dict[str, dict[str, Any]] = {}
    for name in (*options.peers, *options.attentions):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as new_process:
            row = new_process.submit(measure_memory, family, name, options, dropouts).result()
        rows[name] = row
        row["peak_ratio"] = round(row["peak_mib"] / rows[options.reference]["peak_mib"], 3)
        print(f"  {name:20s} {row['peak_mib']:7.0f} MiB  {row['peak_ratio']:.3f} × {options.reference}", flush=True)
    return rows


def time_of_all(
    family: Family, options: argparse.Namespace, dropouts: tuple[float, float], rate: float
) -> dict[str, dict[str, Any]]:
    """Speed and FLOPs of every model, against the reference and against the fastest of the peers."""
    batch = family.batch(options)
    models = {name: Trained(family, name, options, dropouts) for name in (*options.peers, *options.attentions)}
    flops = {name: trained.flops(batch) for name, trained in models.items()}
    if options.compile:
        for trained in models.values():
            trained.model.compile()
    took = interleaved(
        {name: partial(trained.steps, batch, options.steps) for name, trained in models.items()}, rounds=options.rounds
    )
    seconds = {name: [s / options.steps for s in several] for name, several in took.items()}
    rows = compared(seconds, options.reference)
    best = min(options.peers, key=lambda name: rows[name]["seconds"]["median"], default=options.reference)
    against_best = compared(seconds, best)
    for name, row in rows.items():
        median = row["seconds"]["median"]
        row["times_reference"] = row.pop(f"times_{options.reference}")
        row["times_best_peer"] = against_best[name][f"times_{best}"]
        row["best_peer"] = best
        row["tokens_per_second"] = round(options.rows * options.length / median, 1)
        row["flops"] = flops[name]
        row["flop_ratio"] = float(f"{flops[options.reference] / flops[name]:.4g}")
        row["flop_ratio_to_best_peer"] = float(f"{flops[best] / flops[name]:.4g}")
        row["gflops"] = float(f"{flops[name] / median / 1e9:.4g}")
        row["share_of_matrix_rate"] = float(f"{row['gflops'] / rate:.3g}")
        print(
            f"  {name:20s} {row['tokens_per_second']:8.0f} tokens/s  {spread(row['times_reference'])} × "
            f"{options.reference} (FLOPs {row['flop_ratio']:.2f} ×), {row['times_best_peer']['median']:.2f} × {best}",
            flush=True,
        )
    return rows


def page(record: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    settings = record["settings"]
    reference = settings["reference"]
    sizes = ", ".join(f"{name} {settings[name]}" for name in record["sizes"])
    memory = freed_memory_sentence(settings)
    if memory:
        memory += ", but given back at once where peaks of memory are measured"
    parts = [
        f"{record['title']}: {sizes}; {settings['dtype']}; medians (quartiles) over {settings['rounds']} "
        f"rounds{memory}. {machine_sentence(record['machine'])} {sentence(record['roofline'])}\n"
    ]
    for run in record["runs"]:
        head = ["model", "step, s", "tokens/s", f"× {reference}", f"FLOPs, {reference}'s ÷ its", "× fastest peer"]
        head += ["GFLOP/s", "of the matrix rate", "peak, MiB", f"× {reference}"]
        rows = [_row(name, row) for name, row in run["models"].items()]
        dropouts = f"Dropout {run['dropout']}, of attention {run['attention_dropout']}"
        best = next((row["best_peer"] for row in run["models"].values() if "best_peer" in row), None)
        known = "" if best is None else f"; the fastest peer is {best}"
        parts.append(f"{dropouts}{known}.\n\n{markdown_table(head, rows)}")
    return "\n".join(parts)


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    times = ["–"] * 7
    if "seconds" in row:
        times = [
            spread(row["seconds"], 3),
            f"{row['tokens_per_second']:,.0f}",
            spread(row["times_reference"]),
            f"{row['flop_ratio']:.2f}",
            spread(row["times_best_peer"]),
            f"{row['gflops']:.0f}",
            f"{100 * row['share_of_matrix_rate']:.0f} %",
        ]
    memory = [f"{row['peak_mib']:,.0f}", f"{row['peak_ratio']:.3f}"] if "peak_mib" in row else ["–", "–"]
    return [name, *times, *memory]


def parsed(family: Family, doc: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in family.sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value, meaning in (
        ("rounds", 8, "after one that is not counted; 0 leaves out the times"),
        ("steps", 1, "of each model in a round"),
        ("memory_steps", 2, "in the measurement of memory; 0 leaves it out"),
        ("threads", os.cpu_count() or 1, "all cores if not given"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0], help="of hidden states; one run for each")
    parser.add_argument("--attention_dropout", type=float, nargs="+", default=[0.0], help="of the same runs")
    parser.add_argument("--peers", nargs="*", choices=family.peers, default=list(family.peers))
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(family.attentions))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="by autocast")
    parser.add_argument("--compile", action="store_true", help="every model, by torch.compile")
    add_freed_memory(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write, with a Markdown file beside it")
    options = parser.parse_args(arguments)
    if len(options.dropout) != len(options.attention_dropout):
        parser.error("--dropout and --attention_dropout need the same number of values, one of each per run")
    options.reference = (*options.peers, "mha")[0]
    if options.reference not in (*options.peers, *options.attentions):
        parser.error("without --peers the others are compared with mha, which must be among --attentions")
    return options


def run(family: Family, doc: str | None, arguments: Sequence[str] | None = None) -> None:
    """What a script of a family does."""
    options = parsed(family, doc, arguments)
    torch.set_num_threads(options.threads)
    if options.rounds:
        handle_freed_memory(options.freed_memory)
    described = description(*family.packages)
    roofline = measure(options.device, getattr(torch, options.dtype))
    print(sentence(roofline), flush=True)
    differences = check_same_function(family, options)
    for name, found in differences.items():
        print(
            f"  {name}: loss {found['loss']:.1e}, gradient {found['gradient']:.1e} from {family.equal_to}'s", flush=True
        )
    runs: list[dict[str, Any]] = []
    results = {
        "title": family.title,
        "sizes": list(family.sizes),
        "roofline": roofline,
        "differences": differences,
        "runs": runs,
    }
    for dropouts in zip(options.dropout, options.attention_dropout, strict=True):
        print(f"dropout {dropouts[0]}, of attention {dropouts[1]}, {torch.get_num_threads()} threads", flush=True)
        rows: dict[str, dict[str, Any]] = {name: {} for name in (*options.peers, *options.attentions)}
        runs.append({"dropout": dropouts[0], "attention_dropout": dropouts[1], "models": rows})
        for measured, wanted in (
            (partial(memory_of_all, family, options, dropouts), options.memory_steps),
            (partial(time_of_all, family, options, dropouts, roofline["gflops"]), options.rounds),
        ):
            if wanted:
                for name, row in measured().items():
                    rows[name].update(row)
                save(options, described, page, **results)
