"""How much memory training steps of an experiment really take, and how much was predicted; printed as JSON.

Run in a process of its own: ``python measure_step.py --config FILE …``, with the options of `fit`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from mhe_lightning.experiment import Experiments
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.planning import Experiment

STEPS = 3


def level(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def random_batch(experiment: Experiment) -> dict:
    """The largest batch, with tokens drawn at random wherever there are any."""
    batch = experiment.data.largest_batch(1)
    for name in ("tokens", "target_tokens", "targets"):
        if name in batch:
            drawn = torch.randint_like(batch[name], experiment.vocab_size)
            batch[name] = drawn.masked_fill(batch[name] == IGNORE, IGNORE)
    return batch


def measure(experiment: Experiment) -> int:
    """Bytes by which the resident memory rises above what it is before the model is there."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = level("VmRSS")
    task = experiment.make_task().train()
    task.configure_model()
    optimizer = task.configure_optimizers()
    batch = random_batch(experiment)
    for _ in range(STEPS):
        loss = task.training_step(batch, 0)
        optimizer.zero_grad(set_to_none=True)  # where Lightning does it
        loss.backward()
        del loss
        optimizer.step()
        task._window.clear()
    return level("VmHWM") - before


def warm_up() -> None:
    """Load what torch loads when it first computes: it belongs to the libraries, not to the step."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    checkpoint(layer, torch.zeros(8, 8), use_reentrant=False).sum().backward()
    optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experiment = Experiment(Experiments().parse(sys.argv[1:]), world_size=1)
    measured = measure(experiment)
    memory = experiment.cost("measured", {}).memory
    print(json.dumps({"measured": measured, "predicted": memory.total, **vars(memory)}))
