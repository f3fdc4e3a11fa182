"""What autograd keeps between a forward and a backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def saved_storages(call: Callable[[], Tensor]) -> dict[int, int]:
    """Bytes of each storage that is kept for the backward pass of what ``call`` returns, by the storage's address."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()  # alive until all is counted, so that no storage is used again
    assert result.requires_grad
    return kept
