"""How long steps wait for their data, and which process holds up the others."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mhe_lightning.callbacks.actions import actions_of
from mhe_lightning.callbacks.run_record import update_results
from mhe_lightning.callbacks.steps import is_logged
from mhe_lightning.distributed import new_control_group

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""What Lightning tells its profiler when the next batch is asked for."""

WORTH_TELLING = 0.05
"""Share of a micro-batch's time that a straggler must cost."""

SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class Times:
    """Mean seconds per micro-batch of one process between two logged steps.

    Args:
        data: waiting for the batch.
        forward: of the forward pass, from the net's first layer to the loss.
        whole: of the micro-batch with its data, its backward pass and its share of the optimizer's.
    """

    data: float
    forward: float
    whole: float

    @property
    def own(self) -> float:
        """What no other process has part in, under data parallelism."""
        return self.data + self.forward


class StepTimes(Callback):
    """Logs ``data_wait`` and reports stragglers.

    ``data_wait`` is the share of training time that the process which waits longest spends waiting for data, without
    evaluation and checkpoints. A straggler takes longer than the median of all processes for its data and forward
    pass, which come before any communication under data parallelism (the backward pass waits for the others, so it is
    equally long everywhere; with sharded weights the forward pass does so, too, and only waits for data differ).
    At logged steps the processes exchange their times; in the steps between, no device is waited for. `results.json`
    has the share of the whole run, and how often each process was the straggler, by cause. Only what is so at two
    logged steps in a row is reported.

    Args:
        straggler_percent: how many per cent above the median a process is a straggler.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, straggler_percent: float = 50.0) -> None:
        if straggler_percent <= 0:
            raise ValueError(f"straggler_percent ({straggler_percent}) must be positive")
        self.straggler_percent = straggler_percent
        self.data_seconds = 0.0
        self.seconds = 0.0
        self.stragglers: Counter[str] = Counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._step_before = 0
        self._forward_due = False
        self._found: tuple[int, str, str] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"data_seconds": self.data_seconds, "seconds": self.seconds, "stragglers": dict(self.stragglers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data_seconds, self.seconds = state_dict["data_seconds"], state_dict["seconds"]
        self.stragglers = Counter(state_dict["stragglers"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._group = new_control_group()
        self._data = 0.0
        self._forward = _Stopwatch(pl_module.device)
        self._restart()
        actions_of(trainer).listeners.append(self._on_action)
        # not from the hook before the batch: data parallelism begins its forward pass by sending around buffers
        self._hook = pl_module.net.register_forward_pre_hook(self._on_forward)  # type: ignore[union-attr]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        actions_of(trainer).listeners.remove(self._on_action)
        self._hook.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step
        self._begun = time.perf_counter()
        self._forward_due = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        if not self._forward_due:
            self._forward.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        stepped = trainer.global_step > self._step_before
        if stepped and is_logged(trainer):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self._in_batches += time.perf_counter() - self._begun
            self._report(trainer, pl_module)
            self._restart()
        else:
            self._in_batches += time.perf_counter() - self._begun

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.seconds > 0:
            times: dict[str, Any] = {"data_wait": round(self.data_seconds / self.seconds, 4)}
            if trainer.world_size > 1:
                times["straggler_reports"] = dict(self.stragglers)
            update_results(Path(trainer.default_root_dir), {"step_times": times})

    def _on_action(self, name: str, begins: bool) -> None:
        if name == FETCH:
            now = time.perf_counter()
            self._data += -now if begins else now

    def _on_forward(self, *_: Any) -> None:
        if self._forward_due:
            self._forward.start()
            self._forward_due = False

    def _restart(self) -> None:
        self._batches = 0
        self._in_batches = 0.0
        self._data = 0.0
        self._forward.reset()

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole = self._data + self._in_batches
        own = Times(*(seconds / self._batches for seconds in (self._data, self._forward.seconds(), whole)))
        ranks = exchange(own, self._group)
        longest = max(times.data / times.whole for times in ranks)
        pl_module.log("data_wait", longest)
        self.seconds += whole
        self.data_seconds += longest * whole
        before, found = self._found, straggler(ranks, self.straggler_percent)
        self._found = found
        if found is None or before is None or found[0] != before[0]:  # once is chance
            return
        rank, cause, text = found
        self.stragglers[f"rank {rank}, {cause}"] += 1
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            rank_zero_info(f"step {trainer.global_step}: {text}")


def exchange(own: Times, group: dist.ProcessGroup | None) -> list[Times]:
    """The times of all ranks, equal on all of them."""
    if group is None:
        return [own]
    mine = torch.tensor([own.data, own.forward, own.whole], dtype=torch.float64)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(table, mine, group=group)
    return [Times(*row.tolist()) for row in table]


def straggler(ranks: list[Times], percent: float) -> tuple[int, str, str] | None:
    """The rank that holds up the others most, whether by its "data" or "compute", and a sentence; None if none does.

    Args:
        ranks: the times of each.
        percent: how much longer than the median is too long.
    """
    usual = median_low(times.own for times in ranks)  # of two, the faster one
    rank, worst = max(enumerate(ranks), key=lambda entry: entry[1].own)
    excess = worst.own - usual
    if excess <= usual * percent / 100 or excess < WORTH_TELLING * worst.whole:
        return None
    data = median_low(times.data for times in ranks)
    forward = median_low(times.forward for times in ranks)
    cause = "data" if worst.data - data > worst.forward - forward else "compute"
    text = (
        f"rank {rank} holds up the others by its {cause}: per micro-batch it waits {1000 * worst.data:.1f} ms for data "
        f"and computes {1000 * worst.forward:.1f} ms forward; the median rank {1000 * data:.1f} and "
        f"{1000 * forward:.1f} ms"
    )
    return rank, cause, text


class _Stopwatch:
    """Adds up spans of a device's time; on a GPU by events, which are read when the device has been waited for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        self._sum = 0.0
        self._begun = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._begun = time.perf_counter()

    def stop(self) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._sum += time.perf_counter() - self._begun

    def seconds(self) -> float:
        return self._sum + sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
