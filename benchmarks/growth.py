"""How the cost of an attention sublayer grows with tokens T, heads n and batch B, at a fixed width, with plots.

    python benchmarks/growth.py --out docs/results/growth_cpu.json

needs ``pip install 'mhe-lightning[benchmark]'`` for the plots, which are written beside the JSON file as
``<name>_tokens.png``, ``<name>_heads.png`` and ``<name>_batch.png``. Forward and backward of multi-head attention
through plain SDPA, MQA, MHE-ADD and MHE-MUL at each point, in turn; medians and quartiles over the rounds. That they
compute what they should is checked in `sublayer.py`.

A slope is that of the straight line through log(seconds) against log(points), by least squares; beside it the slope of
the FLOPs. In T it says more about what is left beside the attention's quadratic part than about that part: whoever
spends less on projections has a steeper slope. So the seconds that the last point costs more than the first are given
as well.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import PEERS, make, work_of
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
from sublayer import REFERENCE, trained

from mhe_lightning.comparison.style import figure_bytes, line_style, new_figure

AXES = {"tokens": "tokens T", "heads": "heads n", "batch": "rows B"}


def measured_point(
    options: argparse.Namespace, rows: int, length: int, n_heads: int, rate: float
) -> dict[str, dict[str, Any]]:
    """All candidates at one size."""
    torch.manual_seed(0)
    is_causal = options.mask == "causal"
    modules = {name: make(name, options.width, n_heads).to(options.device) for name in options.candidates}
    x = torch.randn(rows, length, options.width, device=options.device, requires_grad=True)
    grad = torch.randn_like(x, requires_grad=False)

    seconds = interleaved(
        {name: partial(trained, module, x, is_causal, grad) for name, module in modules.items()}, rounds=options.rounds
    )
    found = compared(seconds, REFERENCE)
    for name, row in found.items():
        flops = work_of(name, n_heads, x, is_causal).flops(rows, length, options.width, is_causal, True)
        row["flops"] = flops
        row["share_of_matrix_rate"] = float(f"{flops / row['seconds']['median'] / 1e9 / rate:.3g}")
    for row in found.values():
        row["flop_ratio"] = float(f"{found[REFERENCE]['flops'] / row['flops']:.4g}")
    return found


def slope(points: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line through log(values) against log(points), by least squares."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return float(f"{above / sum((x - x_mean) ** 2 for x in xs):.3g}")


def slopes(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each candidate over the points of one axis, with the seconds from the first to the last."""
    points = [int(point) for point in measured]
    found = {}
    for name in next(iter(measured.values())):
        seconds = [candidates[name]["seconds"]["median"] for candidates in measured.values()]
        flops = [candidates[name]["flops"] for candidates in measured.values()]
        found[name] = {
            "seconds": slope(points, seconds),
            "flops": slope(points, flops),
            "added_seconds": float(f"{seconds[-1] - seconds[0]:.4g}"),
        }
    return found


def plot(axis: str, measured: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, float]]) -> Any:
    """Seconds against the points of an axis, both logarithmic; quartiles as bars."""
    figure = new_figure(5.2, 3.8)
    axes = figure.subplots()
    points = [int(point) for point in measured]
    for i, name in enumerate(found):
        seconds = [candidates[name]["seconds"] for candidates in measured.values()]
        medians = [one["median"] for one in seconds]
        lower = [one["median"] - one["quartiles"][0] for one in seconds]
        upper = [one["quartiles"][1] - one["median"] for one in seconds]
        label = f"{name}: slope {found[name]['seconds']:.2f}"
        axes.errorbar(points, medians, yerr=[lower, upper], label=label, capsize=2, **line_style(i))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(points, [str(point) for point in points])
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("forward + backward, seconds")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8.5)
    return figure


def page(record: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    settings = record["settings"]
    parts = [
        f"Forward and backward of a sublayer, D = {settings['width']}, {settings['mask']}, float32, dropout 0; medians "
        f"(quartiles) over {settings['rounds']} rounds{freed_memory_sentence(settings)}. "
        f"{machine_sentence(record['machine'])} {sentence(record['roofline'])}\n"
    ]
    for axis, one in record["axes"].items():
        names = list(one["slopes"])
        head = [AXES[axis]]
        for name in names:
            head += [f"{name}, ms"] if name == REFERENCE else [f"{name}, ms", f"× {REFERENCE}", "FLOPs ×"]
        rows = []
        for point, candidates in one["points"].items():
            row = [point]
            for name in names:
                found = candidates[name]
                row.append(spread(found["seconds"], 1, 1e3))
                if name != REFERENCE:
                    row += [spread(found[f"times_{REFERENCE}"]), f"{found['flop_ratio']:.2f}"]
            rows.append(row)
        parts.append(f"**{one['title']}**\n\n{markdown_table(head, rows)}")
        lines = [
            [name, f"{found['seconds']:.2f}", f"{found['flops']:.2f}", f"{1e3 * found['added_seconds']:.1f}"]
            for name, found in one["slopes"].items()
        ]
        parts.append(markdown_table(["", "slope of time", "slope of FLOPs", "last − first point, ms"], lines))
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 8192], help="of T")
    parser.add_argument("--heads", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="of n")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], help="of B")
    parser.add_argument("--tokens_at", type=int, nargs=2, default=[1, 12], metavar=("B", "N"), help="where T grows")
    parser.add_argument("--heads_at", type=int, nargs=2, default=[2, 1024], metavar=("B", "T"), help="where n grows")
    parser.add_argument("--batch_at", type=int, nargs=2, default=[256, 12], metavar=("T", "N"), help="where B grows")
    parser.add_argument("--mask", choices=("causal", "full"), default="causal")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="all cores if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--candidates", nargs="+", choices=(*PEERS, *ATTENTIONS), default=[REFERENCE, "mqa", "mhe_add", "mhe_mul"]
    )
    add_freed_memory(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write, with Markdown and plots beside it")
    options = parser.parse_args(arguments)
    if REFERENCE not in options.candidates:
        parser.error(f"--candidates must have {REFERENCE} among them, to which the others are compared")
    if options.out:
        peer("matplotlib", "pip install 'mhe-lightning[benchmark]'")
    torch.set_num_threads(options.threads)
    handle_freed_memory(options.freed_memory)
    described, roofline = description(), measure(options.device)
    print(sentence(roofline), flush=True)
    (rows_t, heads_t), (rows_n, length_n), (length_b, heads_b) = options.tokens_at, options.heads_at, options.batch_at
    plan = {
        "tokens": (f"Against tokens T, B = {rows_t}, n = {heads_t}", [(rows_t, T, heads_t) for T in options.tokens]),
        "heads": (f"Against heads n, B = {rows_n}, T = {length_n}", [(rows_n, length_n, n) for n in options.heads]),
        "batch": (f"Against rows B, T = {length_b}, n = {heads_b}", [(B, length_b, heads_b) for B in options.batch]),
    }
    axes: dict[str, Any] = {}
    for axis, (title, sizes) in plan.items():
        points: dict[str, Any] = {}
        for at, shape in zip(map(str, getattr(options, axis)), sizes, strict=True):
            points[at] = measured_point(options, *shape, rate=roofline["gflops"])
            told = ", ".join(f"{name} {1e3 * row['seconds']['median']:.1f} ms" for name, row in points[at].items())
            print(f"{axis} {at}: {told}", flush=True)
        if len(points) < 2:
            continue  # no slope
        axes[axis] = {"title": title, "points": points, "slopes": slopes(points)}
        save(options, described, page, roofline=roofline, axes=axes)
        if options.out:
            figure = plot(axis, points, axes[axis]["slopes"])
            options.out.with_name(f"{options.out.stem}_{axis}.png").write_bytes(figure_bytes(figure, "png"))


if __name__ == "__main__":
    main()
