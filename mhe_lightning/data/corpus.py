"""Documents become tokens, packed once into memory-mapped shards.

`prepare` goes through these steps:

1. Look for a finished corpus of the same specification and source files; if its checksums match, use it.
2. Open the sources and send every piece of text to a split: the source's own, or every k-th to validation and
   test. Exact duplicates are dropped here.
3. Train the tokenizer, on text of the training split only, or load the one that is named.
4. Tokenize batches of a few megabytes on all cores (in Rust) while the next batch is being read.
5. Write the tokens of each split to shards: one end-of-text token, then each document followed by another.
6. Write the manifest (counts and checksums) last, and rename the finished folder into its place.

Until step 6 everything happens in a temporary folder beside the target, so that a killed run leaves nothing
that looks finished, and of two runs at once the later one uses the folder of the other. Memory is bounded by
the batches in flight, the text that the tokenizer is trained on, and, where duplicates are dropped, a digest
of 16 bytes (about 100 in Python) per document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from math import floor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm

from mhe_lightning.data.sources import FileSource, Piece, Source, open_source
from mhe_lightning.data.tokenizer import (
    KINDS,
    TokenizerKind,
    check_vocab_size,
    end_of_text_id,
    load_tokenizer,
    serialized_hash,
    tokenizer_file,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
BATCH_BYTES = 4_000_000
TOKENIZER_TRAINING_BYTES = 200_000_000
HASH_BLOCK_BYTES = 4 * 2**20
PROGRESS_INTERVAL_S = 5.0


class CorpusError(ValueError):
    """A packed corpus that is missing, damaged or empty; the message names the file and the remedy."""


@dataclass(frozen=True)
class CorpusSpec:
    """What a packed corpus is made of.

    Args:
        path: Where the documents are; see `open_source`, also for the next four.
        subset: Configuration of a Hub data set.
        text_column: Column (or JSON key) that holds the text.
        revision: Git revision of a Hub data set.
        document_start: Regular expression for the row that begins a document; by default each row is one.
        splits: Our `train`, `validation`, `test` → the name of that split in the source, or None.
        validation_path: Local files to use as validation split instead.
        test_path: Local files to use as test split instead.
        validation_fraction: Without a validation split, the share of the training documents (0 to 1) to hold
            out as one; pieces of long documents count as documents, so that a single file can be split.
        test_fraction: The same for a test split.
        deduplicate: Drop exact duplicates within each split, and from the training split also what is in the
            others. Always done where a split is held out, so that no document is on both sides.
        tokenizer: `bpe` or `wordpiece` to train one, or the path of a tokenizer.json.
        tokenizer_size: Largest vocabulary of a tokenizer that is trained, which happens on the first 200 MB
            of the training split.
        shard_tokens: Most tokens per shard file.

    Raises:
        ValueError: All options that make no sense, at once.
    """

    path: str
    subset: str | None = None
    text_column: str = "text"
    revision: str | None = None
    document_start: str | None = None
    splits: Mapping[str, str | None] = field(default_factory=lambda: {"train": "train"})
    validation_path: str | None = None
    test_path: str | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.0
    deduplicate: bool = False
    tokenizer: str = "bpe"
    tokenizer_size: int = 8192
    shard_tokens: int = 2**26

    def __post_init__(self) -> None:
        problems = []
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            problems.append(f"splits names {', '.join(unknown)}; its keys must be among {', '.join(SPLITS)}")
        if not self.splits.get("train"):
            problems.append("splits names no training split; set splits.train to the source's name for it")
        for split, separate in (("validation", self.validation_path), ("test", self.test_path)):
            if separate and self.splits.get(split):
                problems.append(f"splits.{split} and {split}_path are both set; leave out one of them")
        for option in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, option) < 1:
                problems.append(f"{option} ({getattr(self, option)}) must be at least 0 and less than 1; try 0.05")
        if self.validation_fraction + self.test_fraction >= 1:
            problems.append("validation_fraction and test_fraction leave nothing to train on; try 0.05 each")
        if self.shard_tokens < 1:
            problems.append(f"shard_tokens ({self.shard_tokens}) must be at least 1; try {2**26}")
        if self.tokenizer in KINDS:
            try:
                check_vocab_size(self.tokenizer, self.tokenizer_size)
            except ValueError as error:
                problems.append(f"tokenizer_size: {error}")
        if problems:
            raise ValueError("; ".join(problems))

    def held_out(self) -> dict[str, float]:
        """The splits that are cut from the training split, and their shares of it."""
        shares = {
            "validation": 0.0 if self._given("validation") else self.validation_fraction,
            "test": 0.0 if self._given("test") else self.test_fraction,
        }
        return {split: share for split, share in shares.items() if share > 0}

    def inputs(self) -> list[tuple[str, Source, str]]:
        """(our split, source, its split) for each split that is not cut here; the training split comes last."""
        main = open_source(
            self.path,
            subset=self.subset,
            text_column=self.text_column,
            revision=self.revision,
            document_start=self.document_start,
        )
        inputs = []
        for split, separate in (
            ("test", self.test_path),
            ("validation", self.validation_path),
            ("train", None),
        ):
            theirs = self.splits.get(split)
            if separate:
                inputs.append((split, self._open_separate(f"{split}_path", separate), "train"))
            elif theirs:
                inputs.append((split, main, theirs))
        return inputs

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-able values."""
        return {**dataclasses.asdict(self), "splits": dict(self.splits)}

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the options, the source's files and the tokenizer's file."""
        facts: dict[str, Any] = {"format_version": FORMAT_VERSION, "spec": self.as_dict()}
        facts["sources"] = [[split, source.identity(), theirs] for split, source, theirs in self.inputs()]
        if self.tokenizer not in KINDS:
            facts["tokenizer"] = hashlib.sha256(tokenizer_file(self.tokenizer).read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def folder_name(self) -> str:
        """Name of the corpus' folder: what it is, for people, and the fingerprint."""
        label = "-".join(filter(None, (Path(self.path).name or "corpus", self.subset)))
        return f"{re.sub(r'[^A-Za-z0-9._]+', '-', label).strip('-.')[:60] or 'corpus'}-{self.fingerprint()}"

    def _given(self, split: str) -> bool:
        separate = self.validation_path if split == "validation" else self.test_path
        return bool(separate or self.splits.get(split))

    def _open_separate(self, option: str, path: str) -> Source:
        source = open_source(path, text_column=self.text_column, document_start=self.document_start)
        if not isinstance(source, FileSource):
            raise ValueError(
                f"{option} ({path}) must be a local file or pattern; for a data set's own split use splits"
            )
        return source


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
            raise ValueError(f"the corpus {self.folder} has no split {name!r}; it has {', '.join(splits)}")
        return PackedSplit(self.folder, splits[name], self.manifest["dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}


def prepare(spec: CorpusSpec, cache_dir: str | Path, *, progress: bool = True) -> PackedCorpus:
    """Pack a corpus, or return the packed one if nothing has changed since.

    Args:
        spec: What to pack.
        cache_dir: Folder of corpora; each gets a folder of its own in it, named by its fingerprint.
        progress: Report progress on stderr: a bar on a terminal, otherwise a line every few seconds.

    Raises:
        ValueError: The source or the tokenizer cannot be used.
        CorpusError: A split is empty.
    """
    cache = Path(cache_dir).expanduser()
    target = cache / spec.folder_name()
    finished = _usable(target)
    if finished is not None:
        return finished
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    building = cache / f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    building.mkdir()
    try:
        _build(spec, building, fingerprint=target.name.rpartition("-")[2], progress=progress)
        _publish(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_corpus(target, verify=False)


def find_corpus(spec: CorpusSpec, cache_dir: str | Path) -> Path | None:
    """The folder of the finished corpus, or None if it has to be prepared first. Checks no checksums."""
    folder = Path(cache_dir).expanduser() / spec.folder_name()
    return folder if (folder / MANIFEST).is_file() else None


def open_corpus(folder: str | Path, *, verify: bool = True) -> PackedCorpus:
    """Open a finished corpus.

    Args:
        folder: Folder of the corpus.
        verify: Compare the SHA-256 of each shard with the manifest, at the speed of the disk. Sizes and the
            tokenizer are compared in any case.

    Raises:
        CorpusError: Something is missing, damaged, or of another format version.
    """
    folder = Path(folder).expanduser()
    manifest = _read_manifest(folder / MANIFEST)
    try:
        _check_tokenizer(folder / manifest["tokenizer"]["file"], manifest["tokenizer"]["sha256"])
        for entry in manifest["splits"].values():
            for shard in entry["shards"]:
                _check_shard(folder / shard["file"], shard, np.dtype(manifest["dtype"]).itemsize, verify)
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


def _check_shard(file: Path, shard: Mapping[str, Any], itemsize: int, verify: bool) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size is None:
        raise CorpusError(f"{file} is missing; run prepare again")
    if size != shard["bytes"] or size != shard["tokens"] * itemsize:
        raise CorpusError(f"{file} has {size} bytes instead of {shard['bytes']}; run prepare again")
    if verify and _file_hash(file) != shard["sha256"]:
        raise CorpusError(f"{file} is damaged: its SHA-256 differs from the manifest; run prepare again")


def _file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _usable(target: Path) -> PackedCorpus | None:
    """The corpus in `target` if it is whole; None, and one line on stderr if it is damaged, otherwise."""
    if not target.exists():
        return None
    try:
        return open_corpus(target)
    except CorpusError as error:
        print(
            f"prepare: building the corpus anew, because {error}".removesuffix("; run prepare again"),
            file=sys.stderr,
        )
        return None


def _remove_leftovers(cache: Path) -> None:
    """Remove what killed runs on this machine left; a folder whose process is alive or elsewhere stays."""
    pattern = re.compile(rf"\..*\.tmp-{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+(-damaged)?")
    for folder in cache.iterdir():
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


def _publish(building: Path, target: Path) -> None:
    """Rename the finished folder into its place, unless another run was faster."""
    try:
        os.rename(building, target)
    except OSError:
        if not target.exists():
            raise
        if _usable(target) is not None:
            return
        damaged = building.with_name(building.name + "-damaged")
        os.rename(target, damaged)
        os.rename(building, target)
        shutil.rmtree(damaged, ignore_errors=True)
    _sync_folder(target.parent)


def _build(spec: CorpusSpec, folder: Path, fingerprint: str, progress: bool) -> None:
    """Steps 2 to 6, into `folder`."""
    assignment = _Assignment(spec)
    tokenizer = _make_tokenizer(spec, assignment, progress)
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    end = end_of_text_id(tokenizer)
    _write_durably(folder / TOKENIZER, tokenizer.to_str().encode())
    writers = {split: _SplitWriter(folder, split, dtype, spec.shard_tokens, end) for split in assignment.splits}
    with _progress("tokenizing", progress) as count:
        for batch, encodings in _encoded(_batches(assignment.pieces()), tokenizer):
            tokens: defaultdict[str, list[int]] = defaultdict(list)
            for (split, piece), encoding in zip(batch, encodings, strict=True):
                tokens[split] += encoding.ids
                if piece.ends_document:
                    tokens[split].append(end)
                count(writers[split].count(piece))
            for split, ids in tokens.items():
                writers[split].write(np.array(ids, dtype=dtype))
    splits = {split: writers[split].close(assignment.duplicates[split]) for split in assignment.splits}
    for split, entry in splits.items():
        if entry["documents"] == 0:
            raise _empty(spec, split)
    manifest = {
        "format_version": FORMAT_VERSION,
        "spec": spec.as_dict(),
        "fingerprint": fingerprint,
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": tokenizer_hash(tokenizer),
            "vocab_size": vocab_size,
            "end_of_text_id": end,
        },
        "corpus_sha256": hashlib.sha256("".join(e["corpus_sha256"] for e in splits.values()).encode()).hexdigest(),
        "dtype": dtype,
        "splits": splits,
    }
    _write_durably(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    _sync_folder(folder)


def _make_tokenizer(spec: CorpusSpec, assignment: _Assignment, progress: bool) -> Tokenizer:
    """Step 3."""
    if spec.tokenizer not in KINDS:
        return load_tokenizer(spec.tokenizer)
    with _progress("training the tokenizer", progress) as count:
        texts = _training_texts(assignment, count)
        first = next(texts, None)
        if first is None:
            raise _empty(spec, "train")
        return train_tokenizer(chain((first,), texts), cast(TokenizerKind, spec.tokenizer), spec.tokenizer_size)


def _training_texts(assignment: _Assignment, count: Callable[[int], None]) -> Iterator[str]:
    """Text of the training split, until the limit is reached."""
    total = 0
    for split, piece in assignment.pieces():
        if split == "train":
            size = len(piece.text.encode())
            count(size)
            yield piece.text
            total += size
            if total >= TOKENIZER_TRAINING_BYTES:
                return


def _empty(spec: CorpusSpec, split: str) -> CorpusError:
    remedy = f"raise {split}_fraction" if split in spec.held_out() else "check the source and text_column"
    return CorpusError(f"{spec.path} has no text for the split {split}; {remedy}")


class _Assignment:
    """Which pieces go to which split (step 2). Each call of `pieces` reads the sources from the beginning."""

    def __init__(self, spec: CorpusSpec) -> None:
        self.inputs = spec.inputs()
        self.shares = spec.held_out()
        self.deduplicate = spec.deduplicate or bool(self.shares)
        names = {split for split, _, _ in self.inputs} | set(self.shares)
        self.splits = tuple(split for split in SPLITS if split in names)
        self.duplicates: Counter[str] = Counter()

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """(split, piece) in order. A piece whose successor goes elsewhere ends its document."""
        self.duplicates.clear()
        seen: dict[str, set[bytes]] = {}
        for split, source, theirs in self.inputs:
            # The training split comes last and gives up what the others have; those keep what they share.
            known = set().union(*seen.values()) if split == "train" else set()
            seen[split] = known
            held: tuple[str, Piece] | None = None
            for piece, target in self._targets(split, source.pieces(theirs), known):
                if held is not None:
                    yield held if target == held[0] else (held[0], held[1]._replace(ends_document=True))
                held = None if target is None else (target, piece)
            if held is not None:
                yield held

    def _targets(self, split: str, pieces: Iterable[Piece], known: set[bytes]) -> Iterator[tuple[Piece, str | None]]:
        """Each piece with its split, or None for a duplicate."""
        turns = _Turns(self.shares if split == "train" else {})
        for piece in pieces:
            if self.deduplicate:
                digest = hashlib.blake2b(piece.text.encode(), digest_size=16).digest()
                if digest in known:
                    self.duplicates[split] += 1
                    yield piece, None
                    continue
                known.add(digest)
            yield piece, turns.next() or split


class _Turns:
    """Spreads held-out documents evenly: number i is taken when floor((i + 1) * share) > floor(i * share)."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares: list[tuple[str, float]] = []
        rest = 1.0
        for split, share in shares.items():
            # A later split chooses among what earlier ones left, so that equal shares do not collide.
            self.shares.append((split, share / rest))
            rest -= share
        self.asked = [0] * len(self.shares)

    def next(self) -> str | None:
        """The split that the next document goes to, or None if it is not held out."""
        for turn, (split, share) in enumerate(self.shares):
            number = self.asked[turn]
            self.asked[turn] += 1
            if floor((number + 1) * share) > floor(number * share):
                return split
        return None


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
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


def _encoded(
    batches: Iterable[list[tuple[str, Piece]]], tokenizer: Tokenizer
) -> Iterator[tuple[list[tuple[str, Piece]], list[Encoding]]]:
    """Each batch with its encodings; the next is encoded meanwhile, in a thread (Rust releases the GIL)."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    # A document that spells out a special token gets its characters: text cannot end a document.
    tokenizer.encode_special_tokens = True

    def encode(batch: list[tuple[str, Piece]]) -> list[Encoding]:
        return tokenizer.encode_batch_fast([piece.text for _, piece in batch], add_special_tokens=False)

    waiting: tuple[list[tuple[str, Piece]], Future[list[Encoding]]] | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in batches:
            encoding = pool.submit(encode, batch)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = batch, encoding
        if waiting is not None:
            yield waiting[0], waiting[1].result()


class _SplitWriter:
    """Writes the shards of one split and keeps its counts (step 5)."""

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

    def count(self, piece: Piece) -> int:
        """Add a piece of text to the counts; returns its bytes."""
        data = piece.text.encode()
        self.text_hash.update(data)
        self.bytes += len(data)
        self.words += len(piece.text.split()) + piece.text.count("\n")
        if piece.ends_document:
            self.documents += 1
            self.words += not piece.text.endswith("\n")
            self.text_hash.update(b"\0")
        return len(data)

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
        _sync_and_close(self.file)
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
def _progress(what: str, shown: bool) -> Iterator[Callable[[int], None]]:
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


def _write_durably(file: Path, data: bytes) -> None:
    stream = file.open("wb")
    stream.write(data)
    _sync_and_close(stream)


def _sync_and_close(stream: Any) -> None:
    with stream:
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as fsync of a file does for its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
