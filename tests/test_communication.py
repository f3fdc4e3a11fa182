"""What a step is said to send, against what torch's strategies do send: a mode records every collective."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention.oracle import VARIANTS
from mhe_lightning.communication import Layout, collectives
from mhe_lightning.models import Decoder, EncoderDecoder
from processes import _free_port

V, T, N, D = 37, 8, 4, 16  # N heads of 4
KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
}


class Traffic(TorchDispatchMode):
    """Records the collectives of its process: kind → bytes of the whole tensors, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = next((kind for name, kind in KINDS.items() if name in func.__name__.replace("all_", "all")), None)
            if kind is not None:
                tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
                self.nbytes[kind] += max(t.nbytes for t in tensors)  # a gathered one's result, a scattered one's input
                self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended(world_size: int) -> Iterator[None]:
    """A process group of which this process is the first; what it sends reaches nobody."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def decoder(variant: str) -> Decoder:
    return Decoder(V, VARIANTS[variant].build, width=D, n_heads=N, n_layers=3, max_length=T, dropout=0.0)


def backward(net: nn.Module) -> None:
    net.loss(net(torch.randint(V, (2, T))), torch.randint(V, (2, T))).backward()


def stated(found) -> tuple[dict[str, int], dict[str, int]]:
    nbytes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for one in found:
        nbytes[one.kind] += one.nbytes
        calls[one.kind] += one.calls
    return dict(nbytes), dict(calls)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "layout", [Layout.of_shards(p, s) for p, s in ((8, 8), (8, 4), (64, 8), (64, 64), (1024, 8), (1024, 1024))], ids=str
)
@pytest.mark.parametrize("variant", ["mha", "mhe_add", "sha"])
def test_sharding_sends_what_is_stated(variant, layout, mixed):
    net = decoder(variant)
    gathered = torch.bfloat16 if mixed else torch.float32
    expected = stated(collectives(net, layout, gathered=gathered, micro_batches=2))
    with pretended(layout.world_size):
        sizes, names = (layout.replicas, layout.shards), ("replicas", "shards")
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        if layout.replicas == 1:
            mesh = mesh["shards"]
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if mixed
            else MixedPrecisionPolicy()
        )
        for block in net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        with Traffic() as traffic:
            for _ in range(2):
                backward(net)
    assert (dict(traffic.nbytes), dict(traffic.calls)) == expected
    assert expected[0]["all_gather"] > 0


def test_a_matrix_with_fewer_rows_than_shards_is_gathered_as_if_it_had_as_many():
    net = nn.Linear(D, 4, bias=False)
    found = collectives(net, Layout.of_shards(64), gathered=torch.float32)
    assert {one.nbytes for one in found} == {64 * D * 4}


class Loss(nn.Module):
    """A net's loss as its output, for what wraps modules; the net has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = EncoderDecoder(V, VARIANTS["mhe_add"].build, width=D, n_heads=N, n_layers=2, max_length=T)

    def forward(self, tokens):
        return self.net.loss(self.net(tokens, tokens), tokens)


def replicate(rank: int, port: int, out: Path) -> None:
    """Two optimizer steps of three micro-batches on one of two processes; the second step's traffic goes to ``out``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    replica = DistributedDataParallel(Loss())
    for _ in range(3):  # the buckets are laid out anew after the first
        with Traffic() as traffic:
            for i in range(3):
                with replica.no_sync() if i < 2 else nullcontext():
                    replica(torch.randint(V, (2, T))).backward()
    if rank == 0:
        torch.save((dict(traffic.nbytes), dict(traffic.calls)), out)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_data_parallelism_sends_gradients_and_buffers_once_a_step(tmp_path):
    context, port, out = multiprocessing.get_context("fork"), _free_port(), tmp_path / "traffic"
    children = [context.Process(target=replicate, args=(rank, port, out)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0, 0]
    expected = stated(collectives(Loss(), Layout(replicas=2), gathered=torch.float32, micro_batches=3))
    assert torch.load(out) == expected
    assert set(expected[0]) == {"all_reduce", "broadcast"}


def test_rings_send_twice_what_they_sum_and_once_what_they_gather():
    net = nn.Linear(D, 64, bias=False)
    by_kind = {
        one.kind: one.sent(Layout.of_shards(8)) for one in collectives(net, Layout.of_shards(8), gathered=torch.float32)
    }
    assert by_kind["all_gather"] == by_kind["reduce_scatter"] == 7 / 8 * D * 64 * 4
    (summed,) = collectives(net, Layout(replicas=8), gathered=torch.float32)
    assert summed.sent(Layout(replicas=8)) == 2 * by_kind["all_gather"]
