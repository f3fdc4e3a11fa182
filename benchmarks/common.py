"""What the benchmarks share."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mhe_lightning.attention import GQA, MHA, MHE, MQA, SHA, SKV, Attention, ELAttention

ATTENTIONS: dict[str, Callable[..., Attention]] = {
    "mha": MHA,
    "gqa": partial(GQA, n_kv_heads=2),
    "skv": SKV,
    "mqa": MQA,
    "el": ELAttention,
    "mhe_add": partial(MHE, combine="add"),
    "mhe_mul": partial(MHE, combine="multiply"),
    "sha": SHA,
}


FREED_MEMORY = {"kept": {-4: 0, -1: -1}, "returned": {-3: 2**16}, "default": {}}
"""What the C library does with memory that is freed, and the parameters of glibc's ``mallopt`` for it.

"kept": no mappings for large requests (M_MMAP_MAX = 0), nothing trimmed (M_TRIM_THRESHOLD = -1), so that a step works
in the pages of the one before. "returned": each request from 64 KiB on a mapping of its own (M_MMAP_THRESHOLD), gone
when it is freed, so that the peak is what is in use. "default": some of both, by thresholds that move.
"""


def handle_freed_memory(how: str) -> None:
    """Choose one of `FREED_MEMORY` for the rest of this process.

    Raises:
        RuntimeError: the C library is not glibc, or refuses.
    """
    for parameter, value in FREED_MEMORY[how].items():
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is None or not set_option(parameter, value):
            raise RuntimeError(f"this C library cannot have freed memory {how}; use --freed_memory default")


def add_freed_memory(parser: argparse.ArgumentParser) -> None:
    """The option of which `handle_freed_memory` is told."""
    parser.add_argument(
        "--freed_memory",
        choices=("default", "kept"),
        default="default",
        help="by the C library: as it does by itself, or all of it for what comes next (glibc)",
    )


def freed_memory_sentence(settings: Mapping[str, Any]) -> str:
    """What became of freed memory in a run, as the end of a sentence; nothing of runs that did not choose."""
    how = settings.get("freed_memory", "default")
    return "" if how == "default" else f", freed memory {how} for the next step"


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "processor": _processor(), "torch": torch.__version__}


def write_results(path: Path, options: argparse.Namespace, machine: Mapping[str, Any], **results: Any) -> None:
    """A JSON file of the settings, the machine, and the results."""
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    path.write_text(
        json.dumps({"settings": settings, "machine": machine, **results}, indent=2) + "\n", encoding="utf-8"
    )


def save(
    options: argparse.Namespace,
    machine: Mapping[str, Any],
    page: Callable[[Mapping[str, Any]], str],
    **results: Any,
) -> None:
    """Where ``options.out`` names a file: the JSON of `write_results`, and beside it ``page`` of it, in Markdown.

    To be called after each part, so that a benchmark that is broken off leaves what it has.
    """
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_results(options.out, options, machine, **results)
        record = json.loads(options.out.read_text(encoding="utf-8"))
        options.out.with_suffix(".md").write_text(page(record), encoding="utf-8")


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round: all run one after another, in an order that turns around every round.

    So whatever else the machine does falls on all of them, and no one is always the first. On a GPU each is waited for.

    Args:
        candidates: what to run, by name.
        rounds: how often each is timed.
        warm_up: rounds before, which are not counted: the first ones allocate and compile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for number in range(-warm_up, rounds):
        for name in order:
            _wait()
            begun = clock()
            candidates[name]()
            _wait()
            if number >= 0:
                seconds[name].append(clock() - begun)
        order.reverse()
    return seconds


def compared(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, Any]]:
    """For each candidate of `interleaved` its median seconds, and how many times faster it is than ``reference``.

    Both with quartiles; those of the ratio are over the ratios of each round.
    """
    rows = {}
    for name, own in seconds.items():
        ratios = [r / s for r, s in zip(seconds[reference], own, strict=True)]
        rows[name] = {"seconds": quartiles(own), f"times_{reference}": quartiles(ratios)}
    return rows


def quartiles(numbers: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles to ``digits`` significant digits."""
    low, median, high = statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else 3 * [numbers[0]]
    low, median, high = (float(f"{x:.{digits}g}") for x in (low, median, high))
    return {"median": median, "quartiles": [low, high]}


def peer(module: str, install: str) -> Any:
    """A library to compare with, or the end with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"the comparison needs {module}: {install}") from None


def description(*packages: str) -> dict[str, Any]:
    """The machine, the date and the versions of ``packages``, to be kept beside results."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    threads = {"torch_threads": torch.get_num_threads(), "cores": os.cpu_count(), "gpu": device}
    return {"date": date.today().isoformat(), **machine(), **versions, **threads}


def machine_sentence(machine: Mapping[str, Any]) -> str:
    """What `description` found, in words."""
    known = ("date", "platform", "processor", "torch_threads", "cores", "gpu")
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name not in known)
    return (
        f"{machine['date']}; {machine['processor']}, {machine['torch_threads']} threads on {machine['cores']} cores, "
        f"GPU: {machine['gpu']}; {versions}; {machine['platform']}."
    )


def spread(found: Mapping[str, Any], digits: int = 2, scale: float = 1.0) -> str:
    """What `quartiles` found, as "median (lower to upper quartile)"."""
    median, (low, high) = found["median"], found["quartiles"]
    return f"{median * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def between_marks(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its lines ``<!-- tables of name -->`` and ``<!-- end of name -->``.

    Raises:
        ValueError: it has no such lines.
    """
    begin, end = f"<!-- tables of {name} -->\n", f"<!-- end of {name} -->\n"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not place.search(page):
        raise ValueError(f"the page has no lines {begin.strip()} and {end.strip()} to put text between")
    return place.sub(lambda match: f"{begin}\n{text.strip()}\n\n{end}", page)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
