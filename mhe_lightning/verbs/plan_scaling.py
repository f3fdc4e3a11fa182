"""Tables of `plan`: what processes send each other, and what becomes of speed with many of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from mhe_lightning.communication import Carried, Layout
from mhe_lightning.comparison.tables import Table
from mhe_lightning.planning import Cost, Schedule, Share
from mhe_lightning.scaling import GB, Cluster, StepTime, step_time
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
    found: dict[str, Layout] = {}
    node = options.per_node
    parts = options.tensor_parallel or node
    for n in options.scale:
        found[f"{n:,} processes by DDP"] = Layout(n)
        found[f"{n:,} processes by FSDP"] = Layout.of_shards(n)
        if n > node and n % node == 0:
            found[f"{n:,} processes by hybrid sharding"] = Layout.of_shards(n, shard=node)
        if n % parts == 0 and parts > 1:
            found[f"{n:,} processes by tensor parallelism"] = Layout.of_shards(n, tensor_parallel=parts)
    return found


def scaling_tables(
    table: MakeTable, costs: Sequence[Cost], schedule: Schedule, options: argparse.Namespace
) -> list[Table]:
    """What is sent in the config's layout, if that has several processes, and what those of ``--scale`` come to."""
    clock = _Clock(options)
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
        tables.append(table(caption, [*parts, *clock.columns(lambda cost: cost.share)], notes))
    for name, layout in layouts_of(options).items():
        columns = [
            Part("memory, GiB", _of(name, lambda share: share.memory.total / GIB), lambda value: f"{value:,.2f}"),
            *clock.columns(lambda cost, name=name: cost.scaled[name]),  # type: ignore[misc]
        ]
        tables.append(table(f"{name}, {layout}", columns, notes))
    return tables


def share_record(cost: Cost, share: Share | None, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a process has of a step, for JSON: bytes and seconds."""
    if share is None:
        return None
    time = _Clock(options).time(share)
    sent = [{**vars(one), "sent": one.sent(share.layout)} for one in share.collectives]
    record = {
        "layout": vars(share.layout),
        "memory_bytes": {**vars(share.memory), "total": share.memory.total},
        "sent_bytes": share.sent,
        "collectives": sent,
        "training_flops": share.flops.training,
        "micro_batches": share.micro_batches,
    }
    if time is None:
        return record
    tokens, efficiency = _speed(cost, share, time, options)
    seconds = {**vars(time), "overlapped": time.overlapped, "serial": time.serial}
    return {**record, "seconds": seconds, "tokens_per_second": tokens, "efficiency": efficiency}


class _Clock:
    """Times steps on the cluster of the options; without ``--peak_tflops`` only what is sent."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cluster = Cluster(
            per_node=options.per_node,
            node_bandwidth=options.node_bandwidth * GB,
            network_bandwidth=options.network_bandwidth * GB,
        )

    def time(self, share: Share) -> StepTime | None:
        if not self.options.peak_tflops:
            return None
        return step_time(
            self.cluster,
            share.layout,
            share.collectives,
            rate=self.options.peak_tflops * TERA * self.options.mfu,
            forward_flops=share.flops.forward,
            training_flops=share.flops.training,
            tokens=share.tokens,
            micro_batches=share.micro_batches,
        )

    def columns(self, of: Callable[[Cost], Share | None]) -> list[Part]:
        """What is sent, how long that takes, and what it leaves of the speed."""

        def shared(measure: Callable[[Share], float]) -> Callable[[Cost], float | None]:
            def of_cost(cost: Cost) -> float | None:
                share = of(cost)
                return None if share is None else measure(share)

            return of_cost

        def timed(measure: Callable[[Cost, Share, StepTime], float | None]) -> Callable[[Cost], float | None]:
            def of_cost(cost: Cost) -> float | None:
                share = of(cost)
                time = None if share is None else self.time(share)
                return None if share is None or time is None else measure(cost, share, time)

            return of_cost

        def sending(share: Share) -> float:
            return sum(self.cluster.seconds(one, share.layout) for one in share.collectives) / MS

        parts = [
            Part("sent, MiB", shared(lambda share: share.sent / MIB), decimal),
            Part("sending, ms", shared(sending), decimal),
        ]
        if not self.options.peak_tflops:
            return parts
        speed = self.options

        return [
            *parts,
            Part("computing, ms", timed(lambda cost, share, time: time.computing / MS), decimal),
            Part("hidden", timed(lambda cost, share, time: time.hidden), _percent),
            Part(
                "tokens/s",
                timed(lambda cost, share, time: _speed(cost, share, time, speed)[0]),
                lambda value: count(round(value)),
            ),
            Part("efficiency", timed(lambda cost, share, time: _speed(cost, share, time, speed)[1]), _percent),
            Part(
                "without overlap",
                timed(lambda cost, share, time: _ideal(cost, share, speed) / time.serial),
                _percent,
            ),
            Part(
                "hidden from, tokens",
                timed(lambda cost, share, time: time.critical_tokens),
                lambda value: count(round(value)),
            ),
        ]


def _ideal(cost: Cost, share: Share, options: argparse.Namespace) -> float:
    """Seconds of a step if nothing had to be sent and nothing computed twice."""
    assert cost.flops is not None
    rate = options.peak_tflops * TERA * options.mfu
    return share.micro_batches * cost.flops.training / share.layout.parts / rate


def _speed(cost: Cost, share: Share, time: StepTime, options: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second of all processes, and the efficiency, at best."""
    tokens = share.layout.data_parallel * share.micro_batches * share.tokens
    return tokens / time.overlapped, _ideal(cost, share, options) / time.overlapped


def _sent(what: Carried) -> Callable[[Cost], float]:
    def sent(cost: Cost) -> float:
        assert cost.share is not None
        return sum(one.sent(cost.share.layout) for one in cost.share.collectives if one.carries == what) / MIB

    return sent


def _of(name: str, measure: Callable[[Share], float]) -> Callable[[Cost], float | None]:
    def of_cost(cost: Cost) -> float | None:
        share = cost.scaled[name]
        return None if share is None else measure(share)

    return of_cost


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
