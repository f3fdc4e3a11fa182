"""How a model is laid out for training, block by block, and the small collectives between its processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from mhe_lightning.attention.tensor_parallel import own_part as own_part
from mhe_lightning.deferred import Deferred

ActivationCheckpointing = bool | Literal["selective"]

REPLICATE, SHARD, TENSOR_PARALLEL = "replicate", "shard", "tensor_parallel"
"""Dimensions of a mesh of processes: replicas × shards of each × the parts of a block, the last next to each other."""

ENTRIES = ("training_step", "validation_step", "test_step", "predict_step")
"""Methods of a task that run its net."""


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    compile: bool = False,
    activation_checkpointing: ActivationCheckpointing = False,
    param_dtype: torch.dtype | None = None,
    offload: bool = False,
    deferred: Deferred | None = None,
) -> None:
    """Lay ``model`` out in place: nothing of it is computed otherwise. Calling it again changes nothing more.

    Over the processes of a mesh, heads and hidden units are split (tensor parallelism), then the parameters of each
    block, and of the rest together, are sharded (fully sharded data parallelism; FSDP2). A block is gathered when it
    is needed, forward and backward; the rest (embeddings, the last norm, heads) from its first use to the end of the
    backward pass.

    Args:
        model: a task with a ``net``, or a net: it has ``blocks``, its repeated layers, and a ``checkpoint_activations``
            switch.
        mesh: as `new_mesh` makes it; None for one process, and where gradients alone are exchanged (DDP).
        compile: compile each block in place, so that parameter names stay as they are.
        activation_checkpointing: compute each block again in the backward pass; "selective" all of it but matrix
            products and attention.
        param_dtype: in which blocks are gathered and computed, where it is not that of the parameters; gradients are
            summed in float32. With a mesh only.
        offload: keep parameters, gradients and the optimizer's state in the CPU's memory. With a mesh only.
        deferred: what fills the model, block by block, if it was built without memory.

    Raises:
        ValueError: the model does not offer what is asked for.
    """
    if isinstance(model, FSDPModule):
        return
    net = getattr(model, "net", model)
    blocks = _blocks(net, compile=compile, activation_checkpointing=activation_checkpointing, mesh=mesh)
    if offload and (mesh is None or mesh.device_type == "cpu"):
        raise ValueError(
            "offload (true) keeps a model on the CPU that is trained on GPUs, by a strategy that shards it, such as "
            "configs/strategy/fsdp.yaml; leave it false here"
        )
    tensor_mesh = None if mesh is None or mesh[TENSOR_PARALLEL].size() == 1 else mesh[TENSOR_PARALLEL]
    for block in blocks:
        if deferred is not None:
            deferred.materialize(block)
        if tensor_mesh is not None:
            block.parallelize(tensor_mesh)  # type: ignore[operator]
        if compile:
            block.compile()
        if mesh is not None:
            _shard(block, mesh, param_dtype, offload, keep=False)
    if deferred is not None:
        deferred.materialize(model)
    if mesh is not None:
        _shard(model, mesh, param_dtype, offload, keep=True)
        for name in ENTRIES:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)


def _blocks(
    net: nn.Module, *, compile: bool, activation_checkpointing: ActivationCheckpointing, mesh: DeviceMesh | None
) -> Iterable[nn.Module]:
    if activation_checkpointing not in (False, True, "selective"):
        raise ValueError(f"activation_checkpointing ({activation_checkpointing!r}) must be false, true or 'selective'")
    blocks: Iterable[nn.Module] | None = getattr(net, "blocks", None)
    if blocks is None:
        needed = "compile" if compile else "a sharded model" if mesh is not None else None
        if needed is not None:
            raise ValueError(f"{needed}: {type(net).__name__} has no `blocks`, the layers to lay out one by one")
        blocks = ()
    if activation_checkpointing:
        if not hasattr(net, "checkpoint_activations"):
            raise ValueError(f"activation_checkpointing: {type(net).__name__} has no `checkpoint_activations` switch")
        net.checkpoint_activations = activation_checkpointing  # type: ignore[assignment]
    return blocks


def _shard(module: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype | None, offload: bool, *, keep: bool) -> None:
    """Shard what is not sharded yet of ``module``; with ``keep`` it stays gathered between forward and backward."""
    fully_shard(
        module,
        mesh=mesh[REPLICATE, SHARD] if mesh[REPLICATE].size() > 1 else mesh[SHARD],
        reshard_after_forward=not keep,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=None if param_dtype is None else torch.float32,
            cast_forward_inputs=False,
        ),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
    )


def gather(model: nn.Module) -> None:
    """Gather all that is sharded of ``model`` until `release`, so that what runs is free of collectives.

    For evaluation, where each rank runs its net as often as its own rows need. A collective call.
    """
    if not isinstance(model, FSDPModule):
        return
    with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
        model._get_fsdp_state()._lazy_init()  # whoever runs first becomes the root: a block, where a net is run alone
        for module in _sharded(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def release(model: nn.Module) -> None:
    """Undo `gather`."""
    for module in _sharded(model):
        module.set_reshard_after_forward(id(module) != id(model), recurse=False)
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar that is equal on all ranks; a collective call if they are spread.

    Those of one layout are taken together: torch has no norm over several.
    """
    layouts: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        layout = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        layouts.setdefault(layout, []).append(gradient)
    norms = [_whole(nn.utils.get_total_norm(group)) for group in layouts.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class MeshSizes(NamedTuple):
    """Processes along each dimension of a mesh: `REPLICATE`, `SHARD` and `TENSOR_PARALLEL`."""

    replicate: int
    shard: int
    tensor_parallel: int


def mesh_sizes(*, world_size: int, shard: int | None, tensor_parallel: int) -> MeshSizes:
    """How a number of processes is laid out.

    Args:
        world_size: number of processes.
        shard: processes that a model is sharded over; fewer than there are give replicas of them (hybrid sharding).
            None is all.
        tensor_parallel: processes that divide the heads and hidden units of a block among them.

    Raises:
        ValueError: the sizes do not divide the processes.
    """
    for name, size in (("tensor_parallel", tensor_parallel), ("shard", shard)):
        if size is not None and size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    if world_size % tensor_parallel:
        raise ValueError(f"tensor_parallel ({tensor_parallel}) must divide the {world_size} processes")
    others = world_size // tensor_parallel
    if shard is not None and others % shard:
        raise ValueError(
            f"shard ({shard}) must divide {others}, the {world_size} processes / tensor_parallel ({tensor_parallel})"
        )
    return MeshSizes(1 if shard is None else others // shard, others if shard is None else shard, tensor_parallel)


def new_mesh(device_type: str, sizes: MeshSizes) -> DeviceMesh:
    """The processes as a mesh; ``device_type`` is such as "cuda" or "cpu"."""
    return dist.init_device_mesh(device_type, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR_PARALLEL))


def data_parallel(mesh: DeviceMesh) -> DeviceMesh:
    """The processes that see other rows than this one, and this one: replicas and shards in one dimension."""
    return mesh[REPLICATE, SHARD]._flatten("data_parallel")  # made once


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def new_control_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """A group of all processes for what they say to each other on the CPU, so that no device is waited for.

    None in one process; a collective call in several. ``timeout`` is torch's default, half an hour, if not given.
    """
    if not is_distributed():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def all_reduce_sum(values: Tensor) -> Tensor:
    """``values`` summed over all ranks; as they are in one process."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def gather_rows(rows: dict[int, Any]) -> list[Any]:
    """What all ranks have by row number, each row once, in the order of the numbers; equal on all ranks.

    Negative numbers stand for no row and are left out.
    """
    if is_distributed():
        gathered: list[dict[int, Any]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, rows)
        rows = {number: row for part in gathered for number, row in part.items()}
    return [rows[number] for number in sorted(rows) if number >= 0]
