"""Checkpoints: atomic, checksummed, versioned, and never unpickled."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.checkpoint import CheckpointException

from mhe_lightning import sharded_checkpoint
from mhe_lightning.files import atomic_write, sha256, write_text

FORMAT_VERSION = 1
RECORD = "mhe_lightning"
"""Key of what we add to a Lightning checkpoint: the format version and the run's config."""

TOKENIZER_HASH = "tokenizer_sha256"
"""Key in that of the tokenizer that the model was trained with, where the data have one."""

SUFFIX = ".ckpt"
CHECKSUM = ".sha256"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of an unknown format."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, with a checksum beside it; reads tensors and plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        with atomic_write(path, size=_tensor_bytes(checkpoint)) as file:
            torch.save(checkpoint, file)
        # the checksum comes second: a checkpoint that lost it in a crash counts as not finished
        write_text(path.with_name(path.name + CHECKSUM), sha256(path) + "\n")

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_checkpoint(Path(path))


def _tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(_tensor_bytes(part) for part in parts)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain data only; one that several processes wrote as if by one.

    Raises:
        CheckpointError: there is none, it fails its checksum, cannot be read, or is of an unknown format.
    """
    return _read(path, sharded_checkpoint.read, mmap=False)


def read_record(path: Path) -> dict[str, Any]:
    """What `read_checkpoint` gives, to look at what is small in it: weights may be None, or stay on the disk."""
    return _read(path, sharded_checkpoint.read_rest, mmap=True)


def _read(path: Path, read_folder: Callable[[Path], dict[str, Any]], *, mmap: bool) -> dict[str, Any]:
    check_checkpoint(path)
    try:
        checkpoint: dict[str, Any] = (
            read_folder(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        )
    except (Exception, CheckpointException) as error:
        # torch's text recommends weights_only=False in its first lines
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        reason = reason.strip() or type(error).__name__
        raise CheckpointError(f"checkpoint {path} cannot be read as tensors and plain data: {reason}") from error
    check_version(path, checkpoint)
    return checkpoint


def check_checkpoint(path: Path) -> None:
    """Raise a `CheckpointError` if there is no checkpoint at ``path``, or it fails its checksums."""
    if not path.is_file() and not sharded_checkpoint.is_sharded(path):
        raise CheckpointError(f"checkpoint {path} does not exist")
    if problem := damage(path):
        raise CheckpointError(f"checkpoint {path} {problem}; use an earlier one")


def check_version(path: Path, checkpoint: Any) -> None:
    """Raise a `CheckpointError` if what was read from ``path`` is of an unknown format."""
    version = checkpoint.get(RECORD, {}).get("format_version") if isinstance(checkpoint, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {version}; this version of mhe_lightning reads {FORMAT_VERSION}"
        )


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; its checksum or name goes first, so that half of it never passes for whole."""
    if path.is_dir():
        gone = sharded_checkpoint.building_folder(path)
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
        return
    path.with_name(path.name + CHECKSUM).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing in a run's folder, or its ``checkpoints/``."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Move a checkpoint to ``superseded/`` beside it, where nothing goes on from it."""
    target = path.parent / "superseded"
    target.mkdir(exist_ok=True)
    if (target / path.name).exists():
        remove_checkpoint(target / path.name)
    for file in (path.with_name(path.name + CHECKSUM), path):
        if file.exists():
            file.replace(target / file.name)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its checksums, or None."""
    if path.is_dir():
        return sharded_checkpoint.damage(path)
    checksum = path.with_name(path.name + CHECKSUM)
    if not checksum.is_file():
        return f"has no checksum file {checksum.name}, so it was not written completely"
    if checksum.read_text(encoding="utf-8").strip() != sha256(path):
        return "does not match its checksum: it is truncated or damaged"
    return None


def step_of(path: Path) -> int:
    """The optimizer step in a checkpoint's name (``step=00000200.ckpt``), -1 if it has none."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match.group(1)) if match else -1


def checkpoints_in(folder: Path, kind: str = "step") -> list[Path]:
    """A run's checkpoints, oldest first, valid or not: to resume from ("step"), "best-step" or "averaged-step"."""
    return sorted(folder.glob(f"{kind}=*{SUFFIX}"), key=step_of)


def complete_checkpoints(folder: Path, kind: str = "step") -> Iterator[Path]:
    """The checkpoints of ``kind`` that pass their checksums, newest first; a damaged one is skipped with a warning."""
    for path in reversed(checkpoints_in(folder, kind)):
        problem = damage(path)
        if problem is None:
            yield path
        else:
            rank_zero_warn(f"skipping checkpoint {path}: it {problem}")


def newest_checkpoint(folder: Path, kind: str = "step") -> Path | None:
    """The newest checkpoint of ``kind`` that passes its checksum; a damaged one is skipped with a warning."""
    return next(complete_checkpoints(folder, kind), None)


def run_of(path: Path) -> tuple[Path, Path]:
    """The run directory and the checkpoint that a user's ``RUN_OR_CKPT`` means.

    Raises:
        CheckpointError: it is neither a run directory with a checkpoint nor a checkpoint file.
    """
    if path.is_dir() and not sharded_checkpoint.is_sharded(path):
        checkpoint = newest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{path} holds no complete checkpoint in checkpoints/; train one with `fit`")
        return path, checkpoint
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run directory or a checkpoint file")
    return path.resolve().parent.parent, path


def config_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The experiment config that a checkpoint was trained with."""
    config: dict[str, Any] = yaml.safe_load(checkpoint[RECORD]["config"])
    return config
