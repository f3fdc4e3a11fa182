"""Layers split over processes: columns first, rows after, and one sum at the end (Megatron-LM).

Source: Shoeybi et al. 2019, *Megatron-LM*, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def own_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process has; all of it where it is not split."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def split(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """``parameter``, which is the same on all processes, split along ``dim``; nothing is sent."""
    part = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def share(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x``, of which each process computes something else: its gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def add_up(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all processes' ``x``, on each of them; its gradient is the same for each."""
    total = DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return total.to_local(grad_placements=[Replicate()])


class ColumnLinear(nn.Linear):
    """A linear layer of whose outputs each process computes a part. Made by `split_columns`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, own_part(self.weight), None if self.bias is None else own_part(self.bias))


class RowLinear(nn.Linear):
    """A linear layer of whose inputs each process has a part; the outputs are summed. Made by `split_rows`."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return self.summed(F.linear(x, own_part(self.weight)))

    def summed(self, y: Tensor) -> Tensor:
        """The layer's outputs from each process's share of them."""
        y = add_up(y, self.mesh)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def split_columns(linear: nn.Module, mesh: DeviceMesh) -> None:
    """Split the outputs of a linear layer over ``mesh``, in place; its parameters keep their names."""
    assert isinstance(linear, nn.Linear)
    linear.weight = split(linear.weight, mesh, 0)
    if linear.bias is not None:
        linear.bias = split(linear.bias, mesh, 0)
    linear.__class__ = ColumnLinear


def split_rows(linear: nn.Module, mesh: DeviceMesh) -> None:
    """Split the inputs of a linear layer over ``mesh``, in place; its bias is added once, to the sum."""
    assert isinstance(linear, nn.Linear)
    linear.weight = split(linear.weight, mesh, 1)
    linear.__class__ = RowLinear
    linear.mesh = mesh  # type: ignore[assignment]
