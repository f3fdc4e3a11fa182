"""Processes that end with the one that made them, and to which signals are passed on."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Stopped(Exception):
    """A signal has ended the sweep.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Children:
    """Runs command lines, one at a time, each in a process that ends with this one."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None

    @contextmanager
    def passing_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C reach the child as SIGTERM, at which it saves its last step; a second one kills it.
        SIGUSR1 stays what it is, and the child asks SLURM to begin the job again."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        earlier = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        """Run ``python -m mhe_lightning`` with ``arguments``, what it prints being appended to ``log``.

        Raises:
            Stopped: by a signal, when the child has ended.
        """
        if self._stopped is not None:
            raise Stopped(self._stopped)
        command = [sys.executable, "-m", "mhe_lightning", *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which passes it on once
                preexec_fn=lambda: _end_with(parent),
            )
        if self._stopped is not None:  # while the child was being made
            self._pass_on(self._stopped)
        code = self._child.wait()
        self._child = None
        if self._stopped is not None:
            raise Stopped(self._stopped)
        return code

    def _on_signal(self, number: int, _: Any) -> None:
        again, self._stopped = self._stopped is not None, number
        if self._child is not None and again:
            self._child.kill()
        elif self._child is not None:
            print("\nstopping: the run saves its last step; once more to stop at once", file=sys.stderr, flush=True)
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        assert self._child is not None
        self._child.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent dies, even of SIGKILL; on Linux."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
