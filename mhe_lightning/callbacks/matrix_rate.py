"""How fast a device multiplies matrices, measured: what a training step's speed is compared with."""

from __future__ import annotations

import time
from functools import cache

import torch

SECONDS = 0.2
"""How long products are repeated."""


@cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of some products of square matrices, two for each multiply–add.

    Takes a fraction of a second, once per process. Random numbers come from a generator of its own.

    Args:
        device: that multiplies.
        dtype: of the matrices; float32 is multiplied as ``torch.set_float32_matmul_precision`` says.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    if on_gpu:
        del a, b
        torch.cuda.reset_peak_memory_stats(device)  # what training needs is recorded
    return 2 * size**3 / min(seconds)


def computing_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in at a ``trainer.precision``."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float64 if precision.startswith("64") else torch.float32
