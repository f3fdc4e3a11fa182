"""Metrics as one CSV file that a resumed run continues."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from mhe_lightning.callbacks.steps import is_logged
from mhe_lightning.files import lacks_space, no_space, write_text

EVALUATIONS = ("val/", "test/")

METRICS = "metrics.csv"


class MetricsCSV(Callback):
    """Writes ``metrics.csv``: a row per logged optimizer step, a column per metric.

    A callback, because Lightning hands metrics to its loggers only after a step's checkpoint was written, so that a run
    killed in between would lose a row; and because its own CSV logger deletes the file of the run that it continues.
    Here a row is written before the checkpoint, and a resumed run drops the rows after the step that it went on from.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS
        self._columns = ["step"]
        self._file: TextIO | None = None
        self._row: dict[str, Any] = {}
        self._row_start = 0
        self._step_before = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self._step_before
        if trainer.is_global_zero and stepped and is_logged(trainer):
            metrics = trainer.callback_metrics
            row = {key: float(value) for key, value in metrics.items() if not key.startswith(EVALUATIONS)}
            self.write(row, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            row = {key: float(value) for key, value in metrics.items() if key.startswith(EVALUATIONS)}
            self.write(row, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics to the row of ``step``, at once; steps must not decrease."""
        row = {"step": step, **{key: value for key, value in metrics.items() if key != "step"}}
        again = self._row.get("step") == step
        self._row = {**self._row, **row} if again else row
        new = [key for key in sorted(self._row) if key not in self._columns]
        if self._file is None or new:
            self._row = {**self._rewrite(step, new), **self._row}
        elif again:
            self._file.truncate(self._row_start)
        assert self._file is not None
        self._row_start = self._file.seek(0, os.SEEK_END)
        try:
            csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(self._row)
            self._file.flush()
        except OSError as error:
            if not lacks_space(error):
                raise
            raise no_space(self._path, "a few") from error

    def close(self) -> None:
        """Close the file; the next `write` goes on with it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, step: int, columns: list[str]) -> dict[str, str]:
        """Open the file with ``columns`` added, keeping the rows of earlier steps; returns that of ``step``."""
        rows: list[dict[str, str]] = []
        self.close()
        if self._path.is_file():
            # what follows the last line end is a row that was cut short
            reader = csv.DictReader(self._path.read_text(encoding="utf-8").split("\n")[:-1])
            self._columns += [c for c in reader.fieldnames or [] if c not in self._columns]
            rows = list(reader)
        self._columns += [c for c in columns if c not in self._columns]
        lines = [",".join(self._columns)]
        lines += [",".join(row.get(c, "") for c in self._columns) for row in rows if int(row["step"]) < step]
        write_text(self._path, "\n".join(lines) + "\n")
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed in close()
        return next((row for row in rows if int(row["step"]) == step), {})
