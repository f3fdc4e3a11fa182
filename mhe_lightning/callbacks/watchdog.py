"""No silent hang: the rank that holds up the others is named, and when one fails all end."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mhe_lightning.callbacks.actions import actions_of
from mhe_lightning.callbacks.failures import described, is_collateral, is_out_of_memory
from mhe_lightning.callbacks.heartbeats import Address, Hub, Line
from mhe_lightning.callbacks.logs import log_path
from mhe_lightning.callbacks.watch import Watch

SECONDS_FOR_VERDICT = 5.0


class Watchdog(Callback):
    """Ends a run that hangs or that a process has left: on all processes, with a message that names the one to blame.

    A thread per process tells rank 0, by a connection of its own, how far its process has come. Where no process moves
    for ``timeout_seconds``, the message names those behind the others, and each writes to its log where in Python its
    threads are. Where a process fails, or dies without a word, the others say so and end within seconds. Exit code 1.

    Args:
        timeout_seconds: longer than the longest pause that is no hang: a micro-batch (the first one, where it is
            compiled), the writing of a checkpoint, the last computations of an evaluation; null waits forever.
        port: on which rank 0 listens to the others; 0 takes any that is free.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, timeout_seconds: float | None = 600.0, port: int = 0) -> None:
        if timeout_seconds is not None and timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds ({timeout_seconds}) must be positive; null waits forever")
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port ({port}) must be from 0, for any that is free, to 65535")
        self.timeout_seconds = timeout_seconds
        self.port = port
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        rank, several = trainer.global_rank, trainer.world_size > 1
        who = f"host {socket.gethostname()}, process {os.getpid()}"
        self._watch = Watch(
            name=f"rank {rank} ({who})" if several else f"the run ({who})",
            rank=rank,
            link=self._link(trainer) if several else None,
            timeout=self.timeout_seconds,
            log=log_path(Path(trainer.default_root_dir), rank) if several else None,
            speaks=trainer.local_rank == 0,
        )
        self._watch.start()
        actions_of(trainer).listeners.append(self._watch.mark_action)

    def _link(self, trainer: Trainer) -> Hub | Line | None:
        hub, address = None, None
        if trainer.is_global_zero:
            hosts = [os.environ.get("MASTER_ADDR", "127.0.0.1"), socket.gethostname()]
            try:
                hub = Hub(hosts[:1] if hosts[0] in ("127.0.0.1", "localhost") else hosts, self.port)
                address = (hub.address.hosts, hub.address.port, hub.address.token)
            except OSError as error:
                rank_zero_warn(f"the ranks do not watch each other: no port to listen on ({error})")
        address = trainer.strategy.broadcast(address)
        if trainer.is_global_zero or address is None:
            return hub
        try:
            return Line(Address(*address), trainer.global_rank)
        except OSError as error:
            told = f"rank 0, port {address[1]}, cannot be reached from rank {trainer.global_rank} ({error})"
            print(f"{told}, so it is not watched; see watchdog.port", flush=True)
            return None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            actions_of(trainer).listeners.remove(self._watch.mark_action)
            self._watch.end()
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        watch = self._watch
        if watch is None:
            return
        if trainer.world_size == 1:
            watch.end()
            if is_out_of_memory(exception):
                print(f"step {trainer.global_step + 1}: {described(exception)}", flush=True)
        elif isinstance(exception, SIGTERMException):
            watch.fail("terminated", "was terminated")
        else:
            seconds = 0.0 if isinstance(exception, KeyboardInterrupt) else SECONDS_FOR_VERDICT
            watch.fail(
                "collateral" if is_collateral(exception) else "failed",
                f"failed at step {trainer.global_step + 1}: {described(exception)}",
                seconds,
            )

    # Where the main thread is. All ranks pass the same places in the same order

    def _mark(self, position: str) -> None:
        if self._watch is not None:
            self._watch.mark(position)

    def _in_step(self, trainer: Trainer, phase: str) -> None:
        self._mark(f"step {trainer.global_step + 1}, {phase}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("start-up, before the checkpoint is restored")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._in_step(trainer, "before its data")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._watch is not None:
            self._watch.mark_micro_batch(batch_idx + 1, f"step {trainer.global_step + 1}, forward pass")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._in_step(trainer, "backward pass")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._in_step(trainer, "optimizer")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_step(trainer, "loading data (or what follows the step before)")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._mark(f"the checkpoint of step {trainer.global_step}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the validation's first batch")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._mark(f"the validation, after batch {batch_idx}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the validation's scores")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(f"step {trainer.global_step}, after its validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the test's first batch")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._mark(f"the test, after batch {batch_idx}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the test's scores")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the prediction's first batch")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._mark(f"the prediction, after batch {batch_idx}")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the prediction's writing")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("the end of training")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("what follows training")
