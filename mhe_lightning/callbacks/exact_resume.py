"""Steps whose randomness is a function of their number, so that a resumed run repeats nothing and misses nothing."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mhe_lightning.data.base import ExactDataModule


class ExactResume(Callback):
    """Seeds torch, numpy and random before every micro-batch from (seed, micro-batch, data-parallel rank).

    Lightning stores no random state in its checkpoints. With this callback none is needed: what a step draws depends
    on its number alone. It also tells the data module which rows were trained, for its state and its certificate.

    Args:
        seed: of all steps.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kwargs = trainer.distributed_sampler_kwargs  # ranks that share their data share their randomness
        self._rank = kwargs["rank"] if kwargs else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        data = _data_module(trainer)
        if data is not None:
            seed_step(self.seed, data.micro_batches, self._rank)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = _data_module(trainer)
        if data is not None:
            data.mark_trained(batch["rows"])


def seed_step(seed: int, micro_batch: int, rank: int) -> None:
    """Seed the generators of torch, numpy and random as a function of the arguments."""
    digest = hashlib.sha256(f"{seed},{micro_batch},{rank}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)


def _data_module(trainer: Trainer) -> ExactDataModule | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, ExactDataModule) else None
