"""Speed and memory of one attention sublayer, ours beside plain SDPA and torch's own, forward and backward.

    python benchmarks/sublayer.py --out docs/results/sublayer_cpu.json

A sublayer is the projections, the attention and the output projection, from x (B, T, D) to (B, T, D). The reference is
multi-head attention written plainly: three linear layers, `scaled_dot_product_attention`, a fourth. Forward and
backward computes the gradients of x and of all weights; forward alone is without gradient. Every round runs all
candidates one after another; medians and quartiles over the rounds, those of a ratio over the ratios of each round.

First each of ours is compared with the plain multi-head attention that it folds to (`Attention.folded`), at the same
length, and the peers with ours: output and gradient of x must agree.

FLOPs are those of the matrix products that a pass needs, from closed forms (`Work`): of the pairs of query and key that
are not hidden, and with scores computed twice in forward and backward together, as kernels that keep none do.

Saved for backward are the bytes that autograd keeps between forward and backward, each storage once, parameters left
out: of the whole sublayer; without its input x, which all keep; and of the attention alone, without what the output
projection keeps, its own input, either.

On a GPU (``--device cuda --dtype bfloat16``) SDPA's backends one by one, FlexAttention and, where it is installed,
flash-attn are among the peers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from candidates import OURS, PEERS, Plain, available, make, work_of
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
    save,
    spread,
)
from roofline import measure, sentence
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

REFERENCE = "sdpa_mha"
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative


def trained(module: nn.Module, x: Tensor, is_causal: bool, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of x, (B, T, D) with gradient, and of the weights."""
    return torch.autograd.grad(call(module, x, is_causal), (x, *module.parameters()), grad)


@torch.no_grad()
def inferred(module: nn.Module, x: Tensor, is_causal: bool) -> Tensor:
    """Forward alone."""
    return call(module, x, is_causal)


def call(module: nn.Module, x: Tensor, is_causal: bool) -> Tensor:
    output: Tensor = module(x, is_causal=is_causal)
    return output


class _LastProduct(TorchDispatchMode):
    """Keeps the input of the last linear layer, the output projection, to whose operands it comes as a view."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {torch.ops.aten.addmm: 1, torch.ops.aten.mm: 0}.get(func.overloadpacket)
        if place is not None:
            self.input = args[place]
        return func(*args, **(kwargs or {}))


def saved_bytes(module: nn.Module, x: Tensor, is_causal: bool) -> dict[str, int]:
    """Bytes that are kept for the backward pass: of all, without x, and of the attention alone."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _LastProduct() as last:
        output = call(module, x, is_causal)  # alive until all is counted, so that no storage is used again
    for parameter in module.parameters():
        kept.pop(_storage(parameter), None)
    total = sum(kept.values())
    kept.pop(_storage(x), None)
    without_x = sum(kept.values())
    kept.pop(_storage(last.input), None)
    del output
    return {"all": total, "without_x": without_x, "attention": sum(kept.values())}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_same_function(
    names: Iterable[str], width: int, n_heads: int, length: int, is_causal: bool, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """How far each is from plain multi-head attention of the same weights: output and gradient of x, relative.

    Raises:
        RuntimeError: it computes something else.
    """
    place: Any = {"device": device, "dtype": dtype}
    x = torch.randn(1, length, width, **place, requires_grad=True)
    grad = torch.randn(1, length, width, **place)
    differences = {}
    for name in names:
        module = make(name, width, n_heads)
        if name in PEERS:  # has the weights of one of ours
            ours = ATTENTIONS[name.removeprefix("sdpa_") if name in ("sdpa_gqa", "sdpa_mqa") else "mha"]
            weights = ours(width=width, n_heads=n_heads).folded()
            module.load(weights)  # type: ignore[operator]
        else:
            weights = module.folded()  # type: ignore[operator]
        plain = Plain(width, n_heads, n_heads)
        plain.load(weights.with_kv_heads(n_heads))
        found = []
        for each in (plain.to(**place), module.to(**place)):
            output = call(each, x, is_causal)
            found.append((output.detach(), torch.autograd.grad(output, x, grad)[0]))
        difference = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
        if not difference <= MAX_DIFFERENCE[dtype]:
            raise RuntimeError(
                f"{name} is {difference:.1e} from plain attention, at most {MAX_DIFFERENCE[dtype]:.0e} allowed"
            )
        differences[name] = float(f"{difference:.2g}")
    return differences


def measured_case(
    options: argparse.Namespace, rows: int, length: int, is_causal: bool, rate: float
) -> dict[str, dict[str, Any]]:
    """All candidates at one size."""
    place: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    names = options.candidates
    torch.manual_seed(0)
    differences = check_same_function(names, options.width, options.heads, length, is_causal, **place)
    modules = {name: make(name, options.width, options.heads).to(**place) for name in names}
    x = torch.randn(rows, length, options.width, **place, requires_grad=True)
    grad = torch.randn(rows, length, options.width, **place)

    found: dict[str, dict[str, Any]] = {name: {"difference": differences[name]} for name in names}
    passes: dict[str, dict[str, Callable[[], Any]]] = {
        "training": {name: partial(trained, modules[name], x, is_causal, grad) for name in names},
        "forward": {name: partial(inferred, modules[name], x, is_causal) for name in names},
    }
    for name in names:
        work = work_of(name, options.heads, x, is_causal)
        found[name]["saved_bytes"] = saved_bytes(modules[name], x, is_causal)
        for kind in passes:
            flops = work.flops(rows, length, options.width, is_causal, kind == "training")
            found[name][kind] = {"flops": flops}
    for kind, candidates in passes.items():
        for name, row in compared(interleaved(candidates, rounds=options.rounds), REFERENCE).items():
            one = found[name][kind]
            one.update(row)
            one["flop_ratio"] = float(f"{found[REFERENCE][kind]['flops'] / one['flops']:.4g}")
            one["gflops"] = float(f"{one['flops'] / row['seconds']['median'] / 1e9:.4g}")
            one["share_of_matrix_rate"] = float(f"{one['gflops'] / rate:.3g}")
    for row in found.values():
        saved, reference = row["saved_bytes"], found[REFERENCE]["saved_bytes"]
        row["saved_ratio"] = {part: float(f"{saved[part] / reference[part]:.3g}") for part in saved}
    return found


def page(record: Mapping[str, Any]) -> str:
    """The tables, in Markdown."""
    settings = record["settings"]
    head = [
        "candidate",
        "forward + backward, ms",
        "× SDPA MHA",
        "FLOPs, MHA's ÷ its",
        "GFLOP/s",
        "of the matrix rate",
        "forward, ms",
        "× SDPA MHA",
        "FLOPs, MHA's ÷ its",
        "saved, MiB",
        "× MHA",
        "× MHA, without x",
        "× MHA, attention alone",
    ]
    parts = [
        f"One attention sublayer, D = {settings['width']}, n = {settings['heads']}, {settings['dtype']}, dropout 0; "
        f"medians (quartiles) over {settings['rounds']} rounds{freed_memory_sentence(settings)}. "
        f"{machine_sentence(record['machine'])} "
        f"{sentence(record['roofline'])}\n"
    ]
    for case, candidates in record["cases"].items():
        rows = []
        for name, one in candidates.items():
            training, forward, saved = one["training"], one["forward"], one["saved_ratio"]
            rows.append(
                [
                    name,
                    spread(training["seconds"], 1, 1e3),
                    spread(training[f"times_{REFERENCE}"]),
                    f"{training['flop_ratio']:.2f}",
                    f"{training['gflops']:.0f}",
                    f"{100 * training['share_of_matrix_rate']:.0f} %",
                    spread(forward["seconds"], 1, 1e3),
                    spread(forward[f"times_{REFERENCE}"]),
                    f"{forward['flop_ratio']:.2f}",
                    f"{one['saved_bytes']['all'] / 2**20:.1f}",
                    *(f"{saved[part]:.2f}" for part in ("all", "without_x", "attention")),
                ]
            )
        parts.append(f"**{case}**\n\n{markdown_table(head, rows)}")
    return "\n".join(parts)


def size(text: str) -> tuple[int, int]:
    """Rows and tokens of a row, from such as "8x512"."""
    try:
        rows, length = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be rows x tokens, such as 8x512") from None
    return rows, length


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, meaning in (
        ("width", 768, ""),
        ("heads", 12, ""),
        ("rounds", 5, "after one that is not counted"),
        ("threads", os.cpu_count() or 1, "all cores if not given"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=meaning)
    parser.add_argument("--sizes", type=size, nargs="+", default=[(8, 512), (2, 2048)], help="rows x tokens")
    parser.add_argument("--masks", nargs="+", choices=("causal", "full"), default=["causal", "full"])
    parser.add_argument("--candidates", nargs="+", choices=(*PEERS, *OURS), help="all that can run if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_freed_memory(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write, with a Markdown file beside it")
    options = parser.parse_args(arguments)
    options.candidates = options.candidates or available(options.device)
    if REFERENCE not in options.candidates:
        parser.error(f"--candidates must have {REFERENCE} among them, to which the others are compared")
    torch.set_num_threads(options.threads)
    handle_freed_memory(options.freed_memory)
    described = description()
    roofline = measure(options.device, getattr(torch, options.dtype))
    print(sentence(roofline), flush=True)
    cases = {}
    for rows, length in options.sizes:
        for mask in options.masks:
            case = f"{rows} x {length}, {mask}"
            print(case, flush=True)
            cases[case] = measured_case(options, rows, length, mask == "causal", roofline["gflops"])
            for name, one in cases[case].items():
                training, saved = one["training"], one["saved_ratio"]
                print(
                    f"  {name:22s} {1e3 * training['seconds']['median']:8.1f} ms  "
                    f"{training[f'times_{REFERENCE}']['median']:5.2f} × (FLOPs {training['flop_ratio']:.2f} ×)  saved "
                    f"{saved['all']:.2f} ×, without x {saved['without_x']:.2f} ×, attention {saved['attention']:.2f} ×",
                    flush=True,
                )
            save(options, described, page, roofline=roofline, cases=cases)


if __name__ == "__main__":
    main()
