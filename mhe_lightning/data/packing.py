"""From batches of text to the shards of a split."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from mhe_lightning.data.pieces import Piece
from mhe_lightning.data.tokenizer import end_of_text_id

BATCH_BYTES = 128_000
"""Text of a batch. Its encodings take many times its memory: where they do not fit into a core's cache, the same work
takes a fifth longer; smaller batches cost more in passing them on."""
PROGRESS_INTERVAL_S = 5.0

_SPACE_OR_NOT = bytes(ord(" " if chr(code).isspace() else "x") for code in range(256))


def in_batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    """Pieces in lists of about `BATCH_BYTES` of text."""
    batch: list[tuple[str, Piece]] = []
    size = 0
    for split, piece in pieces:
        batch.append((split, piece))
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    batches: Iterable[list[tuple[str, Piece]]],
    tokenizer: Tokenizer,
    dtype: npt.DTypeLike = np.int64,
    threads: int | None = None,
) -> Iterator[tuple[list[tuple[str, Piece]], list[npt.NDArray[Any]]]]:
    """Each batch with the token ids of each of its pieces, in order; an end-of-text token follows each document.

    The next batches are encoded meanwhile (Rust releases the GIL).

    Args:
        batches: as `in_batches` makes them.
        tokenizer: of which a copy is used.
        dtype: of the ids.
        threads: that encode, each a batch of its own; one batch more than that is held in memory. By default one for
            each core that this process may use.
    """
    threads = threads or available_cores()
    end = [end_of_text_id(tokenizer)]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    # A document that spells out a special token gets its characters: text cannot end a document.
    tokenizer.encode_special_tokens = True

    def encode(batch: list[tuple[str, Piece]]) -> list[npt.NDArray[Any]]:
        encodings = tokenizer.encode_batch_fast([piece.text for _, piece in batch], add_special_tokens=False)
        # Encodings take a hundred bytes a token: they end here, in the thread and the cache that they were made in.
        return [
            np.array(encoding.ids + end if piece.ends_document else encoding.ids, dtype=dtype)
            for (_, piece), encoding in zip(batch, encodings, strict=True)
        ]

    waiting: deque[tuple[list[tuple[str, Piece]], Future[list[npt.NDArray[Any]]]]] = deque()
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > threads:
                first, tokens = waiting.popleft()
                yield first, tokens.result()
        while waiting:
            first, tokens = waiting.popleft()
            yield first, tokens.result()


def available_cores() -> int:
    """The cores that this process may use: a job's share of a machine, not all of it, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def by_split(
    batch: list[tuple[str, Piece]], tokens: list[npt.NDArray[Any]]
) -> dict[str, tuple[list[Piece], npt.NDArray[Any]]]:
    """The pieces of a batch for each split in it, and their tokens one after another."""
    parts: defaultdict[str, tuple[list[Piece], list[npt.NDArray[Any]]]] = defaultdict(lambda: ([], []))
    for (split, piece), own in zip(batch, tokens, strict=True):
        parts[split][0].append(piece)
        parts[split][1].append(own)
    return {split: (pieces, np.concatenate(own)) for split, (pieces, own) in parts.items()}


def count_words(texts: Iterable[str]) -> int:
    """The sum of ``len(text.split())``, without making an object of each word where a text is ASCII."""
    plain: list[str] = []
    words = 0
    for text in texts:
        if text.isascii():
            plain.append(text)
        else:
            words += len(text.split())
    marks = "\n".join(["", *plain]).encode("ascii").translate(_SPACE_OR_NOT)
    return words + marks.count(b" x")


class SplitWriter:
    """Writes the shards of one split and keeps its counts."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, end_of_text: int) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.documents = self.words = self.bytes = 0
        self.text_hash = hashlib.sha256()
        self.file: Any = None
        self.written = 0
        self.write(np.array([end_of_text], dtype=dtype))

    def count(self, pieces: list[Piece]) -> int:
        """Add pieces of text to the counts; returns their bytes."""
        texts = [piece.text for piece in pieces]
        ends = [piece.ends_document for piece in pieces]
        documents = sum(ends)
        data = "".join(text + "\0" if end else text for text, end in zip(texts, ends, strict=True)).encode()
        self.text_hash.update(data)
        size = len(data) - documents
        self.bytes += size
        self.documents += documents
        # An end of line for each line, also for the last of a document that has none.
        self.words += count_words(texts) + data.count(b"\n")
        self.words += sum(end and not text.endswith("\n") for text, end in zip(texts, ends, strict=True))
        return size

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append tokens, over as many shards as it takes."""
        while len(tokens):
            if self.file is None:
                self._begin_shard()
            part, tokens = np.split(tokens, [self.shard_tokens - self.written])
            data = part.tobytes()
            self.file.write(data)
            self.shard_hash.update(data)
            self.written += len(part)
            if self.written == self.shard_tokens:
                self._end_shard()

    def close(self, duplicates_removed: int) -> dict[str, Any]:
        """Finish the last shard; returns the split's entry in the manifest."""
        if self.file is not None:
            self._end_shard()
        return {
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": self.documents,
            "duplicates_removed": duplicates_removed,
            "words": self.words,
            "bytes": self.bytes,
            "corpus_sha256": self.text_hash.hexdigest(),
            "shards": self.shards,
        }

    def _begin_shard(self) -> None:
        self.name = f"{self.split}-{len(self.shards):05d}.bin"
        self.file = (self.folder / self.name).open("wb")
        self.shard_hash = hashlib.sha256()
        self.written = 0

    def _end_shard(self) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file = None
        size = self.written * np.dtype(self.dtype).itemsize
        entry = {
            "file": self.name,
            "tokens": self.written,
            "bytes": size,
            "sha256": self.shard_hash.hexdigest(),
        }
        self.shards.append(entry)


@contextmanager
def reporting(what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Report text done, in bytes, on stderr: a bar on a terminal, lines elsewhere. Yields the counter."""
    terminal = sys.stderr.isatty()
    began = reported = time.monotonic()
    total = 0

    def report() -> None:
        rate = total / max(time.monotonic() - began, 1e-9)
        print(f"prepare: {what}, {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s", file=sys.stderr, flush=True)

    def update(size: int) -> None:
        nonlocal total, reported
        total += size
        bar.update(size)
        if shown and not terminal and time.monotonic() - reported >= PROGRESS_INTERVAL_S:
            reported = time.monotonic()
            report()

    silent = not (shown and terminal)
    with tqdm(desc=f"prepare: {what}", unit="B", unit_scale=True, file=sys.stderr, disable=silent) as bar:
        yield update
    if shown and not terminal:
        report()
