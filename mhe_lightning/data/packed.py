"""Packed corpora on disk: memory-mapped tokens, and whether they are whole."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mhe_lightning.data.tokenizer import load_tokenizer, serialized_hash
from mhe_lightning.data.verified import damaged_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


class CorpusError(ValueError):
    """A packed corpus that is missing, damaged or empty; the message names the file and the remedy."""


@dataclass(frozen=True)
class SplitCounts:
    """Size of a split.

    `words` are white-space separated words and one end of line for each line, the convention by which word-level
    perplexities on WikiText and the Penn Treebank are stated; `bytes` are those of the text in UTF-8.
    """

    tokens: int
    documents: int
    words: int
    bytes: int


class PackedSplit:
    """The tokens of one split as one long sequence, memory-mapped shard by shard."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], dtype: str) -> None:
        self.folder = folder
        self.counts = SplitCounts(**{key.name: entry[key.name] for key in dataclasses.fields(SplitCounts)})
        self._dtype = np.dtype(dtype)
        self._files = [shard["file"] for shard in entry["shards"]]
        self._starts: list[int] = [0, *accumulate(shard["tokens"] for shard in entry["shards"])]
        self._maps: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `stop` (exclusive), a copy of shape (stop - start,).

        Raises:
            ValueError: The range does not lie within the split.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens [{start}, {stop}) are not within this split; it has {len(self)} tokens")
        tokens = np.empty(stop - start, dtype=np.int64)
        shard = bisect_right(self._starts, start) - 1
        position = start
        while position < stop:
            end = min(stop, self._starts[shard + 1])
            offset = self._starts[shard]
            tokens[position - start : end - start] = self._map(shard)[position - offset : end - offset]
            position, shard = end, shard + 1
        return tokens

    def _map(self, shard: int) -> npt.NDArray[Any]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self._files[shard], dtype=self._dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would carry the whole shard to each worker of a data loader.
        return {**self.__dict__, "_maps": {}}


class PackedCorpus:
    """A finished corpus on disk. Made by `prepare` and `open_corpus`.

    Args:
        folder: The folder that holds the shards, the tokenizer and the manifest.
        manifest: Contents of its manifest.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder / self.manifest["tokenizer"]["file"])
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of embedding rows that the tokens need."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def end_of_text_id(self) -> int:
        """Id of the token that stands before the first document and after each."""
        return int(self.manifest["tokenizer"]["end_of_text_id"])

    def split(self, name: str) -> PackedSplit:
        """One split; ValueError with the names there are if it is unknown."""
        splits = self.manifest["splits"]
        if name not in splits:
            raise ValueError(f"the corpus {self.folder} has no split {name!r}; it has {', '.join(splits) or 'none'}")
        return PackedSplit(self.folder, splits[name], self.manifest["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}


def open_corpus(folder: str | Path, *, verify: bool = True, again: bool = False) -> PackedCorpus:
    """Open a finished corpus.

    Args:
        folder: Folder of the corpus.
        verify: Compare the SHA-256 of each shard with the manifest, of those that were touched since they were last
            found whole. Sizes and the tokenizer are compared in any case.
        again: Compare all of them.

    Raises:
        CorpusError: Something is missing, damaged, or of another format version.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder / MANIFEST)
    try:
        _check_tokenizer(folder / manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"])
        for entry in manifest["splits"].values():
            for shard in entry["shards"]:
                _check_size(folder / shard["file"], shard, np.dtype(manifest["dtype"]).itemsize)
        if verify:
            _check_content(folder, manifest, again)
        corpus = PackedCorpus(folder, manifest)
        for split in manifest["splits"]:
            if len(corpus.split(split)) != corpus.split(split).counts.tokens:
                raise CorpusError(f"{folder / MANIFEST}: its token counts disagree; run prepare again")
    except (KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{folder / MANIFEST} is damaged ({error!r}); run prepare again") from error
    return corpus


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CorpusError(f"{file} cannot be read ({error.strerror}); run prepare first") from error
    except ValueError as error:
        raise CorpusError(f"{file} is damaged (not JSON); run prepare again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(f"{file} has format version {version}, this code reads {FORMAT_VERSION}; run prepare again")
    return cast("dict[str, Any]", manifest)


def _check_tokenizer(file: Path, expected: str) -> None:
    try:
        actual = serialized_hash(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{file} is missing or damaged; run prepare again") from error
    if actual != expected:
        raise CorpusError(f"{file}: this tokenizer does not match the shards; run prepare again")


def _check_size(file: Path, shard: Mapping[str, Any], itemsize: int) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        raise CorpusError(f"{file} is missing; run prepare again")
    if size != shard["bytes"] or size != shard["tokens"] * itemsize:
        raise CorpusError(f"{file} has {size} bytes instead of {shard['bytes']}; run prepare again")


def _check_content(folder: Path, manifest: Mapping[str, Any], again: bool) -> None:
    shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
    damaged = damaged_file(folder, {shard["file"]: shard["sha256"] for shard in shards}, again=again)
    if damaged is not None:
        raise CorpusError(f"{folder / damaged} is damaged: its SHA-256 differs from the manifest; run prepare again")
