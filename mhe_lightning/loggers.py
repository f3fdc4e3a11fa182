"""Metrics as one CSV file that a resumed run continues."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mhe_lightning.files import write_text


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: a row per logged optimizer step, a column per metric.

    Lightning's own CSV logger deletes the file of the run that it continues. This one keeps the rows before the step
    that the run went on from, and drops those that were logged after the checkpoint and are now computed again.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._columns = ["step"]
        self._file: TextIO | None = None
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @property
    def name(self) -> str:
        return self._path.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self._path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsCSV:
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{key: value for key, value in metrics.items() if key != "epoch"}}
        again = self._row.get("step") == step
        self._row = {**self._row, **row} if again else row
        self._write(again)

    @rank_zero_only
    def save(self) -> None:
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, again: bool) -> None:
        """Write the row at once, so that no checkpoint is ahead of it; ``again`` replaces the one written last."""
        new = [key for key in sorted(self._row) if key not in self._columns]
        if self._file is None or new:
            self._row = {**self._rewrite(step=self._row["step"], columns=new), **self._row}
        elif again:
            self._file.truncate(self._row_start)
        assert self._file is not None
        self._row_start = self._file.seek(0, os.SEEK_END)
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(self._row)
        self._file.flush()

    def _rewrite(self, step: int, columns: list[str]) -> dict[str, str]:
        """Open the file with ``columns`` added, keeping complete rows of earlier steps; returns that of ``step``."""
        rows: list[dict[str, str]] = []
        if self._file is not None:
            self._file.close()
        if self._path.is_file():
            # what follows the last line end is a row that was cut short
            reader = csv.DictReader(self._path.read_text(encoding="utf-8").split("\n")[:-1])
            self._columns += [c for c in reader.fieldnames or [] if c not in self._columns]
            rows = list(reader)
        self._columns += [c for c in columns if c not in self._columns]
        lines = [",".join(self._columns)]
        lines += [",".join(row.get(c, "") for c in self._columns) for row in rows if int(row["step"]) < step]
        write_text(self._path, "\n".join(lines) + "\n")
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed in finalize
        return next((row for row in rows if int(row["step"]) == step), {})
