"""Data workers that end with their trainer: not before it, not after it, and not without a word."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from torch.utils.data import DataLoader

ENDING = (signal.SIGTERM, signal.SIGINT)

KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")
"""Whether this system tells who has sent a signal; without, workers heed everyone."""

_started: dict[int | None, BaseProcess] = {}
"""The children of this process by their numbers: PyTorch does not always say how a worker ended."""

Row = TypeVar("Row", covariant=True)


class Loader(DataLoader[Row]):
    """A `DataLoader` whose workers are given ``worker_init_fn=heed_parent_only``, and start with signals held back."""

    def __iter__(self) -> Any:
        batches = self._begin()
        _started.update({process.pid: process for process in multiprocessing.active_children()})
        return batches

    def _begin(self) -> Any:
        if self.num_workers == 0 or not KNOWS_SENDERS or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        # workers inherit what is blocked: none may die of a signal before it has made itself deaf to it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def heed_parent_only(worker: int) -> None:
    """Let a data worker end at SIGTERM and SIGINT only where they come from its trainer.

    Many tools signal the whole process group or control group. The trainer then finishes and saves its step, for which
    it may need the next batch; it tells its workers itself when they may go. (They also go when it is gone: PyTorch's
    workers look after it every few seconds.)

    Args:
        worker: its number; it does not matter here.
    """
    if not KNOWS_SENDERS:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    threading.Thread(target=_await_parents_signal, name="signals", daemon=True).start()


def _await_parents_signal() -> None:
    while signal.sigwaitinfo(ENDING).si_pid != os.getppid():
        pass
    os._exit(0)


def dead_worker(error: BaseException) -> str | None:
    """What to tell of an error that PyTorch raises when a data worker has died; None for any other."""
    text = f"{error} {error.__cause__}"  # that a worker was killed may be the cause of its having "exited unexpectedly"
    if (killed := re.search(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]*)", text)) is not None:
        number, name = killed[1], killed[2].strip()
        return f"data worker {number} was killed by signal: {name}; {_reason(name)}; {_REMEDY}"
    gone = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly", text)
    if gone is None:
        return None
    for number in gone[1].split(", "):
        code = _started[int(number)].exitcode if int(number) in _started else None
        if code is not None and code < 0:
            name = signal.strsignal(-code) or f"number {-code}"
            return f"data worker {number} was killed by signal: {name}; {_reason(name)}; {_REMEDY}"
    return f"data worker {gone[1]} has ended by itself; what it wrote is above; {_REMEDY}"


def _reason(name: str) -> str:
    if name.startswith("Killed"):
        return "most likely the host ran out of memory (see `dmesg`): lower data.num_workers"
    if name.startswith("Bus error"):
        return "most likely /dev/shm is full: give the container more (docker --shm-size), or lower data.num_workers"
    if name.startswith("Terminated"):
        return "someone has terminated it"
    return "a library in it has crashed: set data.num_workers 0 to see where"


_REMEDY = "the newest checkpoint stays: go on with --ckpt_path auto"
