"""Where documents come from: local files, Hub data sets and their mirrors, Python's own prose.

`open_source` decides from a path what kind of source it is.
"""

from __future__ import annotations

import glob
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow

from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.data.pieces import Piece, Source, cut, require_split, row_pieces
from mhe_lightning.data.rows import ROW_READERS, arrow_texts, first_line, require_column, text_chunks

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
HUB_TIMEOUT_S = 2.0

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TRAIN_FILE = re.compile(r"train(?![a-z])")
_EVALUATION_FILE = re.compile(r"(validation|valid|val|dev|test)(?![a-z])")


def open_source(
    path: str,
    *,
    subset: str | None = None,
    text_column: str = "text",
    revision: str | None = None,
    document_start: str | None = None,
) -> Source:
    """Find out what `path` is and open it; nothing is read yet.

    Args:
        path: One of
            - `embedded`;
            - a .txt, .jsonl, .json or .parquet file, or a glob pattern of such files;
            - a folder: a Hub mirror if its README.md says `configs:` or `dataset_info:` or its parquet files are
              named by split, otherwise all text files below it;
            - the name of a Hub data set. If the environment variable `MHE_DATA_ROOT` is set, `owner/name` means
              its folder `owner/name` or `name` where that exists.
        subset: Configuration of a Hub data set.
        text_column: Column (or JSON key) that holds the text.
        revision: Git revision of a Hub data set.
        document_start: Regular expression. Without it each row is a document; with it a row that matches
            begins a document, and the rows that follow are its lines. A .txt file is always one document.

    Raises:
        ValueError: `path` does not exist or holds nothing usable, or `document_start` is not a valid pattern.
    """
    start = _compile(document_start)
    if path == "embedded":
        return EmbeddedSource()
    local = Path(path).expanduser()
    if local.is_dir():
        if _is_mirror(local):
            return HubSource(path, local, subset, text_column, revision, start)
        return FileSource(path, _files_below(local), text_column, start)
    if local.exists():
        return FileSource(path, [local], text_column, start)
    if glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(str(local), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"the pattern {path} matches no file; check it with `ls`")
        return FileSource(path, files, text_column, start)
    if path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or not _HUB_NAME.fullmatch(path):
        raise ValueError(f"{path} does not exist; give a file, a folder, a glob pattern or the name of a Hub data set")
    return HubSource(path, _mirror_of(path), subset, text_column, revision, start)


class FileSource:
    """Local files, which all belong to the split `train`: a .txt is a document, the other kinds hold rows."""

    def __init__(self, name: str, files: list[Path], text_column: str, document_start: re.Pattern[str] | None) -> None:
        unknown = [str(file) for file in files if file.suffix not in SUFFIXES]
        if unknown:
            raise ValueError(f"{unknown[0]} is of an unknown kind; files must end in {', '.join(SUFFIXES)}")
        self.name = name
        self.files = files
        self.text_column = text_column
        self.document_start = document_start

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def pieces(self, split: str) -> Iterator[Piece]:
        require_split(self, split)
        for file in self.files:
            if file.suffix == ".txt":
                yield from cut(text_chunks(file))
            else:
                yield from row_pieces(ROW_READERS[file.suffix](file, self.text_column), self.document_start)

    def identity(self) -> dict[str, Any]:
        return {"files": [_stat_of(file, file.name) for file in self.files]}


class HubSource:
    """A Hub data set, or its mirror in a local folder: the same call of `datasets`, streamed.

    Args:
        name: The Hub name, or the folder as given.
        folder: The local mirror, or None to read from the Hub.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        subset: str | None,
        text_column: str,
        revision: str | None,
        document_start: re.Pattern[str] | None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.subset = subset
        self.text_column = text_column
        self.revision = revision
        self.document_start = document_start
        self._loaded: dict[str, Any] | None = None

    def splits(self) -> tuple[str, ...]:
        return tuple(str(split) for split in self._load())

    def pieces(self, split: str) -> Iterator[Piece]:
        require_split(self, split)
        return row_pieces(self._rows(split), self.document_start)

    def identity(self) -> dict[str, Any]:
        if self.folder is None:
            return {"hub": self.name, "subset": self.subset, "revision": self.revision}
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        return {
            "subset": self.subset,
            "files": [_stat_of(file, str(file.relative_to(self.folder))) for file in files],
        }

    def _rows(self, split: str) -> Iterator[str]:
        rows = self._load()[split]
        try:
            if rows.column_names is not None:
                require_column(self.name, rows.column_names, self.text_column)
                rows = rows.select_columns([self.text_column])
            # Arrow tables instead of one dictionary per row: an order of magnitude faster.
            for table in rows.with_format("arrow").iter(batch_size=1000):
                yield from arrow_texts(self.name, table, self.text_column)
        except (OSError, RuntimeError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.name}: the split {split} is unreadable ({first_line(error)})") from error

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
            except (OSError, RuntimeError, pyarrow.ArrowException) as error:
                raise ValueError(f"cannot open the data set {self.name}: {first_line(error)}") from error
        return self._loaded


def _is_mirror(folder: Path) -> bool:
    readme = folder / "README.md"
    if readme.is_file():
        header = re.match(r"---\r?\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if header and re.search(r"^(configs|dataset_info):", header[1], re.MULTILINE):
            return True
    tables = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    return any(_TRAIN_FILE.match(table.name) or _EVALUATION_FILE.match(table.name) for table in tables)


def _files_below(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"the folder {folder} has no file that ends in {', '.join(SUFFIXES)}")
    held_out = [file.name for file in files if _EVALUATION_FILE.match(file.name)]
    if held_out and any(_TRAIN_FILE.match(file.name) for file in files):
        # Reading all of them as training data would train on the evaluation data, silently.
        raise ValueError(
            f"the folder {folder} holds files named by split ({held_out[0]}, ...); name them one by one:"
            " path, validation_path, test_path"
        )
    return files


def _mirror_of(name: str) -> Path | None:
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


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"document_start ({pattern!r}) is not a regular expression: {error}") from error


def _stat_of(file: Path, name: str) -> list[str | int]:
    status = file.stat()
    return [name, status.st_size, status.st_mtime_ns]
