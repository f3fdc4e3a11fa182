"""Metrics as one CSV file that a resumed run continues."""

from __future__ import annotations

import csv
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
        self._pending: dict[str, Any] = {}

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
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        if self._pending and self._pending["step"] != step:
            self._write_pending()
        self._pending = {"step": step, **self._pending, **row}

    @rank_zero_only
    def save(self) -> None:
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._write_pending()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_pending(self) -> None:
        row, self._pending = self._pending, {}
        if not row:
            return
        new = [key for key in sorted(row) if key not in self._columns]
        if self._file is None or new:
            row = {**self._rewrite(step=row["step"], columns=new), **row}
        assert self._file is not None
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def _rewrite(self, step: int, columns: list[str]) -> dict[str, str]:
        """Open the file with ``columns`` added, keeping complete rows of earlier steps; returns that of ``step``."""
        rows: list[dict[str, str]] = []
        if self._file is not None:
            self._file.close()
        if self._path.is_file():
            with open(self._path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                self._columns += [c for c in reader.fieldnames or [] if c not in self._columns]
                # a row that a kill cut short has no value in its last columns
                rows = [row for row in reader if None not in row.values()]
        self._columns += [c for c in columns if c not in self._columns]
        lines = [",".join(self._columns)]
        lines += [",".join(row.get(c, "") for c in self._columns) for row in rows if int(row["step"]) < step]
        write_text(self._path, "\n".join(lines) + "\n")
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed in finalize
        return next((row for row in rows if int(row["step"]) == step), {})
