"""Documents become tokens, packed once into memory-mapped shards.

`prepare` goes through these steps:

1. Look for a finished corpus of the same specification and source files; if its checksums match, use it.
2. Open the sources and send every piece of text to a split: the source's own, or every k-th to validation and
   test. Exact duplicates are dropped here.
3. Train the tokenizer, on text of the training split only, or load the one that is named.
4. Tokenize batches of text on all cores (in Rust), each in a thread, while the next ones are being read.
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
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from mhe_lightning.data.assignment import SPLITS, Assignment
from mhe_lightning.data.packed import FORMAT_VERSION, MANIFEST, TOKENIZER, CorpusError, PackedCorpus, open_corpus
from mhe_lightning.data.packing import SplitWriter, by_split, encoded, in_batches, reporting
from mhe_lightning.data.pieces import Source
from mhe_lightning.data.sources import FileSource, open_source
from mhe_lightning.data.tokenizer import (
    KINDS,
    TokenizerKind,
    check_vocab_size,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from mhe_lightning.files import build_folder, sha256, write_text

TOKENIZER_TRAINING_BYTES = 200_000_000


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
        pack_train: Pack the training split too. False leaves it out, to be streamed (`training_tokens`): then
            the tokenizer must be a file, and nothing can be held out.

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
    pack_train: bool = True

    def __post_init__(self) -> None:
        # jsonargparse (4.53 and before) makes the text "None" of `--data.corpus.subset null`
        for name in ("subset", "revision", "document_start", "validation_path", "test_path"):
            if getattr(self, name) == "None":
                object.__setattr__(self, name, None)
        splits = {split: None if theirs == "None" else theirs for split, theirs in self.splits.items()}
        object.__setattr__(self, "splits", splits)
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
        if not self.pack_train and self.tokenizer in KINDS:
            problems.append(
                f"pack_train is false, so that there is no text to train a tokenizer ({self.tokenizer}) on; set "
                "tokenizer to the path of a tokenizer.json"
            )
        if not self.pack_train and self.held_out():
            problems.append(
                f"pack_train is false, so that no {' or '.join(self.held_out())} split can be held out; name the "
                "source's own split for it, or set its fraction to 0"
            )
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

    def assignment(self, *, train: bool = True) -> Assignment:
        """Opens the sources; `train` False leaves the training split out."""
        inputs = [given for given in self.inputs() if train or given[0] != "train"]
        return Assignment(inputs, self.held_out(), self.deduplicate)

    def training_tokens(self, tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int64]]:
        """Token ids of the training split, read and tokenized batch by batch; nothing is stored.

        Each document is followed by the end-of-text token. With one such token before it, all of this is what
        the training split is packed to.
        """
        for _, tokens in encoded(in_batches(self.assignment().training_pieces()), tokenizer):
            yield np.concatenate(tokens)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-able values."""
        return {**dataclasses.asdict(self), "splits": dict(self.splits)}

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the options that matter, the source's files and the tokenizer's."""
        options = self.as_dict()
        del options["pack_train"]  # whether the sources below include the training split
        defaults = {option.name: option.default for option in dataclasses.fields(self)}
        for split in ("validation", "test"):
            if self._given(split):
                options[f"{split}_fraction"] = defaults[f"{split}_fraction"]
        facts: dict[str, Any] = {"format_version": FORMAT_VERSION, "spec": options}
        if self.tokenizer not in KINDS:
            facts["tokenizer"] = sha256(tokenizer_file(self.tokenizer))
            options.update(tokenizer="file", tokenizer_size=defaults["tokenizer_size"])
        facts["sources"] = [
            [split, source.identity(), theirs]
            for split, source, theirs in self.inputs()
            if self.pack_train or split != "train"
        ]
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
    target = Path(cache_dir).expanduser() / spec.folder_name()
    fingerprint = target.name.rpartition("-")[2]
    build_folder(
        target,
        build=lambda folder: _build(spec, folder, fingerprint=fingerprint, progress=progress),
        is_usable=_is_usable,
    )
    return open_corpus(target, verify=False)


def find_corpus(spec: CorpusSpec, cache_dir: str | Path) -> Path | None:
    """The folder of the finished corpus, or None if it has to be prepared first. Checks no checksums."""
    folder = Path(cache_dir).expanduser() / spec.folder_name()
    return folder if (folder / MANIFEST).is_file() else None


def _is_usable(target: Path) -> bool:
    """Whether the corpus in `target` is whole; if it is damaged, a line on stderr says why."""
    try:
        open_corpus(target, again=True)
    except CorpusError as error:
        print(
            f"prepare: building the corpus anew, because {error}".removesuffix("; run prepare again"),
            file=sys.stderr,
        )
        return False
    return True


def _build(spec: CorpusSpec, folder: Path, fingerprint: str, progress: bool) -> None:
    """Steps 2 to 6, into `folder`."""
    assignment = spec.assignment(train=spec.pack_train)
    tokenizer = _make_tokenizer(spec, assignment, progress)
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    end = end_of_text_id(tokenizer)
    write_text(folder / TOKENIZER, tokenizer.to_str())
    writers = {split: SplitWriter(folder, split, dtype, spec.shard_tokens, end) for split in assignment.splits}
    with reporting("tokenizing", progress) as count:
        for batch, tokens in encoded(in_batches(assignment.pieces()), tokenizer, dtype):
            for split, (pieces, own) in by_split(batch, tokens).items():
                writers[split].write(own)
                count(writers[split].count(pieces))
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
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2))


def _make_tokenizer(spec: CorpusSpec, assignment: Assignment, progress: bool) -> Tokenizer:
    """Step 3."""
    if spec.tokenizer not in KINDS:
        return load_tokenizer(spec.tokenizer)
    with reporting("training the tokenizer", progress) as count:
        texts = _training_texts(assignment, count)
        first = next(texts, None)
        if first is None:
            raise _empty(spec, "train")
        return train_tokenizer(chain((first,), texts), cast(TokenizerKind, spec.tokenizer), spec.tokenizer_size)


def _training_texts(assignment: Assignment, count: Callable[[int], None]) -> Iterator[str]:
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
