"""What `predict` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from mhe_lightning.data.base import ExactDataModule
from mhe_lightning.distributed import gather_rows
from mhe_lightning.files import write_text

PREDICTIONS = "predictions.jsonl"
SUBMISSION = "submission"


class Predictions(BasePredictionWriter):
    """Writes ``predictions.jsonl``: a line per row of the set, in its order, each row once on any number of ranks.

    Where the data set's benchmark takes files of its own form, they lie beside it, in ``submission/``.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        rows = gather_rows({row["row"]: row for batch in predictions for row in batch})
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        rows = pl_module.merge_predictions(rows)  # type: ignore[operator]
        write_text(folder / PREDICTIONS, "".join(json.dumps(row) + "\n" for row in rows))
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ExactDataModule):
            for earlier in (folder / SUBMISSION).glob("*"):  # of another set, it would pass for this one's
                earlier.unlink()
            for name, text in data.submission(rows).items():
                write_text(folder / SUBMISSION / name, text)
