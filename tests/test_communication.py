"""What a step is said to send, against what torch's strategies do send: a mode records every collective."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention.oracle import VARIANTS
from mhe_lightning.communication import Layout, can_split, collectives, padded, split_shapes
from mhe_lightning.distributed import MeshSizes, new_mesh, parallelize
from mhe_lightning.models import Decoder, EncoderDecoder
from mhe_lightning.tracing import count_flops
from processes import _free_port
from test_tracing import TASKS, step_of

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
def laid_out(model: nn.Module, layout: Layout, dtype: torch.dtype, checkpointing: bool | str = False) -> Iterator[None]:
    """``model`` as the first process of ``layout`` has it; the others are pretended, and nothing reaches them."""
    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        mesh = new_mesh("cpu", MeshSizes(layout.replicas, layout.shards, layout.parts))
        param_dtype = None if dtype == torch.float32 else dtype
        parallelize(model, mesh, activation_checkpointing=checkpointing, param_dtype=param_dtype)
        yield
    finally:
        dist.destroy_process_group()


def decoder(variant: str) -> Decoder:
    return Decoder(V, VARIANTS[variant].build, width=D, n_heads=N, n_layers=3, max_length=T, dropout=0.0)


def stated(found) -> tuple[dict[str, int], dict[str, int]]:
    nbytes: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for one in found:
        nbytes[one.kind] += one.nbytes
        calls[one.kind] += one.calls
    return dict(nbytes), dict(calls)


LAYOUTS = [Layout.of_shards(*sizes) for sizes in ((8, 8), (8, 4), (64, 8), (64, 64), (1024, 8), (1024, 1024))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", ["mha", "mhe_add", "sha"])
def test_sharding_sends_what_is_stated_at_every_size(variant, layout, dtype):
    net = decoder(variant)
    expected = stated(collectives(net, layout, gathered=dtype, micro_batches=2))
    with laid_out(net, layout, dtype), Traffic() as traffic:
        for _ in range(2):
            net.loss(net(torch.randint(V, (2, T))), torch.randint(V, (2, T))).backward()
    assert (dict(traffic.nbytes), dict(traffic.calls)) == expected
    assert expected[0]["all_gather"] > 0


BF16 = {"autocast": torch.bfloat16, "dtype": torch.bfloat16}
CASES = [
    *(pytest.param("decoder", variant, (4, None, 2), {}, id=variant) for variant in VARIANTS),
    *(pytest.param(task, "mhe_add", (4, None, 2), {}, id=task) for task in TASKS if task != "decoder"),
    pytest.param("translation", "mqa", (4, None, 2), {}, id="across, one head of keys"),
    pytest.param("translation", "el", (8, 2, 2), {}, id="across, slices, hybrid"),
    pytest.param("decoder", "mha", (4, 1, 4), {}, id="parts alone"),
    pytest.param("decoder", "mha", (1024, 8, 4), {}, id="1,024 processes"),
    pytest.param("decoder", "mha", (4, None, 2), {"checkpointing": True}, id="recomputed"),
    pytest.param("decoder", "mhe_multiply", (4, None, 2), {"checkpointing": "selective"}, id="kept"),
    pytest.param("decoder", "mqa", (4, None, 2), BF16, id="bf16"),
    pytest.param("decoder", "mhe_add", (4, None, 2), {**BF16, "checkpointing": True}, id="bf16, recomputed"),
]


@pytest.mark.parametrize(("kind", "variant", "sizes", "settings"), CASES)
def test_a_laid_out_task_sends_computes_and_holds_what_is_stated(kind, variant, sizes, settings):
    layout = Layout.of_shards(*sizes)
    dtype, autocast = settings.get("dtype", torch.float32), settings.get("autocast")
    step = step_of(kind, variant, **settings)
    task = step_of(kind, variant, **{**settings, "dtype": torch.float32}).make_task().train()
    expected = stated(collectives(task, layout, gathered=dtype, exchanged=step.exchanged()))
    numbers = padded(task.parameters(), layout, split_shapes(task, layout.parts))
    with (
        laid_out(task, layout, dtype, settings.get("checkpointing", False)),
        Traffic() as traffic,
        count_flops() as flops,
    ):
        assert sum(p.to_local().untyped_storage().nbytes() for p in task.parameters()) == numbers // layout.shards * 4
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
            loss = task.training_step(step.batch, 0)
        loss.backward()
    assert (dict(traffic.nbytes), dict(traffic.calls)) == expected
    assert flops.get_total_flops() == replace(step, parts=layout.parts).flops().training


@pytest.mark.parametrize("variant", ["mha", "mhe_add"])
def test_parts_save_memory(variant):
    whole, part = step_of("decoder", variant), step_of("decoder", variant, parts=2)
    assert part.memory().kept < 0.8 * whole.memory().kept


def test_heads_that_share_projections_have_less_to_sum():
    """The gradients of three projections to d numbers instead of that of an input of n·d."""
    many, shared, one = (step_of("decoder", variant).exchanged() for variant in ("mha", "mhe_add", "sha"))
    assert many.forward == shared.forward
    feed_forward = one.backward  # which is all that is split where there is one head
    n = 4
    assert (shared.backward - feed_forward) * n == 3 * (many.backward - feed_forward)


@pytest.mark.parametrize(
    ("variant", "parts", "message"),
    [("mha", 3, "n_heads"), ("gqa2", 4, "heads of keys and values"), ("sha", 5, "feed-forward width")],
)
def test_what_cannot_be_split_is_refused(variant, parts, message):
    with pytest.raises(ValueError, match=message):
        split_shapes(decoder(variant), parts)
    assert not can_split(decoder(variant), parts)


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
