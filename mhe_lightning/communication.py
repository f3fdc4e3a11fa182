"""What the processes of a training send each other in an optimizer step, in bytes.

How the strategies communicate:

* Data parallelism sums all gradients over the replicas, once a step, and sends the buffers of the first rank around
  (unless told not to, as by configs/strategy/ddp.yaml: then what is counted for them is not sent).
* FSDP2 shards the parameters of each block, and of all that is in no block (the root), over the processes of a shard
  group. In each micro-batch a block's are gathered in the forward pass and again in the backward pass, the root's once;
  gradients are summed and scattered. A parameter is split along its first dimension, rows being added until all
  processes have as many: a matrix of 64 rows costs 1,024 processes as much as one of 1,024.
* Hybrid sharding does so within a shard group, and sums each process's shard of the gradients over the replicas.
* Tensor parallelism splits heads and feed-forward layers. Partial outputs are summed in the forward pass, and partial
  gradients of their inputs in the backward pass. Heads that share their projections (MHE) have these on every process:
  there the gradients of the shared queries, keys and values, of width d each, are summed instead of the input's, of
  width n·d. A single head (SHA) is not split.

Scalars that are summed now and then (the loss, the gradient's norm) are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mhe_lightning.attention import Attention
from mhe_lightning.distributed import mesh_sizes
from mhe_lightning.models.layers import FeedForward

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
Group = Literal["replicas", "shards", "parts"]
Carried = Literal["parameters", "gradients", "activations", "buffers"]
Pass = Literal["forward", "backward"]

SHARES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
"""How often a collective over a ring of many processes has each send the whole tensor."""

BUCKET = 25 * 2**20
"""Bytes of gradients that data parallelism sums at once, torch's default."""


@dataclass(frozen=True)
class Layout:
    """How processes are arranged: replicas of shard groups of tensor-parallel parts; neighbouring ranks are parts.

    Args:
        replicas: copies of the sharded model; all processes in plain data parallelism.
        shards: processes over which weights, gradients and the optimizer's state are spread.
        parts: processes that divide heads and feed-forward layers among them.
        sharded: whether the strategy is FSDP2; else it is data parallelism.

    Raises:
        ValueError: a number is below 1, or there are shards or parts in plain data parallelism.
    """

    replicas: int = 1
    shards: int = 1
    parts: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("replicas", "shards", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.shards * self.parts > 1 and not self.sharded:
            raise ValueError(f"shards ({self.shards}) and parts ({self.parts}) need a sharding strategy: sharded=True")

    @classmethod
    def of_shards(cls, world_size: int, shard: int | None = None, tensor_parallel: int = 1) -> Layout:
        """The layout of FSDP2, tensor parallelism and both; arguments and errors as of `mesh_sizes`."""
        sizes = mesh_sizes(world_size=world_size, shard=shard, tensor_parallel=tensor_parallel)
        return cls(*sizes, sharded=True)

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.replicas * self.shards * self.parts

    @property
    def data_parallel(self) -> int:
        """Processes, or groups of parts, that see rows of their own."""
        return self.replicas * self.shards

    def __str__(self) -> str:
        sizes = {"replica": self.replicas, "shard": self.shards, "part": self.parts}
        return " × ".join(f"{n} {name}s" for name, n in sizes.items() if n > 1) or "one process"


@dataclass(frozen=True)
class Collective:
    """Alike collectives of an optimizer step.

    Args:
        kind: what they do.
        group: among which processes.
        carries: what of, such as "gradients".
        during: the pass that they can be hidden behind.
        nbytes: of all of them together, each counted as the whole tensor that the group has afterwards or has summed.
        calls: how many there are.
        micro_batches: in how many micro-batches of a step they take place.
    """

    kind: Kind
    group: Group
    carries: Carried
    during: Pass
    nbytes: int
    calls: int
    micro_batches: int

    def sent(self, layout: Layout) -> float:
        """Bytes that a process sends, and receives as many, in rings."""
        p = getattr(layout, self.group)
        return SHARES[self.kind] * (p - 1) / p * self.nbytes


class Exchanged(NamedTuple):
    """Activations that tensor parallelism sums in a micro-batch, whatever the number of parts."""

    forward: int
    """Bytes of partial outputs."""

    recomputed: int
    """Bytes of those that activation checkpointing computes once more in the backward pass."""

    backward: int
    """Bytes of partial gradients."""

    forward_calls: int
    """Sums of partial outputs."""

    recomputed_calls: int
    """Those that are done once more."""

    backward_calls: int
    """Sums of partial gradients."""


def collectives(
    module: nn.Module,
    layout: Layout,
    *,
    gathered: torch.dtype = torch.float32,
    reduced: torch.dtype = torch.float32,
    micro_batches: int = 1,
    exchanged: Exchanged | None = None,
) -> list[Collective]:
    """All collectives of an optimizer step.

    Args:
        module: what is trained; it may be on the meta device. Its net's ``blocks`` are sharded one by one.
        layout: the processes. One process makes no collectives.
        gathered: dtype in which FSDP2 gathers parameters.
        reduced: dtype of the gradients that are summed.
        micro_batches: that an optimizer step accumulates.
        exchanged: what tensor parallelism sums; needed where there are parts.

    Raises:
        ValueError: the heads or feed-forward layers cannot be split into so many parts.
    """
    found: list[Collective] = []
    if layout.sharded:
        found += _of_sharding(module, layout, gathered, reduced, micro_batches)
    elif layout.replicas > 1:
        gradients = reduced.itemsize * sum(p.numel() for p in module.parameters() if p.requires_grad)
        calls = math.ceil(gradients / BUCKET)
        found.append(Collective("all_reduce", "replicas", "gradients", "backward", gradients, calls, 1))
        buffers = sum(b.nbytes for b in module.buffers())
        if buffers:
            found.append(Collective("broadcast", "replicas", "buffers", "forward", buffers, 1, 1))
    if layout.parts > 1:
        if exchanged is None:
            raise ValueError(f"what the {layout.parts} tensor-parallel parts sum is not given; pass `exchanged`")
        found += _of_parts(exchanged, micro_batches)
    return found


def _of_parts(exchanged: Exchanged, micro_batches: int) -> Iterator[Collective]:
    sums: list[tuple[Pass, int, int]] = [
        ("forward", exchanged.forward, exchanged.forward_calls),
        ("backward", exchanged.recomputed, exchanged.recomputed_calls),
        ("backward", exchanged.backward, exchanged.backward_calls),
    ]
    for during, nbytes, calls in sums:
        if calls:
            n = micro_batches
            yield Collective("all_reduce", "parts", "activations", during, n * nbytes, n * calls, n)


def _of_sharding(
    module: nn.Module, layout: Layout, gathered: torch.dtype, reduced: torch.dtype, micro_batches: int
) -> Iterator[Collective]:
    shapes = split_shapes(module, layout.parts)
    groups = parameter_groups(module)
    parameters = [gathered.itemsize * padded(group, layout, shapes) for group in groups if group]
    blocks = parameters[: len(groups) - 1]  # the last is the root
    gradients = [reduced.itemsize * padded((p for p in g if p.requires_grad), layout, shapes) for g in groups]
    gradients = [nbytes for nbytes in gradients if nbytes]

    def all_of(kind: Kind, group: Group, carries: Carried, during: Pass, sizes: Sequence[int]) -> Iterator[Collective]:
        if sizes:
            n = micro_batches
            yield Collective(kind, group, carries, during, n * sum(sizes), n * len(sizes), n)

    if layout.shards > 1:
        yield from all_of("all_gather", "shards", "parameters", "forward", parameters)
        yield from all_of("all_gather", "shards", "parameters", "backward", blocks)
        yield from all_of("reduce_scatter", "shards", "gradients", "backward", gradients)
    if layout.replicas > 1:
        shards = [nbytes // layout.shards for nbytes in gradients]
        yield from all_of("all_reduce", "replicas", "gradients", "backward", shards)


def padded(parameters: Iterable[nn.Parameter], layout: Layout, shapes: Mapping[int, torch.Size]) -> int:
    """Numbers of the ``parameters`` of one part, with the rows that FSDP2 adds so that all shards are alike.

    Args:
        parameters: whole ones.
        layout: the processes.
        shapes: of those that are split into parts, as `split_shapes` gives them.
    """
    numbers = 0
    for parameter in parameters:
        rows, *others = shapes.get(id(parameter), parameter.shape)
        numbers += math.ceil(rows / layout.shards) * layout.shards * math.prod(others)
    return numbers


def parameter_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each block, and last those of the root: what is in no block. Each is there once."""
    blocks = list(getattr(getattr(module, "net", module), "blocks", None) or [])
    seen: set[int] = set()
    groups = []
    for part in (*blocks, module):
        own = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        groups.append(own)
    return groups


def split_shapes(module: nn.Module, parts: int) -> dict[int, torch.Size]:
    """The shapes of what one of ``parts`` tensor-parallel processes has of the parameters that are split, by their id.

    Raises:
        ValueError: the heads or a feed-forward layer cannot be split into so many parts.
    """
    found: dict[int, torch.Size] = {}
    if parts == 1:
        return found

    def split(parameter: Tensor | None, dim: int = 0) -> None:
        if parameter is not None:
            shape = list(parameter.shape)
            shape[dim] //= parts
            found[id(parameter)] = torch.Size(shape)

    for part in module.modules():
        if isinstance(part, FeedForward):
            hidden = part.w_1.out_features
            if hidden % parts:
                raise ValueError(f"the feed-forward width ({hidden}) must be a multiple of tensor_parallel ({parts})")
            split(part.w_1.weight)
            split(part.w_1.bias)
            split(part.w_2.weight, 1)
        elif isinstance(part, Attention) and not has_one_head(part):
            check_heads(part, parts)
            for projection in split_projections(part):
                split(projection.weight)
                split(projection.bias)
            for parameter in part.parameters(recurse=False):  # a row for each head
                split(parameter)
            split(part.w_o.weight, 1)
    return found


def can_split(module: nn.Module, parts: int) -> bool:
    """Whether all heads and feed-forward layers can be split into ``parts``."""
    try:
        split_shapes(module, parts)
    except ValueError:
        return False
    return True


def check_heads(attention: Attention, parts: int) -> None:
    """Raise a ValueError unless the heads of ``attention`` can be split into ``parts``."""
    if attention.n_heads % parts:
        raise ValueError(f"n_heads ({attention.n_heads}) must be a multiple of tensor_parallel ({parts})")
    for projection in split_projections(attention):
        heads = projection.out_features // attention.head_dim
        if heads % parts:
            raise ValueError(
                f"the {heads} heads of keys and values must be a multiple of tensor_parallel ({parts}), or one head"
            )


def has_one_head(attention: Attention) -> bool:
    """Whether one head is there for all, so that there is nothing to split."""
    with torch.no_grad():
        return attention.query(_one_token(attention)).shape[1] < attention.n_heads


def splits_context(attention: Attention) -> bool:
    """Whether parts have keys and values of their own, made of the context or cut out of it."""
    with torch.no_grad():
        return attention.key_value(_one_token(attention))[0].shape[1] > 1


def split_projections(attention: Attention) -> list[nn.Linear]:
    """Projections of an attention's inputs that have several heads, which the parts share out."""
    return [p for p in _projections(attention) if p.out_features > attention.head_dim]


def shared_projections(attention: Attention) -> list[nn.Linear]:
    """Projections of an attention's inputs to one head that all others use, which every part has."""
    return [p for p in _projections(attention) if p.out_features == attention.head_dim]


def _projections(attention: Attention) -> list[nn.Linear]:
    return [m for m in attention.children() if isinstance(m, nn.Linear) and m is not attention.w_o]


def _one_token(attention: Attention) -> Tensor:
    weight = attention.w_o.weight
    return torch.empty(1, 1, attention.width, dtype=weight.dtype, device=weight.device)
