"""Faults on purpose: processes of the command line that are signalled, starved of disk or fed NaN at chosen places."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import io
import logging
import mmap
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

import mhe_lightning.verbs.train as train_verb
from mhe_lightning import cli
from mhe_lightning.callbacks import MetricsCSV
from mhe_lightning.tasks import LanguageModeling, Task

ALL = -1
"""Stands for all ranks."""

PLACES = (
    "start-up: before the trainer",
    "start-up: joining the group",
    "start-up: before the first batch",
    "step: before the optimizer",
    "step: metrics written",
    "validation",
    "checkpoint: half written",
    "checkpoint: before its rename",
    "checkpoint: before its checksum",
    "checkpoint: old one half removed",
    "end: before results.json",
)
"""Where a fault can be put; in the order in which a run comes by."""

RANK_ZERO_PLACES = tuple(place for place in PLACES if place.startswith(("step: metrics", "checkpoint", "end")))
"""Where only the first rank comes by; what hits the others hits them wherever they are then."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and where.

    Args:
        kind: "SIGKILL", "SIGTERM", "SIGTERM to the group", "full disk", "dead data worker" or "NaN".
        place: one of `PLACES`, or "any time" for ``after`` seconds.
        nth: at which passage of the place, from 1.
        rank: the rank that is hit, or `ALL`.
        after: seconds after the start at which it happens.
        free: bytes that a full disk has left.
    """

    kind: str
    place: str
    nth: int = 1
    rank: int = 0
    after: float = 0.0
    free: int = 0


@dataclass
class Processes:
    """The ranks of one run, each the leader of a session of its own."""

    ranks: list[ForkProcess]
    begun: float

    @property
    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    def send(self, number: int, rank: int, *, group: bool = False) -> None:
        for process in self.ranks if rank == ALL else [self.ranks[rank]]:
            if process.pid is not None and process.is_alive():
                (os.killpg if group else os.kill)(process.pid, number)

    def left_over(self) -> list[int]:
        """Processes that live on in the ranks' sessions."""
        sessions = {process.pid for process in self.ranks}
        return [pid for pid, stat in _processes() if stat.session in sessions and stat.state != "Z"]


def start(args: Sequence[str], *, ranks: int, log: Path, fault: Fault | None, stacks_after: float = 100.0) -> Processes:
    """Run the command line in forked processes, as torchrun would start them; a fault at a place is put into them."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    pids = mmap.mmap(-1, 8 * ranks)  # shared by the ranks
    children = []
    begun = time.monotonic()
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "faults",
        }
        child = context.Process(
            target=_child, args=(list(args), environment if ranks > 1 else {}, log, fault, rank, pids, stacks_after)
        )
        child.start()
        children.append(child)
    return Processes(children, begun)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def fill(folder: Path, free: int) -> None:
    """Fill the file system of ``folder`` but for about ``free`` bytes."""
    with open(folder / "filler", "ab") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, os.path.getsize(file.name) - free))


def _child(
    args: list[str],
    environment: dict[str, str],
    log: Path,
    fault: Fault | None,
    rank: int,
    pids: mmap.mmap,
    stacks_after: float,
) -> None:
    os.setsid()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the parent's threads are not forked: a parallel operation would wait for them
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    for logger in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(logger).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    faulthandler.dump_traceback_later(stacks_after, file=2)
    pids[8 * rank : 8 * rank + 8] = struct.pack("q", os.getpid())
    if fault is not None and fault.place != "any time" and fault.rank in (rank, ALL):
        comes_alone = fault.place in RANK_ZERO_PLACES
        _put(fault, lambda: _happen(fault, pids if comes_alone and fault.rank == ALL else None, args))
    cli.main(args)


def _happen(fault: Fault, pids: mmap.mmap | None, args: list[str]) -> None:
    """The fault itself, in the process that it hits."""
    if fault.kind == "full disk":
        fill(Path(args[args.index("--trainer.default_root_dir") + 1]), fault.free)
        return
    if fault.kind == "dead data worker":
        workers = [pid for pid, stat in _processes() if stat.parent == os.getpid()]
        os.kill(workers[0], signal.SIGKILL)
        return
    number = signal.SIGKILL if fault.kind == "SIGKILL" else signal.SIGTERM
    everyone = [] if pids is None else list(struct.unpack(f"{len(pids) // 8}q", pids[:]))
    others = [pid for pid in everyone if pid not in (0, os.getpid())]
    if fault.kind != "SIGTERM to the group":
        for pid in [*others, os.getpid()]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, number)
        return
    sender = os.fork()  # as from a scheduler: not from the parent of the data workers
    if sender == 0:
        os.setsid()
        for pid in [*others, os.getppid()]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
        os._exit(0)
    os.waitpid(sender, 0)


def _put(fault: Fault, happen: Callable[[], None]) -> None:
    """Make the ``nth`` passage of the fault's place one at which it happens."""
    passages = 0

    def passing() -> None:
        nonlocal passages
        passages += 1
        if passages == fault.nth:
            happen()

    match fault.place:
        case "start-up: before the trainer":
            _before(train_verb.TrainCLI, "instantiate_trainer", passing)
        case "start-up: joining the group":
            _before(dist, "init_process_group", passing)
        case "start-up: before the first batch":
            _before(Trainer, "_run_stage", passing)
        case "step: before the optimizer":
            if fault.kind == "NaN":
                _poison(fault.nth)
            else:
                _before(Task, "on_before_optimizer_step", passing)
        case "step: metrics written":
            _after(MetricsCSV, "write", passing)
        case "validation":
            _before(LanguageModeling, "validation_step", passing)
        case "checkpoint: half written":
            _halve(passing)
        case "checkpoint: before its rename":
            for rename in ("replace", "rename"):  # of a file, of the folder of a sharded one
                _before(os, rename, passing, lambda source, target: str(target).endswith(".ckpt"))
        case "checkpoint: before its checksum":
            _after(os, "replace", passing, lambda source, target: str(target).endswith(".ckpt"))
            _before(os, "replace", passing, lambda source, target: str(target).endswith("manifest.json"))
        case "checkpoint: old one half removed":
            _before(Path, "unlink", passing, lambda path, **_: path.suffix == ".ckpt")
            _before(shutil, "rmtree", passing, lambda path, **_: str(path).endswith(".ckpt.tmp") and path.exists())
        case "end: before results.json":
            _before(os, "replace", passing, lambda source, target: str(target).endswith("results.json"))
        case _:
            raise ValueError(f"place ({fault.place!r}) must be one of {', '.join(PLACES)}")


def _before(owner: Any, name: str, act: Callable[[], None], when: Callable[..., bool] = lambda *_, **__: True) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            act()
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, act: Callable[[], None], when: Callable[..., bool] = lambda *_, **__: True) -> None:
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        if when(*args, **kwargs):
            act()
        return result

    setattr(owner, name, wrapped)


def _halve(act: Callable[[], None]) -> None:
    """Act when half of a checkpoint's bytes are in its file."""
    inner = torch.save

    def save(content: Any, file: Any, **kwargs: Any) -> None:
        buffer = io.BytesIO()
        inner(content, buffer, **kwargs)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        act()
        file.write(data[len(data) // 2 :])

    torch.save = save  # type: ignore[assignment]


def _poison(nth: int) -> None:
    """Make the loss of the ``nth`` micro-batch NaN, and with it the gradients."""
    inner = Task.accumulate
    passages = 0

    def accumulate(self: Task, loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal passages
        passages += 1
        return inner(self, loss * float("nan") if passages == nth else loss, *args, **kwargs)

    Task.accumulate = accumulate  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    session: int


def _processes() -> list[tuple[int, _Stat]]:
    """The processes of this machine by number."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has ended
                continue
            found.append((int(folder.name), _Stat(state, int(parent), int(session))))
    return found
