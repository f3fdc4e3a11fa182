"""Text files and the rows of JSON and parquet files; what cannot be read is named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

CHUNK_CHARS = 2**15
PARQUET_BUFFER_BYTES = 2**20


def text_chunks(file: Path) -> Iterator[str]:
    """The text of a UTF-8 file, in parts of a bounded size."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while chunk := stream.read(CHUNK_CHARS):
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
        raise ValueError(f"{where} is not valid JSON ({first_line(error)}); correct or remove it") from error


def _json_text(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object; each row must be one, such as {{{column!r}: ...}}")
    require_column(where, list(row), column)
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
        # Read ahead, or without a buffer, a row group is in memory as a whole, and a file may be a single one.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES) as parquet:
            require_column(str(file), parquet.schema_arrow.names, column)
            for batch in parquet.iter_batches(batch_size=1000, columns=[column]):
                yield from arrow_texts(str(file), batch, column)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({first_line(error)}); fetch it again") from error


ROW_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def arrow_texts(where: str, table: pyarrow.Table | pyarrow.RecordBatch, column: str) -> Iterator[str]:
    require_column(where, table.schema.names, column)
    values = table.column(column)
    if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
        raise ValueError(f"{where}: column {column!r} holds {values.type}, not text; choose another text_column")
    return (value or "" for value in values.to_pylist())


def require_column(where: str, columns: list[str], column: str, remedy: str = "set text_column to one of") -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}; {remedy} {', '.join(map(str, columns))}")


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
