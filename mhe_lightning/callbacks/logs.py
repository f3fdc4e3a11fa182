"""A log file per process, for what only that process knows."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import traceback
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

LOGS = "logs"


def log_path(folder: Path, rank: int) -> Path:
    """The log of a process in a run directory."""
    return folder / LOGS / f"rank-{rank:04d}.log"


class RankLogs(Callback):
    """Writes ``logs/rank-0000.log`` and so on, where there are several processes.

    A log has what the process warns of and logs, the traceback of its last exception, and where in Python it was when
    it crashed. The terminal shows what it shows without; a run that goes on adds to its logs.
    """

    def __init__(self) -> None:
        self._handler: logging.Handler | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # not earlier: before, rank 0 may still move an earlier run's folder away
        if trainer.world_size == 1 or self._handler is not None:
            return
        path = log_path(Path(trainer.default_root_dir), trainer.global_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        # open until the process ends: what goes wrong after training is told, too
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        handler = self._handler = logging.StreamHandler(self._file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        who = f"rank {trainer.global_rank} of {trainer.world_size}, host {socket.gethostname()}, process {os.getpid()}"
        self._say(logging.INFO, f"{stage} begins: {who}")
        for logger in (logging.getLogger(), *_not_propagating()):
            logger.addHandler(handler)
        faulthandler.enable(file=self._file)
        self._take_warnings()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._handler is not None:
            self._say(logging.ERROR, "".join(traceback.format_exception(exception)).rstrip())

    def _take_warnings(self) -> None:
        shown = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            shown(message, category, filename, lineno, file, line)
            self._say(logging.WARNING, warnings.formatwarning(message, category, filename, lineno, line).rstrip())

        warnings.showwarning = show

    def _say(self, level: int, text: str) -> None:
        assert self._handler is not None
        self._handler.handle(logging.LogRecord("mhe_lightning", level, __file__, 0, text, None, None))


def _not_propagating() -> list[logging.Logger]:
    """Loggers whose records the root logger does not see; but torch's for machines, which a handler would switch on."""
    known = logging.Logger.manager.loggerDict.values()
    loggers = [logger for logger in known if isinstance(logger, logging.Logger) and not logger.propagate]
    return [logger for logger in loggers if logger.handlers and "__" not in logger.name]
