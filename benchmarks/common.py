"""What the benchmarks share."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable
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

STUDENT_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""


def machine() -> dict[str, Any]:
    return {"platform": platform.platform(), "processor": _processor(), "torch": torch.__version__}


def write_results(path: Path, options: argparse.Namespace, machine: dict[str, Any], **results: Any) -> None:
    """A JSON file of the settings, the machine, and the results."""
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    path.write_text(
        json.dumps({"settings": settings, "machine": machine, **results}, indent=2) + "\n", encoding="utf-8"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def interval(values: list[float], sign: str = "") -> str:
    """Mean ± half the 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    half = STUDENT_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.1f} ± {half:.1f}"
