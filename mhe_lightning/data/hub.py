"""Data sets of the Hugging Face Hub, and mirrors of them in local folders."""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow

from mhe_lightning.data.rows import first_line, require_column

HUB_TIMEOUT_S = 2.0
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubDataset:
    """A Hub data set, or its mirror in a local folder: the same call of `datasets`, streamed.

    Args:
        name: The Hub name, or the folder as given.
        folder: The local mirror, or None to read from the Hub.
        subset: Configuration of the data set.
        revision: Git revision on the Hub.
    """

    def __init__(self, name: str, folder: Path | None, subset: str | None, revision: str | None) -> None:
        self.name = name
        self.folder = folder
        self.subset = subset
        self.revision = revision
        self._loaded: dict[str, Any] | None = None

    def splits(self) -> tuple[str, ...]:
        return tuple(str(split) for split in self._load())

    def columns(self, split: str) -> list[str] | None:
        """Names of the columns of a split, where they are known before it is read."""
        names: list[str] | None = self._load()[split].column_names
        return names

    def tables(self, split: str, columns: Sequence[str], remedy: str = "its columns are") -> Iterator[pyarrow.Table]:
        """The rows of a split, some at a time, as Arrow tables of these columns.

        Args:
            split: The data set's name of the split.
            columns: Names of the columns.
            remedy: What the list of existing columns begins with where one is missing.

        Raises:
            ValueError: There is no such column, or the files cannot be read.
        """
        rows = self._load()[split]
        try:
            if rows.column_names is not None:
                for column in columns:
                    require_column(self.name, rows.column_names, column, remedy)
                rows = rows.select_columns(list(columns))
            # Arrow tables instead of one dictionary per row: an order of magnitude faster.
            yield from rows.with_format("arrow").iter(batch_size=1000)
        except (OSError, RuntimeError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.name}: the split {split} is unreadable ({first_line(error)})") from error

    def identity(self) -> dict[str, Any]:
        """Changes whenever the rows may have changed."""
        if self.folder is None:
            return {"hub": self.name, "subset": self.subset, "revision": self.revision}
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        return {
            "subset": self.subset,
            "files": [stat_of(file, str(file.relative_to(self.folder))) for file in files],
        }

    def _load(self) -> dict[str, Any]:
        """All splits as streams; nothing but names and schema is read yet."""
        if self._loaded is None:
            if self.folder is None:
                _require_hub(self.name)
            import datasets  # costs seconds, and only this kind of source needs it

            path = self.name if self.folder is None else str(self.folder.resolve())
            revision = self.revision if self.folder is None else None
            try:
                subset = _check_subset(
                    self.name,
                    self.subset,
                    datasets.get_dataset_config_names(path, revision=revision),
                    lambda: datasets.get_dataset_default_config_name(path, revision=revision),
                )
                self._loaded = datasets.load_dataset(path, name=subset, revision=revision, streaming=True)
            except StopIteration as error:  # datasets looks at the first rows for the columns
                raise ValueError(f"cannot open the data set {self.name}: one of its files has no rows") from error
            except (OSError, RuntimeError, pyarrow.ArrowException) as error:
                raise ValueError(f"cannot open the data set {self.name}: {first_line(error)}") from error
        return self._loaded


def open_hub_dataset(path: str, subset: str | None = None, revision: str | None = None) -> HubDataset:
    """The data set of a Hub name, or of a mirror of one: a folder in the Hub's layout, given itself or found by the
    name below `MHE_DATA_ROOT`.

    Raises:
        ValueError: `path` is neither a folder nor a Hub name.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return HubDataset(path, local, subset, revision)
    if path.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(path):
        raise ValueError(f"{path} does not exist; give a folder in the Hub's layout or the name of a Hub data set")
    return HubDataset(path, mirror_of(path), subset, revision)


def mirror_of(name: str) -> Path | None:
    """The local folder that stands for a Hub name, if `MHE_DATA_ROOT` has one."""
    root = os.environ.get("MHE_DATA_ROOT")
    if not root:
        return None
    candidates = (Path(root).expanduser() / name, Path(root).expanduser() / name.rpartition("/")[2])
    return next((folder for folder in candidates if folder.is_dir()), None)


def _require_hub(name: str) -> None:
    """Fail at once where `datasets` would retry for half a minute."""
    remedy = "mirror it in a local folder and give that as path, or set MHE_DATA_ROOT to the folder of all mirrors"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"the data set {name} is not on this machine and HF_HUB_OFFLINE is set; {remedy}")
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not _reachable(endpoint):
        raise ValueError(f"the data set {name} is not on this machine and {endpoint} cannot be reached; {remedy}")


def _reachable(endpoint: str) -> bool:
    url = urllib.parse.urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=HUB_TIMEOUT_S).close()
        except OSError:
            return
        answered.set()

    # In a thread, because the time-out of a connection does not cover the look-up of its host name.
    prober = threading.Thread(target=connect, daemon=True)
    prober.start()
    prober.join(HUB_TIMEOUT_S)
    return answered.is_set()


def _check_subset(name: str, subset: str | None, known: list[str], default: Callable[[], str | None]) -> str | None:
    if subset is not None and subset not in known:
        raise ValueError(f"{name} has no subset {subset!r}; it has {', '.join(known)}")
    if subset is None and len(known) > 1 and default() is None:
        raise ValueError(f"{name} has several subsets; set subset to one of {', '.join(known)}")
    return subset


def stat_of(file: Path, name: str) -> list[str | int]:
    status = file.stat()
    return [name, status.st_size, status.st_mtime_ns]
