"""SIGTERM and SIGUSR1: the last step is saved, then a run ends; a cluster's scheduler may begin it again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a run; SIGUSR1 is what SLURM is asked to send before a job's time is over."""


class EndSignals:
    """The signals of this process: before training they end it at once; in training, when a step is saved.

    After the last step they change nothing: what is left is to write the results.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.training = False
        """Whether a signal waits for the end of a step."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, with none received at first."""
        self.received, self.training = None, False
        if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in ENDING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal waits for whoever asks `agreed` after each step."""
        self.training = True
        if self.received is not None:  # while the training was being set up, and swallowed there
            raise SIGTERMException

    def agreed(self, group: dist.ProcessGroup | None) -> bool:
        """Whether any rank has received a signal; equal on all ranks of ``group``, and a collective call among them."""
        number = 0 if self.received is None else ENDING.index(self.received) + 1
        if group is not None:
            value = torch.tensor(number)
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group)
            number = int(value)
        if number:
            self.received = ENDING[number - 1]
        return number > 0

    def _handle(self, number: int, _: Any) -> None:
        first = self.received is None
        if first or number == signal.SIGUSR1:
            self.received = signal.Signals(number)
        if first and not self.training:
            raise SIGTERMException


END_SIGNALS = EndSignals()


def take_over(trainer: Trainer) -> None:
    """Leave signals to `END_SIGNALS`.

    Lightning's own handler calls a collective at whatever point a signal arrives, and its loop another one before every
    micro-batch.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def requeue() -> str | None:
    """Ask SLURM to begin this job again, if it is one and was ended by SIGUSR1.

    Returns:
        What came of it, for people; None where there is nothing to ask.
    """
    job = slurm_job()
    if job is None or END_SIGNALS.received != signal.SIGUSR1:
        return None
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        return f"SIGUSR1, but there is no scontrol to requeue job {job} with; begin it again with --ckpt_path auto"
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True)
    if done.returncode:
        return f"SLURM did not requeue job {job}: {done.stderr.strip()}; begin it again with --ckpt_path auto"
    return f"job {job} is requeued"


def slurm_job() -> str | None:
    """The id of the SLURM job that this process belongs to, of its own task in a job array; None outside of one."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
