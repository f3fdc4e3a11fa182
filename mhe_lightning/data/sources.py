"""Where documents come from: local files, Hub data sets and their mirrors, Python's own prose.

`open_source` decides from a path what kind of source it is.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhe_lightning.data.embedded import EmbeddedSource
from mhe_lightning.data.hub import HUB_NAME, HubDataset, mirror_of, stat_of
from mhe_lightning.data.pieces import Piece, Source, cut, require_split, row_pieces
from mhe_lightning.data.rows import ROW_READERS, arrow_texts, text_chunks

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

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
            return HubSource(HubDataset(path, local, subset, revision), text_column, start)
        return FileSource(path, _files_below(local), text_column, start)
    if local.exists():
        return FileSource(path, [local], text_column, start)
    if glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(str(local), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"the pattern {path} matches no file; check it with `ls`")
        return FileSource(path, files, text_column, start)
    if path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or not HUB_NAME.fullmatch(path):
        raise ValueError(f"{path} does not exist; give a file, a folder, a glob pattern or the name of a Hub data set")
    return HubSource(HubDataset(path, mirror_of(path), subset, revision), text_column, start)


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
        return {"files": [stat_of(file, file.name) for file in self.files]}


class HubSource:
    """A Hub data set, or its mirror in a local folder, as documents."""

    def __init__(self, data_set: HubDataset, text_column: str, document_start: re.Pattern[str] | None) -> None:
        self.name = data_set.name
        self.data_set = data_set
        self.text_column = text_column
        self.document_start = document_start

    def splits(self) -> tuple[str, ...]:
        return self.data_set.splits()

    def pieces(self, split: str) -> Iterator[Piece]:
        require_split(self, split)
        return row_pieces(self._rows(split), self.document_start)

    def identity(self) -> dict[str, Any]:
        return self.data_set.identity()

    def _rows(self, split: str) -> Iterator[str]:
        for table in self.data_set.tables(split, [self.text_column], remedy="set text_column to one of"):
            yield from arrow_texts(self.name, table, self.text_column)


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


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(f"document_start ({pattern!r}) is not a regular expression: {error}") from error
