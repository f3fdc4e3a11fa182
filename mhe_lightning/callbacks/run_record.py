"""What a run leaves about itself: its config in every checkpoint, and results.json."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

import mhe_lightning
from mhe_lightning.accounting import parameters_by_part
from mhe_lightning.callbacks.throughput import Throughput
from mhe_lightning.checkpoint import FORMAT_VERSION, RECORD, TOKENIZER_HASH
from mhe_lightning.data.base import ExactDataModule
from mhe_lightning.data.tokenizer import tokenizer_hash
from mhe_lightning.files import write_text

CONFIG = "config.yaml"
RESULTS = "results.json"
VERB_OF = {"val": "validate", "test": "test"}
"""Split → the verb that scores it and whose results are kept under its name."""

PACKAGES = ("torch", "lightning", "torchmetrics", "datasets", "tokenizers", "numpy")


class RunRecord(Callback):
    """Adds the format version and the config to checkpoints, and writes ``results.json`` when a verb has ended.

    Args:
        config: the resolved experiment config, YAML.
        seed: the run's seed.
        throughput: measures the time spent on training.
    """

    def __init__(self, config: str, seed: int, throughput: Throughput) -> None:
        self.config = config
        self.seed = seed
        self.throughput = throughput
        self.wall_seconds = 0.0
        self._begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"wall_seconds": self._wall()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wall_seconds = state_dict["wall_seconds"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        checkpoint[RECORD] = {
            "format_version": FORMAT_VERSION,
            "config": self.config,
            TOKENIZER_HASH: None if tokenizer is None else tokenizer_hash(tokenizer),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:  # not before a checkpoint is restored: a refused one leaves the run's config alone
            write_text(Path(trainer.default_root_dir) / CONFIG, self.config)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        tokens = int(getattr(pl_module, "tokens_seen", 0))
        speed = tokens / max(self.throughput.training_seconds, 1e-9)
        mfu = self.throughput.mfu(speed)
        data = getattr(trainer, "datamodule", None)
        update_results(
            Path(trainer.default_root_dir),
            {
                "metrics": _metrics(trainer),
                "steps": trainer.global_step,
                "parameters": parameters_by_part(pl_module),
                "tokens_seen": tokens,
                "wall_seconds": round(self._wall(), 3),
                "training_seconds": round(self.throughput.training_seconds, 3),
                "tokens_per_second": round(speed, 1),
                **({} if mfu is None else {"mfu": round(mfu, 4)}),
                "peak_memory_bytes": peak_memory_bytes(),
                "data": data.describe() if isinstance(data, ExactDataModule) else {},
                "seed": self.seed,
                "world_size": trainer.world_size,
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "versions": versions(),
                "git_commit": git_commit(),
                "machine": {"system": platform.platform(), "threads": torch.get_num_threads()},
            },
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.VALIDATING:
            self._record_evaluation(trainer, pl_module, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._record_evaluation(trainer, pl_module, "test")

    def _record_evaluation(self, trainer: Trainer, pl_module: LightningModule, verb: str) -> None:
        """Beside the training's own metrics: it may be of another checkpoint or with other settings."""
        folder = Path(trainer.default_root_dir)
        if trainer.ckpt_path is None:  # the end of a training too short for a validation of its own
            update_results(folder, {"metrics": _metrics(trainer)})
            return
        data = yaml.safe_load(self.config)["data"]
        entry = {"checkpoint": str(trainer.ckpt_path), "metrics": _metrics(trainer), "data": data}
        if signatures := getattr(pl_module, "signatures", None):
            entry["signatures"] = dict(signatures)
        update_results(folder, {"evaluations": {verb: entry}})

    def _wall(self) -> float:
        return self.wall_seconds + time.perf_counter() - self._begun


def read_results(folder: Path) -> dict[str, Any]:
    """The run's results.json.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is not JSON.
    """
    results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    return results


def update_results(folder: Path, new: dict[str, Any]) -> None:
    """Merge ``new`` into the run's results.json; metrics and evaluations are merged one by one."""
    path = folder / RESULTS
    old = read_results(folder) if path.is_file() else {}
    for part in ("metrics", "evaluations"):
        if part in old or part in new:
            new = {**new, part: {**old.get(part, {}), **new.get(part, {})}}
    write_text(path, json.dumps({**old, **new}, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python, this package and the packages at its core."""
    found = {"python": sys.version.split()[0], "mhe_lightning": mhe_lightning.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout that the package runs from, marked if files differ from it; None outside of one."""
    folder = Path(mhe_lightning.__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some other repository that the package lies in
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {k: float(v) for k, v in sorted(trainer.callback_metrics.items()) if "/" in k}
