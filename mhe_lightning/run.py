"""Run directories: `<root>/<name>/` with config.yaml, metrics.csv, checkpoints/ and results.json."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any, TextIO

from mhe_lightning.checkpoint import CheckpointError, checkpoints_in, newest_checkpoint, remove_unfinished, step_of

TOKENIZER = "tokenizer.json"
LOCK = ".lock"

OBSERVING = ("step_times", "memory", "profile", "watchdog")
"""Parts of a config that say how a run is observed: two runs that differ in them alone are the same experiment."""


def folder_of(root: str, name: str) -> Path:
    """The folder of the run ``name`` in ``root``.

    Raises:
        ValueError: the name is not that of one folder in ``root``; a new run would set aside what lies elsewhere.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"name ({name!r}) must be the name of a folder, without '/'; try {Path(name).name or 'run'!r}")
    return Path(root) / name


def resolve_checkpoint(ckpt_path: str | None, folder: Path) -> str | None:
    """``auto``, ``best`` and ``averaged`` become the run's newest complete checkpoint of their kind, a path stays.

    Returns:
        The checkpoint; None if there is no newest or best one, or none was asked for.

    Raises:
        CheckpointError: the run has no averaged checkpoint.
    """
    kinds = {"auto": "step", "best": "best-step", "averaged": "averaged-step"}
    if ckpt_path not in kinds:
        return ckpt_path
    found = newest_checkpoint(folder / "checkpoints", kinds[ckpt_path])
    if found is None and ckpt_path == "averaged":
        raise CheckpointError(
            f"{folder} holds no averaged checkpoint; make one with `consolidate {folder} --average K`"
        )
    return None if found is None else str(found)


def set_aside(folder: Path) -> Path | None:
    """Give a new run the name of an earlier one: the earlier moves to ``<name>.1`` (or the next free number).

    Returns:
        Where it went; None if there was nothing.
    """
    if not folder.is_dir() or not any(p.name != LOCK for p in folder.iterdir()):
        return None
    number = 1
    while (moved := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(moved)
    return moved


def lock(folder: Path) -> TextIO:
    """Hold the run for this process, until the file that is returned is closed.

    What a killed process was writing to it is removed: nobody else is at it now.

    Raises:
        ValueError: another process of this machine is writing to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the process
    try:
        # lockf, not flock: data workers that outlive a killed run for some seconds must not keep its lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise ValueError(
            f"{folder} is being written by process {file.read().strip() or '?'}; wait for it, or choose another --name"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    remove_unfinished(folder)
    return file


def last_step(folder: Path) -> int:
    """The optimizer step of the newest checkpoint in a run, -1 without one."""
    return max((step_of(path) for path in checkpoints_in(folder / "checkpoints")), default=-1)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The keys at which two configs differ, as (dotted key, old, new)."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(prefix, old, new)]
    found = []
    for key in sorted({*old, *new}):
        path = f"{prefix}.{key}" if prefix else str(key)
        found += differences(old.get(key), new.get(key), path)
    return found
