"""Files that are complete or absent, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mhe_lightning.errors import RunError


@contextmanager
def atomic_write(path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary sibling of ``path`` for writing; on success it is synced to disk and takes the path's name.

    Args:
        path: of the file; its folder is made.
        size: about how many bytes it will have, for the message where the disk has no room for them.

    Raises:
        RunError: the disk is full. What was at ``path`` before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of it
        if not lacks_space(error):
            raise
        needed = f"about {size:,}" if size is not None else f"more than {temporary.stat().st_size:,}"
        temporary.unlink()
        raise no_space(path, needed) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def lacks_space(error: BaseException | None) -> bool:
    """Whether an error, or what it arose from, is that a disk or a quota is full."""
    seen: set[int] = set()  # an error that was raised again can be its own cause
    while error is not None and id(error) not in seen:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(error):  # torch's errors quote those of other processes
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def no_space(path: Path, needed: str) -> RunError:
    """The error to raise where ``path`` needs so many bytes and its disk has no room for them."""
    free = shutil.disk_usage(path.parent).free
    return RunError(
        f"{path}: no space left on its disk: it needs {needed} bytes, {free:,} are free; what was written before is "
        "whole: make room and run the same command again (`fit` with --ckpt_path auto)"
    )


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def build_folder(target: Path, *, build: Callable[[Path], None], is_usable: Callable[[Path], bool]) -> None:
    """Make the folder ``target`` complete or not at all, unless it is there already.

    It is built in a temporary folder beside its place and renamed at the end. Of two processes that build the same, the
    later one uses the folder of the other. What killed processes of this machine left behind is removed.

    Args:
        target: the folder to make.
        build: writes its content into the folder that it is given.
        is_usable: whether a folder that is there can be used; one that cannot is built anew.
    """
    target = target.resolve()  # "." is beside its siblings, not within itself
    if target.exists() and is_usable(target):
        return
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    building = parent / f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    building.mkdir()
    try:
        build(building)
        _publish(building, target, is_usable)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def build_new_folder(target: Path, build: Callable[[Path], None]) -> None:
    """`build_folder` where nothing that is there is used or replaced, also not what another process makes meanwhile.

    Raises:
        ValueError: there is something at ``target`` but an empty folder.
    """

    def is_usable(folder: Path) -> bool:
        require_new(folder)
        return False

    build_folder(target, build=build, is_usable=is_usable)


def require_new(target: Path) -> None:
    """Raise a ValueError if there is something at ``target`` but an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists; remove it, or choose another folder")


def _publish(building: Path, target: Path, is_usable: Callable[[Path], bool]) -> None:
    """Rename the finished folder into its place, unless another process was faster."""
    try:
        os.rename(building, target)
    except OSError:
        if not target.exists():
            raise
        if is_usable(target):
            return
        damaged = building.with_name(building.name + "-damaged")
        os.rename(target, damaged)
        os.rename(building, target)
        shutil.rmtree(damaged, ignore_errors=True)
    sync_folder(target.parent)


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes of this machine left; a folder whose process is alive or elsewhere stays."""
    pattern = re.compile(rf"\..*\.tmp-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+(-damaged)?")
    for folder in parent.iterdir():
        match = pattern.fullmatch(folder.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to someone else, so it exists
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
