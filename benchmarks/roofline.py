"""What the machine can do: its rate of matrix products and its memory's bandwidth, measured.

    python benchmarks/roofline.py --threads 2

The other benchmarks measure both before they begin, and give what they time as a share of the former.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

SHAPES = {
    "cpu": ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (2048, 512, 8192)),
    "cuda": ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 8192, 8192), (8192, 768, 50304)),
}
"""Of the products that are tried, (rows, summed over, columns)."""

COPIED = {"cpu": 2**28, "cuda": 2**30}
"""Bytes: many times more than caches hold."""


def measure(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    copied: int | None = None,
    seconds: float = 0.3,
) -> dict[str, Any]:
    """The best rates that were seen, at the number of threads that is set.

    Args:
        device: "cpu" or "cuda".
        dtype: of the matrices.
        shapes: (m, k, n) of the products; the best of them counts.
        copied: bytes of the tensor that is copied; read and written, they count twice.
        seconds: how long each shape, and the copy, is tried.

    Returns:
        ``gflops`` of the best product, its ``shape``, and ``gigabytes`` per second of a copy.
    """
    kind = torch.device(device).type
    rates = {}
    for m, k, n in shapes or SHAPES[kind]:
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((m, k), (k, n)))
        out = a @ b
        rates[m, k, n] = 2 * m * k * n / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds)  # type: ignore[misc]
    shape = max(rates, key=lambda shape: rates[shape])
    read = torch.ones((copied or COPIED[kind]) // 4, device=device)
    written = torch.empty_like(read)
    bandwidth = 2 * read.nbytes / _best(lambda: written.copy_(read), seconds)
    return {
        "gflops": float(f"{rates[shape] / 1e9:.4g}"),
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "gigabytes": float(f"{bandwidth / 1e9:.4g}"),
    }


def sentence(roofline: dict[str, Any]) -> str:
    """What `measure` found, in words."""
    shape = " × ".join(map(str, roofline["shape"]))
    return (
        f"Measured matrix rate {roofline['gflops']:.4g} GFLOP/s ({roofline['dtype']}, {shape}), memory bandwidth "
        f"{roofline['gigabytes']:.3g} GB/s (copy, read and written)."
    )


def _best(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of the calls that fit into ``seconds``, one at least, after one that is not counted."""
    best, end = float("inf"), None
    while end is None or time.perf_counter() < end or best == float("inf"):
        _wait()
        begun = time.perf_counter()
        call()
        _wait()
        took = time.perf_counter() - begun
        if end is None:
            end = time.perf_counter() + seconds
        else:
            best = min(best, took)
    return best


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="all cores if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(sentence(measure(options.device, getattr(torch, options.dtype))))


if __name__ == "__main__":
    main()
