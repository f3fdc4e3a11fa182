"""What the benchmarks share."""

from __future__ import annotations

import argparse
import json
import platform
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
