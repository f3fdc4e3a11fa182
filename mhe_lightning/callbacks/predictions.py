"""What `predict` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from mhe_lightning.files import write_text


class Predictions(BasePredictionWriter):
    """Writes ``predictions.jsonl``: a line per row of the set, in its order, each row once on any number of ranks."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        rows = {row["row"]: row for batch in predictions for row in batch}
        if dist.is_available() and dist.is_initialized():
            gathered: list[dict[int, Any]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, rows)
            rows = {key: row for part in gathered for key, row in part.items()}
        if trainer.is_global_zero:
            lines = [json.dumps(rows[key]) for key in sorted(rows)]
            write_text(Path(trainer.default_root_dir) / "predictions.jsonl", "\n".join(lines) + "\n")
