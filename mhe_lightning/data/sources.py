"""Where documents come from: text, JSON and parquet files, Hub data sets and mirrors, Python's own prose.

A source hands out *pieces*: a short document is one piece, a long one several, so that memory stays bounded
however long a document is. `open_source` decides from a path what kind of source it is.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import inspect
import json
import os
import re
import socket
import sysconfig
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow
import pyarrow.parquet

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
PIECE_CHARS = 2**15
MIN_DOCSTRING_CHARS = 40
HUB_TIMEOUT_S = 2.0

_LINE_BREAK = re.compile(r"\n(?<=\S\n)(?=\S)")
_LAST_SPACE = re.compile(r"(?=\s\S)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TRAIN_FILE = re.compile(r"train(?![a-z])")
_EVALUATION_FILE = re.compile(r"(validation|valid|val|dev|test)(?![a-z])")
# Folders and files of the standard library that are tests, local set-up, or what some distributions of Python
# ship separately or patch: without them the corpus is the same for a Python version wherever it is installed.
_NOT_PROSE = frozenset(
    [
        *("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__", "tkinter"),
        *("turtledemo", "distutils", "ensurepip", "venv", "macholib", "sitecustomize.py", "usercustomize.py"),
    ]
)
_LOCAL_SETUP = re.compile(r"config-|_sysconfigdata|_distutils_system_mod")


class Piece(NamedTuple):
    """A part of a document: its text, and whether the document ends here."""

    text: str
    ends_document: bool


class Source(Protocol):
    """A place that documents come from.

    `name` is for people. `splits` names the splits there are, `pieces` yields the text of one of them, and
    `identity` is a JSON-able description that changes whenever the documents may have changed.
    """

    name: str

    def splits(self) -> tuple[str, ...]: ...

    def pieces(self, split: str) -> Iterator[Piece]: ...

    def identity(self) -> dict[str, Any]: ...


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


def cut(chunks: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[Piece]:
    """Cut one document, which arrives in chunks, into pieces of `limit` characters or a little more.

    Tokenizing the pieces gives the tokens of the whole. Preferably a piece ends with a line whose neighbours
    are not blank (`\\S\\n|\\S`): pre-tokenizers of every kind part there. If none turns up within twice the limit,
    it ends before the last space of a run (`\\s|\\s\\S`), where those of GPT-2 and BERT part too. Where neither
    exists the piece grows. A document of white space only has no pieces.
    """
    text, start = "", 0
    searched_lines = searched_spaces = 0  # a text without any place to cut at is searched once, not once per chunk
    for chunk in chunks:
        if start:
            searched_lines, searched_spaces = max(0, searched_lines - start), max(0, searched_spaces - start)
            text, start = text[start:], 0
        text += chunk
        while len(text) - start > limit:
            place = _LINE_BREAK.search(text, max(start + limit, searched_lines))
            if place is None:
                searched_lines = len(text) - 1
                if len(text) - start > 2 * limit:
                    place = _LAST_SPACE.search(text, max(start + limit, searched_spaces))
                    searched_spaces = searched_spaces if place else len(text) - 1
            if place is None:
                break
            yield Piece(text[start : place.end()], False)
            start = place.end()
    rest = text[start:]
    if rest and not rest.isspace():
        yield Piece(rest, True)


def row_pieces(rows: Iterable[str], start: re.Pattern[str] | None) -> Iterator[Piece]:
    """Rows as documents: each row one, or (with `start`) all rows from one match to the next, as lines."""
    if start is None:
        for row in rows:
            yield from cut((row,))
    else:
        lines = (row if row.endswith("\n") else row + "\n" for row in rows)
        for _, document in groupby(lines, key=_DocumentNumber(start)):
            yield from cut(document)


class _DocumentNumber:
    """Numbers the documents that lines belong to; blank lines before the first count as part of it."""

    def __init__(self, start: re.Pattern[str]) -> None:
        self.start = start
        self.number = 0
        self.only_blank = True

    def __call__(self, line: str) -> int:
        if not self.only_blank and self.start.search(line):
            self.number += 1
        self.only_blank = self.only_blank and line.isspace()
        return self.number


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
        _require_split(self, split)
        for file in self.files:
            if file.suffix == ".txt":
                yield from cut(_text_chunks(file))
            else:
                yield from row_pieces(_ROW_READERS[file.suffix](file, self.text_column), self.document_start)

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
        _require_split(self, split)
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
                _require_column(self.name, rows.column_names, self.text_column)
                rows = rows.select_columns([self.text_column])
            # Arrow tables instead of one dictionary per row: an order of magnitude faster.
            for table in rows.with_format("arrow").iter(batch_size=1000):
                yield from _texts(self.name, table, self.text_column)
        except (OSError, RuntimeError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self.name}: the split {split} is unreadable ({_first_line(error)})") from error

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
                raise ValueError(f"cannot open the data set {self.name}: {_first_line(error)}") from error
        return self._loaded


class EmbeddedSource:
    """English prose that every Python carries: its help topics and the docstrings of its standard library.

    2 MB of text, no download; the same for a Python version wherever it is installed. One split, `train`.
    """

    name = "embedded"

    def splits(self) -> tuple[str, ...]:
        return ("train",)

    def pieces(self, split: str) -> Iterator[Piece]:
        _require_split(self, split)
        return row_pieces(_embedded_documents(), None)

    def identity(self) -> dict[str, Any]:
        return {"embedded_sha256": _embedded_hash()}


def _library_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = ((file.relative_to(root), file) for file in root.rglob("*.py"))
    return sorted(
        (relative.as_posix(), file)
        for relative, file in files
        if not _NOT_PROSE.intersection(relative.parts) and not _LOCAL_SETUP.match(relative.parts[0])
    )


@lru_cache(maxsize=1)
def _embedded_hash() -> str:
    """Over the files that the corpus is read from: parsing them takes seconds, hashing them does not."""
    total = hashlib.sha256()
    for name, file in _library_files():
        total.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=1)
def _embedded_documents() -> tuple[str, ...]:
    from pydoc_data.topics import topics  # half a megabyte that nothing else needs

    documents = [topics[name] for name in sorted(topics)]
    for _, file in _library_files():
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # deliberately broken files, and encodings that do not decode
            continue
        documents += [docstring for docstring in _docstrings(tree) if len(docstring) >= MIN_DOCSTRING_CHARS]
    return tuple(documents)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module, class or function and of all within, in the order of the source."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    # Down through statements only: a walk over all expressions takes as long as parsing does.
    for block in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


def _text_chunks(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while chunk := stream.read(PIECE_CHARS):
                yield chunk
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error.reason} {error.object[error.start]:#04x}); convert it with iconv"
        ) from error


def _json_rows(file: Path, column: str) -> Iterator[str]:
    """Rows of a .jsonl (one object per line) or a .json (the same, or a single array of objects)."""
    with file.open("rb") as stream:
        beginning = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        stream.seek(0)
        if beginning.startswith(b"["):
            rows = _parse_json(stream.read(), str(file))
            yield from (_json_text(row, column, f"{file}, row {number}") for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{file}, line {number}"
                yield _json_text(_parse_json(line, where), column, where)


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({_first_line(error)}); correct or remove it") from error


def _json_text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object; each row must be one, such as {{{column!r}: ...}}")
    _require_column(where, list(row), column)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: {column!r} holds a {type(text).__name__}, not text; choose another text_column")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {column!r} is not valid Unicode ({error.reason}); correct or remove it") from error
    return text


def _parquet_rows(file: Path, column: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            _require_column(str(file), parquet.schema_arrow.names, column)
            for batch in parquet.iter_batches(batch_size=1000, columns=[column]):
                yield from _texts(str(file), batch, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({_first_line(error)}); fetch it again") from error


_ROW_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _texts(where: str, table: pyarrow.Table | pyarrow.RecordBatch, column: str) -> Iterator[str]:
    _require_column(where, table.schema.names, column)
    values = table.column(column)
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise ValueError(f"{where}: column {column!r} holds {values.type}, not text; choose another text_column")
    return (value or "" for value in values.to_pylist())


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


def _require_split(source: Source, split: str) -> None:
    if split not in source.splits():
        raise ValueError(f"{source.name} has no split {split!r}; it has {', '.join(source.splits())}")


def _require_column(where: str, columns: list[str], column: str) -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}; set text_column to one of {', '.join(map(str, columns))}")


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"document_start ({pattern!r}) is not a regular expression: {error}") from error


def _stat_of(file: Path, name: str) -> list[str | int]:
    status = file.stat()
    return [name, status.st_size, status.st_mtime_ns]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
