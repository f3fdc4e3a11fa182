"""The attention alone, without projections: shared scores of MHE-ADD beside multi-head attention through SDPA.

    python benchmarks/attention_core.py --device cuda --dtype bfloat16 --out docs/results/attention_core_cuda.json

MHE-ADD's operator takes q, k, v of one head and an embedding for each; multi-head attention takes q, k, v of all heads,
through every backend of `scaled_dot_product_attention` that the device has (and FlexAttention and flash-attn on a GPU,
where they are installed). Every round runs all candidates one after another. The reference is the fastest of MHA's.

The error is the largest distance from the same computed in float64, relative to its largest number, of the heads and of
the gradient by q: MHE-ADD's from MHE-ADD, MHA's from MHA, on numbers of the same spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import GPU_CORES, available, sdpa
from common import compared, description, interleaved, machine_sentence, markdown_table, save, spread
from roofline import measure, sentence
from torch import Tensor

from mhe_lightning.attention.kernels.shared_scores import shared_score_attention

OURS = "mhe_add"
Attend = Callable[..., Tensor]


def literal(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Multi-head attention as it is defined; q, k and v (B, n or 1, T, d)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def cores(device: str) -> dict[str, Attend]:
    """Multi-head attentions that the device has, by name; each takes q, k, v (B, n, T, d) and causality."""
    there = available(device)
    return {"sdpa": sdpa, **{name: make() for name, make in GPU_CORES.items() if name in there}}


def shared(q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, is_causal: bool) -> Tensor:
    return shared_score_attention(q, k, v, e_q, None, is_causal).transpose(1, 2)


def shared_literal(q: Tensor, k: Tensor, v: Tensor, e_q: Tensor, is_causal: bool) -> Tensor:
    return literal(q[:, None] + e_q[:, None], k[:, None], v[:, None], is_causal)


def error(attend: Attend, exact: Attend, arguments: tuple[Tensor, ...], is_causal: bool) -> dict[str, float]:
    """Of the heads (B, n, T, d), and of the gradient by the first argument; one row of the batch is enough."""
    own = [t[:1].detach().requires_grad_() if t.ndim > 2 else t.detach().requires_grad_() for t in arguments]
    doubles = [t.detach().double().requires_grad_() for t in own]
    grad = torch.randn(exact(*doubles, is_causal).shape, device=own[0].device, dtype=own[0].dtype)
    heads, exact_heads = attend(*own, is_causal), exact(*doubles, is_causal)
    gradients = (
        torch.autograd.grad(heads, own[0], grad)[0],
        torch.autograd.grad(exact_heads, doubles[0], grad.double())[0],
    )
    pairs = {"heads": (heads, exact_heads), "gradient": gradients}
    return {
        part: float(f"{((a.double() - b).abs().max() / b.abs().max()).item():.3g}") for part, (a, b) in pairs.items()
    }


def case(options: argparse.Namespace, n: int, length: int, is_causal: bool) -> dict[str, Any]:
    """All candidates at one size."""
    place: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    rows, d = max(1, options.tokens // length), options.head_dim
    torch.manual_seed(0)
    one = [torch.randn(rows, length, d, **place, requires_grad=True) for _ in "qkv"]
    e_q = (0.02 * torch.randn(n, d, **place)).requires_grad_()
    all_heads = [torch.randn(rows, n, length, d, **place, requires_grad=True) for _ in "qkv"]
    candidates: dict[str, tuple[Attend, Attend, tuple[Tensor, ...]]] = {OURS: (shared, shared_literal, (*one, e_q))}
    candidates |= {name: (core, literal, tuple(all_heads)) for name, core in cores(options.device).items()}
    grad = torch.randn(rows, n, length, d, **place)

    def trained(attend: Attend, arguments: tuple[Tensor, ...]) -> None:
        torch.autograd.grad(attend(*arguments, is_causal), arguments, grad)

    @torch.no_grad()
    def inferred(attend: Attend, arguments: tuple[Tensor, ...]) -> None:
        attend(*arguments, is_causal)

    pairs = rows * length**2 * d * (1 if is_causal else 2)  # operations of one product for one head
    flops = {"forward": ((n + 1) * pairs, 2 * n * pairs), "training": ((3 * n + 4) * pairs, 7 * n * pairs)}
    found: dict[str, Any] = {
        name: {"error": error(attend, exact, arguments, is_causal)}
        for name, (attend, exact, arguments) in candidates.items()
    }
    for kind, run in {"forward": inferred, "training": trained}.items():
        seconds = interleaved(
            {name: partial(run, attend, arguments) for name, (attend, _, arguments) in candidates.items()},
            rounds=options.rounds,
            warm_up=2,
        )
        best = min((name for name in candidates if name != OURS), key=lambda name: statistics.median(seconds[name]))
        for name, row in compared(seconds, best).items():
            found[name][kind] = {"seconds": row["seconds"], "times_best": row[f"times_{best}"]}
        found[OURS][kind] |= {"best": best, "flop_ratio": round(flops[kind][1] / flops[kind][0], 3)}
    return found


def page(record: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    settings = record["settings"]
    rows = []
    for name, candidates in record["cases"].items():
        for candidate, one in candidates.items():
            ratio = [f"{one[kind]['flop_ratio']:.2f}" if candidate == OURS else "" for kind in ("forward", "training")]
            forward, training = one["forward"], one["training"]
            rows.append(
                [
                    f"{name}, {candidate}",
                    spread(forward["seconds"], 3, 1e3),
                    spread(forward["times_best"]),
                    ratio[0],
                    spread(training["seconds"], 3, 1e3),
                    spread(training["times_best"]),
                    ratio[1],
                    f"{one['error']['heads']:.1e}",
                    f"{one['error']['gradient']:.1e}",
                ]
            )
    head = ["size, candidate", "forward, ms", "× fastest MHA", "FLOP ratio", "forward + backward, ms", "× fastest MHA"]
    head += ["FLOP ratio", "error of heads", "error of gradient"]
    return (
        f"The attention alone, d = {settings['head_dim']}, {settings['dtype']}, {settings['tokens']:,} tokens; medians "
        f"(quartiles) over {settings['rounds']} rounds. {machine_sentence(record['machine'])} "
        f"{sentence(record['roofline'])}\n\n{markdown_table(head, rows)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[12, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    for name, value, meaning in (
        ("tokens", 16384, "in all rows together, of one row at least"),
        ("head_dim", 64, ""),
        ("rounds", 20, "after two that are not counted"),
        ("threads", os.cpu_count() or 1, "all cores if not given"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--masks", nargs="+", choices=("causal", "full"), default=["causal", "full"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, help="JSON file to write, with a Markdown file beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    described, roofline = description(), measure(options.device, getattr(torch, options.dtype))
    cases: dict[str, Any] = {}
    for n in options.heads:
        for length in options.lengths:
            for mask in options.masks:
                name = f"n = {n}, T = {length}, {mask}"
                cases[name] = case(options, n, length, mask == "causal")
                ours = cases[name][OURS]
                told = ", ".join(
                    f"{kind} {ours[kind]['times_best']['median']:.2f} × {ours[kind]['best']}"
                    f" (FLOPs {ours[kind]['flop_ratio']:.2f} ×)"
                    for kind in ("forward", "training")
                )
                print(f"{name}: {told}", flush=True)
                save(options, described, page, roofline=roofline, cases=cases)


if __name__ == "__main__":
    main()
