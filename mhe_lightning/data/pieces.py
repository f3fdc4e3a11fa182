"""Pieces of documents: what a source hands out, and how long documents are cut.

A short document is one piece, a long one several, so that memory stays bounded however long a document is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple, Protocol

PIECE_CHARS = 2**15

_LINE_BREAK = re.compile(r"\n(?<=\S\n)(?=\S)")
_LAST_SPACE = re.compile(r"(?=\s\S)")


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


def require_split(source: Source, split: str) -> None:
    """ValueError with the splits there are, unless the source has this one."""
    if split not in source.splits():
        raise ValueError(f"{source.name} has no split {split!r}; it has {', '.join(source.splits())}")


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
