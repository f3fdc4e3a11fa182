"""How training is spread over processes, where Lightning's own strategies do not suffice."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchmetrics import Metric

from mhe_lightning import sharded_checkpoint
from mhe_lightning.checkpoint import read_checkpoint
from mhe_lightning.distributed import MeshSizes, data_parallel, mesh_sizes, new_control_group, new_mesh
from mhe_lightning.sharded_checkpoint import OPTIMIZERS, STATE


class Sharded(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2), hybrid sharding and tensor parallelism, on GPUs and on CPUs (gloo).

    Args:
        shard: processes that a model is sharded over; fewer than there are make replicas of it (hybrid sharding, for
            the processes of a host, say). Null is all that `tensor_parallel` leaves.
        tensor_parallel: neighbouring processes that divide each block's heads and hidden units among them and see the
            same rows. Best within a host: they exchange activations in every block.
        asynchronous_checkpoints: whether training goes on while a checkpoint is written.
        timeout_minutes: after which a process that waits for another gives up.
        process_group_backend: such as "nccl" or "gloo"; that of the device if not given.

    Raises:
        ValueError: the sizes do not divide the processes.
    """

    def __init__(
        self,
        shard: int | None = None,
        tensor_parallel: int = 1,
        asynchronous_checkpoints: bool = True,
        timeout_minutes: float = 30.0,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size=1,  # both are set when the number of processes is known
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.shard = shard
        self.tensor_parallel = tensor_parallel
        self.asynchronous_checkpoints = asynchronous_checkpoints
        self._writing: Future[Any] | None = None
        self._group: Any = None

    @property
    def sizes(self) -> MeshSizes:
        """How the processes are laid out.

        Raises:
            ValueError: `shard` or `tensor_parallel` does not divide them.
        """
        return mesh_sizes(
            world_size=self.num_nodes * self.num_processes, shard=self.shard, tensor_parallel=self.tensor_parallel
        )

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        offloads = self.root_device.type == "cuda" and self.lightning_module.offload
        if offloads and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # gradients are summed on both
        replicate, shard, self._tensor_parallel_size = self.sizes
        self._data_parallel_size = replicate * shard
        super().setup_environment()
        self._device_mesh = new_mesh(self.root_device.type, self.sizes)
        self.lightning_module._device_mesh = self._device_mesh
        self._group = new_control_group(self._timeout)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        replicas = data_parallel(self.device_mesh)
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    def model_to_device(self) -> None:
        """What is sharded is where it belongs, perhaps on the CPU; the rest goes to the device."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, Metric):
                module.to(self.root_device)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    # Checkpoints: a folder, of which each process writes its part

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options ({storage_options})")
        self.finish_saving()
        path = Path(self.broadcast(filepath))
        self._writing = sharded_checkpoint.save(
            checkpoint, path, self._group, ties=self._ties(), wait=not self.asynchronous_checkpoints
        )

    def _ties(self) -> dict[str, str]:
        """The names of parameters that are others too → the first name of each."""
        assert self.lightning_module is not None
        first: dict[int, str] = {}
        names = [(n, id(p)) for n, p in self.lightning_module.named_parameters(remove_duplicate=False)]
        return {name: first[number] for name, number in names if first.setdefault(number, name) != name}

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; what went wrong with it is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def on_exception(self, exception: BaseException) -> None:
        """Tell what went wrong with a checkpoint in the background; others may be gone, so it is not waited for."""
        if self._writing is not None and self._writing.done() and (error := self._writing.exception()) is not None:
            rank_zero_warn(f"the last checkpoint was not written: {error}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        sharded = sharded_checkpoint.is_sharded(path)
        checkpoint = sharded_checkpoint.read_rest(path) if sharded else read_checkpoint(path)
        states: dict[str, Any] = {STATE: self.lightning_module_state_dict(), OPTIMIZERS: []}
        if OPTIMIZERS in checkpoint:
            states[OPTIMIZERS] = [
                _empty_state(optimizer, found)
                for optimizer, found in zip(self.optimizers, checkpoint[OPTIMIZERS], strict=bool(self.optimizers))
            ]
        if missing := states[STATE].keys() ^ checkpoint[STATE].keys():
            raise ValueError(
                f"{path} is of another model: only one of them has {', '.join(sorted(missing))}; go on with the config "
                "that it was trained with"
            )
        found = {place: holder[key] for place, holder, key in sharded_checkpoint.places(checkpoint)}
        tied = {f"{STATE}/{name}" for name in self._ties()}
        spread: dict[str, Tensor] = {}
        for place, holder, key in sharded_checkpoint.places(states):
            if place in tied:  # with the one that it is tied to
                continue
            if found[place] is None:
                spread[place] = holder[key]
            elif isinstance(holder[key], Tensor):
                sharded_checkpoint.place_in(holder[key].detach(), found[place])
            else:
                holder[key] = found[place]
        if sharded:
            sharded_checkpoint.read_into(path, spread)
        for optimizer, state in zip(self.optimizers, states[OPTIMIZERS], strict=False):
            optimizer.load_state_dict(state)
        return checkpoint


def _empty_state(optimizer: Optimizer, like: dict[str, Any]) -> dict[str, Any]:
    """A state of ``optimizer`` to be filled: of the form of ``like``, laid out as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: torch.zeros_like(parameters[index].detach()) if _is_spread(value, parameters[index]) else value
            for name, value in values.items()
        }
        for index, values in like["state"].items()
    }
    return {**like, "state": state}


def _is_spread(value: Any, parameter: Tensor) -> bool:
    """Whether a value of a checkpoint's optimizer state belongs to the numbers of a parameter one by one."""
    return value is None or (
        isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape
    )
