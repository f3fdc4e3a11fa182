"""Tables of `plan`: what processes send each other, and what becomes of speed with many of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from mhe_lightning.communication import Carried, Layout
from mhe_lightning.comparison.tables import Table
from mhe_lightning.planning import Cost, Schedule, Share
from mhe_lightning.scaling import GB, Cluster, StepTime, alternatives
from mhe_lightning.verbs.passing import PassingParser
from mhe_lightning.verbs.plan_columns import MIB, MakeTable, Part, count, decimal

MS = 1e-3
GIB = 2**30
TERA = 1e12


def add_scaling_arguments(parser: PassingParser) -> None:
    """Options that say how many processes there are, and how fast they send."""
    cluster = Cluster()
    parser.add_argument(
        "--scale",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="Also plan for so many processes, by data parallelism, FSDP, hybrid sharding and tensor parallelism, each "
        "process with the micro-batch that it has in the config's.",
    )
    parser.add_argument(
        "--tensor_parallel",
        type=int,
        metavar="N",
        help="Processes that share a copy under --scale (default: those of a node).",
    )
    parser.add_argument(
        "--per_node", type=int, default=cluster.per_node, help=f"Processes of a node (default: {cluster.per_node})."
    )
    parser.add_argument(
        "--node_bandwidth",
        type=float,
        default=cluster.node_bandwidth / GB,
        help="GB/s that a process sends within a node, and receives as many (default: 360, 80 %% of an H100's NVLink).",
    )
    parser.add_argument(
        "--network_bandwidth",
        type=float,
        default=cluster.network_bandwidth / GB,
        help="GB/s of a process's network adapter, likewise (default: 40, 80 %% of InfiniBand NDR).",
    )


def check_scaling(parser: PassingParser, options: argparse.Namespace) -> None:
    """Refuse numbers that are not positive, and processes that cannot be arranged."""
    sizes = {"--scale": options.scale, "--tensor_parallel": [options.tensor_parallel], "--per_node": [options.per_node]}
    for name, values in sizes.items():
        for value in values:
            if value is not None and value < 1:
                parser.error(f"{name} ({value}) must be positive")
    for name in ("node_bandwidth", "network_bandwidth"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} ({getattr(options, name)}) must be positive")
    if options.scale and options.no_trace:
        parser.error("--scale needs to follow a step; leave out --no_trace")


def layouts_of(options: argparse.Namespace) -> dict[str, Layout]:
    """The layouts that ``--scale`` asks for, by what the tables call them."""
    return alternatives(options.scale, options.per_node, options.tensor_parallel or options.per_node)


def scaling_tables(
    table: MakeTable, costs: Sequence[Cost], schedule: Schedule, options: argparse.Namespace
) -> list[Table]:
    """What is sent in the config's layout, if that has several processes, and what those of ``--scale`` come to."""
    notes = [
        f"by rings; {options.node_bandwidth:g} GB/s within a node of {options.per_node}, "
        f"{options.network_bandwidth:g} GB/s from a process to another node; assumed, not measured"
    ]
    if options.peak_tflops:
        notes.append(
            f"{options.peak_tflops:g} TFLOP/s at {options.mfu:.0%}; hidden is what can be, at best; efficiency is to "
            "computing alone, with the best overlap and with none"
        )
    tables = []
    if schedule.world_size > 1:
        carried: tuple[Carried, ...] = ("parameters", "gradients", "activations", "buffers")
        parts = [
            Part(f"{what}, MiB", _sent(what), decimal) for what in carried if any(_sent(what)(cost) for cost in costs)
        ]
        caption = f"Sent by each of {schedule.world_size:,} processes in an optimizer step, {schedule.layout}"
        tables.append(table(caption, [*parts, *_columns(lambda cost: cost.share, options)], notes))
    for name, layout in layouts_of(options).items():
        columns = [
            Part("memory, GiB", _memory(name), lambda value: f"{value:,.2f}"),
            *_columns(_scaled(name), options),
        ]
        own = ["attention dropout has to be 0 where heads are split"] if layout.parts > 1 else []
        tables.append(table(f"{name}, {layout}", columns, [*notes, *own]))
    return tables


def share_record(share: Share | None, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a process has of a step, for JSON: bytes and seconds."""
    if share is None:
        return None
    record = {
        "layout": vars(share.layout),
        "memory_bytes": {**vars(share.memory), "total": share.memory.total},
        "sent_bytes": share.sent,
        "collectives": [{**vars(one), "sent": one.sent(share.layout)} for one in share.collectives],
        "training_flops": share.flops.training,
        "micro_batches": share.micro_batches,
    }
    if not options.peak_tflops:
        return record
    time = share.time(cluster_of(options), rate_of(options))
    return {
        **record,
        "seconds": {**vars(time), "overlapped": time.overlapped, "serial": time.serial},
        "tokens_per_second": time.tokens_per_second,
        "efficiency": time.efficiency,
    }


def cluster_of(options: argparse.Namespace) -> Cluster:
    """What the options say of the links between processes."""
    return Cluster(
        per_node=options.per_node,
        node_bandwidth=options.node_bandwidth * GB,
        network_bandwidth=options.network_bandwidth * GB,
    )


def rate_of(options: argparse.Namespace) -> float:
    """Matrix operations that the options have a process do in a second."""
    rate: float = options.peak_tflops * TERA * options.mfu
    return rate


def _columns(of: Callable[[Cost], Share | None], options: argparse.Namespace) -> list[Part]:
    """What is sent, how long that takes, and with ``--peak_tflops`` what it leaves of the speed."""
    cluster = cluster_of(options)

    def shared(measure: Callable[[Share], float | None]) -> Callable[[Cost], float | None]:
        def of_cost(cost: Cost) -> float | None:
            share = of(cost)
            return None if share is None else measure(share)

        return of_cost

    def timed(measure: Callable[[StepTime], float | None]) -> Callable[[Cost], float | None]:
        return shared(lambda share: measure(share.time(cluster, rate_of(options))))

    def sending(share: Share) -> float:
        return sum(cluster.seconds(one, share.layout) for one in share.collectives) / MS

    parts = [
        Part("sent, MiB", shared(lambda share: share.sent / MIB), decimal),
        Part("sending, ms", shared(sending), decimal),
    ]
    if not options.peak_tflops:
        return parts
    return [
        *parts,
        Part("computing, ms", timed(lambda time: time.computing / MS), decimal),
        Part("hidden", timed(lambda time: time.hidden), _percent),
        Part("tokens/s", timed(lambda time: time.tokens_per_second), lambda value: count(round(value))),
        Part("efficiency", timed(lambda time: time.efficiency), _percent),
        Part("without overlap", timed(lambda time: time.serial_efficiency), _percent),
        Part("hidden from, tokens", timed(lambda time: time.critical_tokens), lambda value: count(round(value))),
    ]


def _sent(what: Carried) -> Callable[[Cost], float]:
    def sent(cost: Cost) -> float:
        assert cost.share is not None
        return sum(one.sent(cost.share.layout) for one in cost.share.collectives if one.carries == what) / MIB

    return sent


def _scaled(name: str) -> Callable[[Cost], Share | None]:
    return lambda cost: cost.scaled[name]


def _memory(name: str) -> Callable[[Cost], float | None]:
    def memory(cost: Cost) -> float | None:
        share = cost.scaled[name]
        return None if share is None else share.memory.total / GIB

    return memory


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
