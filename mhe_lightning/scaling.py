"""How long a step takes on a cluster: what is computed at an assumed rate, what is sent at assumed bandwidths.

Nothing here was measured on GPUs. The model is that of rings, as NCCL has them: in a group of p processes each sends
its share of the tensor in p - 1 hops. A group over several nodes sends through the adapters of its processes, side by
side, but no faster than within a node. A sum, or a broadcast, may go through a tree instead, in fewer hops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mhe_lightning.communication import Collective, Group, Layout

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """How fast processes send. The defaults are of nodes with 8 H100 and a network adapter for each.

    Args:
        per_node: processes of a node, one for each of its GPUs.
        node_bandwidth: bytes that a process sends to others of its node, and receives as many: 80 % of the 450 GB/s of
            NVLink 4.
        network_bandwidth: bytes that a process's adapter sends, and receives as many: 80 % of the 50 GB/s of InfiniBand
            NDR.
        node_latency: seconds of a hop within a node, as NCCL's tuning model has it (2.19, protocol LL128).
        network_latency: seconds of a hop between nodes, likewise.
    """

    per_node: int = 8
    node_bandwidth: float = 360 * GB
    network_bandwidth: float = 40 * GB
    node_latency: float = 1.9e-6
    network_latency: float = 4e-6

    def seconds(self, collective: Collective, layout: Layout) -> float:
        """How long a step's collectives of a kind take, one after the other."""
        p, on_node = self._group(layout, collective.group)
        if p == 1:
            return 0.0
        nodes = math.ceil(p / on_node)
        bandwidth = self.node_bandwidth
        if nodes > 1:
            bandwidth = min(bandwidth, on_node * self.network_bandwidth)
        hops = (p - nodes) * self.node_latency + (nodes - 1) * self.network_latency
        tree = (on_node - 1) * self.node_latency + math.log2(nodes) * self.network_latency
        latency = hops
        if collective.kind in ("all_reduce", "broadcast"):
            latency = min(hops, tree) * (2 if collective.kind == "all_reduce" else 1)
        return collective.sent(layout) / bandwidth + collective.calls * latency

    def _group(self, layout: Layout, group: Group) -> tuple[int, int]:
        """Processes of a group, and how many of them a node has."""
        stride = {"parts": 1, "shards": layout.parts, "replicas": layout.parts * layout.shards}[group]
        size: int = getattr(layout, group)
        return size, min(size, max(1, self.per_node // stride))


def alternatives(world_sizes: Sequence[int], per_node: int, tensor_parallel: int) -> dict[str, Layout]:
    """The layouts that may be compared, by names such as "64 processes by FSDP".

    Args:
        world_sizes: numbers of processes.
        per_node: those of a node, which hybrid sharding shards over.
        tensor_parallel: processes that share a copy of each block in tensor parallelism; FSDP2 does the rest.
    """
    found: dict[str, Layout] = {}
    for n in world_sizes:
        found[f"{n:,} processes by DDP"] = Layout(n)
        found[f"{n:,} processes by FSDP"] = Layout.of_shards(n)
        if 1 < per_node < n and n % per_node == 0:
            found[f"{n:,} processes by hybrid sharding"] = Layout.of_shards(n, per_node)
        if tensor_parallel > 1 and n % tensor_parallel == 0:
            found[f"{n:,} processes by tensor parallelism"] = Layout.of_shards(n, None, tensor_parallel)
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Args:
        tokens: that all processes read.
        ideal: if nothing had to be sent and nothing computed by several processes alike.
        computing: of the matrix products.
        waiting: of tensor parallelism's sums, and data parallelism's buffers, which nothing can hide.
        sending: of everything else that is sent.
        exposed: of ``sending``, what remains where it overlaps as well as can be: parameters with the forward pass,
            parameters and gradients with the backward pass; those of data parallelism with the last one.
        critical_tokens: tokens of a process's micro-batch from which on all of ``sending`` can be hidden; None where
            nothing is sent.
    """

    tokens: int
    ideal: float
    computing: float
    waiting: float
    sending: float
    exposed: float
    critical_tokens: float | None

    @property
    def overlapped(self) -> float:
        """The whole step, at best."""
        return self.computing + self.waiting + self.exposed

    @property
    def serial(self) -> float:
        """The whole step, if nothing overlaps."""
        return self.computing + self.waiting + self.sending

    @property
    def hidden(self) -> float | None:
        """The share of all communication that can be hidden; None where there is none."""
        total = self.waiting + self.sending
        return (self.sending - self.exposed) / total if total else None

    @property
    def efficiency(self) -> float:
        """Of the ideal speed, what is left at best."""
        return self.ideal / self.overlapped

    @property
    def serial_efficiency(self) -> float:
        """Of the ideal speed, what is left if nothing overlaps."""
        return self.ideal / self.serial

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, at best."""
        return self.tokens / self.overlapped


def step_time(
    cluster: Cluster,
    layout: Layout,
    found: Sequence[Collective],
    *,
    rate: float,
    forward_flops: float,
    training_flops: float,
    needed_flops: float,
    tokens: int,
    micro_batches: int = 1,
) -> StepTime:
    """The time of an optimizer step.

    Args:
        cluster: what it runs on.
        layout: how the processes are arranged.
        found: the step's collectives.
        rate: matrix operations that a process does in a second: its peak × the share of it that is used (MFU).
        forward_flops: of one process's micro-batch, in the forward pass.
        training_flops: of one process's micro-batch, in all.
        needed_flops: a process's fair share of a micro-batch: less, where parts of a model compute something alike.
        tokens: of one process's micro-batch.
        micro_batches: that a step accumulates.
    """
    passes = {"forward": forward_flops / rate, "backward": (training_flops - forward_flops) / rate}
    waiting, sending, exposed, tightest = 0.0, 0.0, 0.0, 0.0
    for during, computing in passes.items():
        times = {1: 0.0, micro_batches: 0.0}  # of what is sent once a step, and in every micro-batch
        for one in (c for c in found if c.during == during):
            if one.carries in ("activations", "buffers"):
                waiting += cluster.seconds(one, layout)
            else:
                times[one.micro_batches] += cluster.seconds(one, layout)
        for n, seconds in times.items():
            sending += seconds
            exposed += max(0.0, seconds - n * computing)
            tightest = max(tightest, seconds / n / computing)
    return StepTime(
        tokens=layout.data_parallel * micro_batches * tokens,
        ideal=micro_batches * needed_flops / rate,
        computing=micro_batches * sum(passes.values()),
        waiting=waiting,
        sending=sending,
        exposed=exposed,
        critical_tokens=tightest * tokens if sending else None,
    )
