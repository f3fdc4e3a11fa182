"""What an exception means for a run of several processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

LESS_MEMORY = (
    "lower data.batch_size and raise trainer.accumulate_grad_batches as many times, or set "
    "--model.activation_checkpointing true"
)
"""Ways to need less memory that train the same model."""

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_COLLATERAL = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "Socket ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a device's, or what the host gives this process."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_collateral(error: BaseException) -> bool:
    """Whether a process has failed because it lost the others, rather than by itself."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _COLLATERAL)


def described(error: BaseException) -> str:
    """An exception in a line, with the remedy if there is one."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"out of memory ({text}); {LESS_MEMORY}" if is_out_of_memory(error) else text
