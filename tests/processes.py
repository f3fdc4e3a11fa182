"""Run the command line in forked processes: as real as a launcher's, without importing everything again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from mhe_lightning.cli import main


class KillAt(Callback):
    """SIGKILLs its process in the middle of a step: after the micro-batch, before the rest of its hooks.

    Args:
        micro_batch: the micro-batch to die in, counted in this process.
    """

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.micro_batch:
            os.kill(os.getpid(), signal.SIGKILL)


class SignalAt(Callback):
    """Sends a signal to its own process before a micro-batch.

    Args:
        micro_batch: the micro-batch, counted in this process.
        number: the signal.
    """

    def __init__(self, micro_batch: int, number: int) -> None:
        self.micro_batch = micro_batch
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.micro_batch:
            os.kill(os.getpid(), self.number)


def run(args: Sequence[str], *, ranks: int = 1, log: Path | None = None) -> list[int]:
    """`train.py` with ``args`` on ``ranks`` processes, as torchrun would start them; their exit codes."""
    context = multiprocessing.get_context("fork")
    port = _free_port()
    children = []
    for rank in range(ranks):
        environment = {}
        if ranks > 1:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }
        child = context.Process(target=_child, args=(list(args), environment, log))
        child.start()
        children.append(child)
    for child in children:
        child.join(timeout=240)
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def group(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """``function(*args)`` in each of a group of forked processes (gloo); what it returned, by rank.

    Raises:
        AssertionError: it failed in one of them.
    """
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    port = _free_port()
    children = [context.Process(target=_member, args=(function, r, ranks, port, args, results)) for r in range(ranks)]
    for child in children:
        child.start()
    answers = dict(results.get() for _ in children)
    for child in children:
        child.join()
    failed = {rank: answer for rank, (ok, answer) in answers.items() if not ok}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
    return [answers[rank][1] for rank in range(ranks)]


def _member(function, rank, ranks, port, args, results) -> None:
    _leave_threads_behind()
    try:
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
        dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
        answer = (True, function(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    results.put((rank, answer))


def _leave_threads_behind() -> None:
    """The parent's threads are not forked: whatever needs them would wait for ever."""
    torch.set_num_threads(1)
    compiler: Any = sys.modules.get("torch._inductor.config")
    if compiler is not None:
        compiler.compile_threads = 1  # none but this one: its pool may be the parent's


def _child(args: list[str], environment: dict[str, str], log: Path | None) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    _leave_threads_behind()
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    main(args)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
