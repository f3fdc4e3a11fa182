"""What the data modules of examples share: rows of a Hub data set or of a mirror of it, tokenised once."""

from __future__ import annotations

import hashlib
import json
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from mhe_lightning.data.base import Batch, ExactDataModule
from mhe_lightning.data.hub import HubDataset, open_hub_dataset
from mhe_lightning.data.sequences import SequenceFormat
from mhe_lightning.data.tokenizer import (
    KINDS,
    TokenizerKind,
    expected_vocab_size,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from mhe_lightning.data.verified import damaged_file
from mhe_lightning.files import build_folder, sha256, write_text

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation", "test")

Row = dict[str, Any]
Example = dict[str, Any]


class Dropped(str):
    """Why a row gives no example."""


class ExampleData(ExactDataModule):
    """Examples made of the rows of a Hub data set or a mirror of it.

    A subclass says which columns it reads and how a row becomes one or several examples. `prepare` tokenises all
    splits into one Arrow file each, below ``cache_dir``; these are memory-mapped.

    Args:
        path: name of a Hub data set, or a folder in its layout.
        subset: configuration of the data set.
        revision: Git revision on the Hub.
        splits: our "train", "validation", "test" → the data set's names; several are joined by "+".
        tokenizer: path of a tokenizer.json, or the kind of one to train on the training split's texts.
        tokenizer_size: largest vocabulary of a tokenizer that is trained.
        max_length: most tokens of a sequence.
        batch_size: positions of the order of rows per micro-batch over all ranks.
        seed: of the order of the examples.
        eval_batch_size: examples per batch in evaluation; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        shuffle: whether training examples are permuted anew each epoch.
        cache_dir: folder of tokenised data sets.
    """

    schema: pyarrow.Schema
    """Columns of an example besides ``length`` and ``truncated``."""

    def __init__(
        self,
        *,
        path: str,
        subset: str | None,
        revision: str | None,
        splits: Mapping[str, str],
        tokenizer: str | None,
        tokenizer_size: int,
        max_length: int,
        batch_size: int,
        seed: int,
        eval_batch_size: int | None,
        num_workers: int,
        shuffle: bool,
        cache_dir: str,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle=shuffle,
        )
        unknown = sorted(set(splits) - set(SPLITS))
        if unknown:
            raise ValueError(f"splits names {', '.join(unknown)}; its keys must be among {', '.join(SPLITS)}")
        self.path = path
        self.subset = subset
        self.revision = revision
        self.splits = dict(splits)
        self.tokenizer_spec = tokenizer
        self.tokenizer_size = tokenizer_size
        self.max_length = max_length
        self.cache_dir = cache_dir
        self._source: HubDataset | None = None
        self._folder: Path | None = None
        self._manifest: dict[str, Any] | None = None
        self._tokenizer: Tokenizer | None = None
        self._tables: dict[str, pyarrow.Table] = {}

    # What a subclass defines

    @property
    @abstractmethod
    def label(self) -> str:
        """What the data are, for people and as the folder's name."""

    @abstractmethod
    def columns(self, split: str) -> list[str]:
        """The columns that a split must have."""

    @abstractmethod
    def texts(self, row: Row) -> Iterator[str]:
        """The texts of a row, to train a tokenizer on."""

    @abstractmethod
    def convert(
        self, rows: list[Row], names: list[str], part: str, split: str, form: SequenceFormat
    ) -> Sequence[Example | Dropped]:
        """Rows as examples; in the place of one that is left out, the reason.

        Args:
            rows: some rows of the data set, columns by name.
            names: of each row, for messages.
            part: what follows the "_" in the source split's name (MNLI's "matched"), "" without one.
            split: "train", "validation" or "test".
            form: makes token sequences.
        """

    def options(self) -> dict[str, Any]:
        """The options of the subclass that the examples depend on."""
        return {}

    def tokens_in(self, example: Example) -> int:
        """Tokens of an example, for the record of how much data there is."""
        return int(example["length"])

    # Preparation

    @property
    def prepared(self) -> bool:
        return (self.folder / MANIFEST).is_file()

    def prepare(self) -> None:
        build_folder(self.folder, build=self._build, is_usable=_is_usable)

    @property
    def folder(self) -> Path:
        """Where the tokenised examples are, or would be.

        Raises:
            ValueError: the source or the tokenizer cannot be used.
        """
        if self._folder is None:
            facts = {
                "format_version": FORMAT_VERSION,
                "class": type(self).__name__,
                "options": {**self.options(), "max_length": self.max_length, "splits": self.splits},
                "source": self.source.identity(),
                "tokenizer": self._tokenizer_identity(),
            }
            fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
            self._folder = Path(self.cache_dir).expanduser() / f"{self.label}-{fingerprint}"
        return self._folder

    @property
    def source(self) -> HubDataset:
        """The data set that rows are read from."""
        if self._source is None:
            self._source = open_hub_dataset(self.path, self.subset, self.revision)
        return self._source

    def _tokenizer_identity(self) -> str:
        if self.tokenizer_spec is None:
            raise ValueError(
                f"data.tokenizer is not set; give the path of a tokenizer.json, one of {', '.join(KINDS)} to train it "
                "on the training split, or a pretrained model (--init_from), whose tokenizer is taken"
            )
        if self.tokenizer_spec in KINDS:
            return f"{self.tokenizer_spec}-{self.tokenizer_size}"
        return tokenizer_hash(load_tokenizer(self.tokenizer_spec))

    def _build(self, folder: Path) -> None:
        present = self.source.splits()
        tokenizer = self._make_tokenizer()
        write_text(folder / TOKENIZER, tokenizer.to_str())
        form = SequenceFormat(tokenizer, self.max_length)
        entries: dict[str, dict[str, Any]] = {}
        for split, theirs in self.splits.items():
            wanted = theirs.split("+")
            found = [name for name in wanted if name in present]
            missing = [name for name in wanted if name not in present]
            if missing and found and split == "train":
                raise ValueError(
                    f"{self.source.name} has no split {missing[0]!r}; set data.splits.train to some of "
                    f"{', '.join(present)}"
                )
            if missing:  # what is only evaluated needs no training split; what does need one says so
                print(f"prepare: {self.label} has no split {', '.join(missing)} here; left out", file=sys.stderr)
            same = next(
                (e for name, e in entries.items() if e["source"] == found and "train" not in (name, split)), None
            )
            if same is not None:
                entries[split] = same
            elif found:
                file = folder / f"{split}.arrow"
                counts = self._write(file, split, found, form)
                entries[split] = {**counts, "source": found, "file": file.name, "sha256": sha256(file)}
        if not entries:
            raise ValueError(
                f"{self.source.name} has none of the splits {', '.join(self.splits.values())}; set data.splits to some "
                f"of {', '.join(present)}"
            )
        manifest = {
            "format_version": FORMAT_VERSION,
            "label": self.label,
            "tokenizer_sha256": tokenizer_hash(tokenizer),
            "vocab_size": vocabulary_size(tokenizer),
            "source_splits": list(present),
            "splits": entries,
        }
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2))

    def _make_tokenizer(self) -> Tokenizer:
        spec = cast(str, self.tokenizer_spec)
        if spec not in KINDS:
            return load_tokenizer(spec)
        names = [name for name in self.splits.get("train", "").split("+") if name in self.source.splits()]
        if not names:
            raise ValueError(
                f"{self.label} has no training split here to train a tokenizer ({spec}) on; set data.tokenizer to the "
                "path of a tokenizer.json (null takes that of the checkpoint), or data.splits.train to one of "
                + ", ".join(self.source.splits())
            )
        rows = (row for name in names for _, row in self._rows("train", name))
        return train_tokenizer(
            (text for row in rows for text in self.texts(row)), cast(TokenizerKind, spec), self.tokenizer_size
        )

    def _rows(self, split: str, theirs: str) -> Iterator[tuple[str, Row]]:
        """(name for messages, row) of a split of the source."""
        number = 0
        for table in self.source.tables(theirs, self.columns(split)):
            for row in table.to_pylist():
                yield f"{self.label}, split {theirs}, row {number}", row
                number += 1

    def _write(self, file: Path, split: str, found: list[str], form: SequenceFormat) -> dict[str, Any]:
        schema = self.schema.append(pyarrow.field("length", pyarrow.int32())).append(
            pyarrow.field("truncated", pyarrow.bool_())
        )
        counts = {"rows": 0, "examples": 0, "truncated": 0, "tokens": 0}
        dropped: Counter[str] = Counter()
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            for theirs in found:
                part = theirs.partition("_")[2]  # validation_matched
                for rows in _some_at_a_time(self._rows(split, theirs), 1000):
                    converted = self.convert([row for _, row in rows], [name for name, _ in rows], part, split, form)
                    examples = [example for example in converted if not isinstance(example, Dropped)]
                    dropped.update(reason for reason in converted if isinstance(reason, Dropped))
                    counts["rows"] += len(rows)
                    counts["examples"] += len(examples)
                    counts["truncated"] += sum(example["truncated"] for example in examples)
                    counts["tokens"] += sum(self.tokens_in(example) for example in examples)
                    writer.write_batch(pyarrow.RecordBatch.from_pylist(examples, schema=schema))
        if dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
            print(f"prepare: {'+'.join(found)}: {counts['examples']:,} of {counts['rows']:,} rows kept; {reasons}")
        if counts["examples"] == 0:
            if dropped:
                raise ValueError(f"{self.label}: no row of the split {'+'.join(found)} is left: {reasons}")
            raise ValueError(f"{self.label}: the split {'+'.join(found)} is empty; check the source")
        return {**counts, "dropped": dict(dropped)} if dropped else counts

    # What is prepared

    @property
    def manifest(self) -> dict[str, Any]:
        """Counts and checksums of the tokenised data set.

        Raises:
            ValueError: it is not prepared, or damaged.
        """
        if self._manifest is None:
            file = self.folder / MANIFEST
            if not file.is_file():
                raise ValueError(
                    f"{self.label} is not prepared in {self.cache_dir}; run `python train.py prepare` with the same "
                    "config first"
                )
            if problem := _damage(self.folder):
                raise ValueError(f"{self.folder}: {problem}; run prepare again")
            self._manifest = json.loads(file.read_text(encoding="utf-8"))
        return self._manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the examples."""
        if self._tokenizer is None:
            assert self.manifest
            self._tokenizer = load_tokenizer(self.folder / TOKENIZER)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; the net's embedding is linked to it."""
        return int(self.manifest["vocab_size"])

    @property
    def expected_vocab_size(self) -> int | None:
        return expected_vocab_size(self.tokenizer_spec, self.tokenizer_size)

    def table(self, split: str) -> pyarrow.Table:
        """The examples of a split, memory-mapped.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self.manifest["splits"]:
            raise ValueError(
                f"{self.label} has no {split} split here; set data.splits.{split} to one of "
                f"{', '.join(self.manifest['source_splits'])}"
            )
        if split not in self._tables:
            with pyarrow.memory_map(str(self.folder / self.manifest["splits"][split]["file"])) as mapped:
                self._tables[split] = pyarrow.ipc.open_file(mapped).read_all()
        return self._tables[split]

    def dataset(self, split: str) -> ExampleRows:
        return ExampleRows(self.table(split))

    def evaluation_rows(self, split: str, n_rows: int) -> Sequence[int]:
        # the longest first: what does not fit into memory fails at once
        by_length: list[int] = np.argsort(-self.table(split)["length"].to_numpy(), kind="stable").tolist()
        return by_length

    def fingerprint(self) -> str:
        return f"{self.label}-{self.manifest['splits']['train']['sha256'][:16]}"

    def describe(self) -> dict[str, Any]:
        """Where the data come from and how much there is, for the run's record."""
        facts = {
            "path": self.path,
            "subset": self.subset,
            "label": self.label,
            "tokenizer_sha256": self.manifest["tokenizer_sha256"],
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "splits": self.manifest["splits"],
        }
        if "train" in self.manifest["splits"]:  # diagnostics have none
            facts["epochs"] = round(self.consumed / self.order().epoch_length, 4)
        return facts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_tokenizer": None, "_tables": {}}


class ExampleRows(Dataset[Batch]):
    """The examples of a split by their number, as dictionaries with ``rows``, the number.

    `PADDING_ROW` gives the first example under that number: batches of sharded models need a row, and evaluation drops
    what has it.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        self.parts = table.to_batches()
        self.ends = np.cumsum([part.num_rows for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Batch:
        # a slice of the table would look for the part from the first on, and large data have thousands
        number = max(row, 0)
        i = int(np.searchsorted(self.ends, number, side="right"))
        part = self.parts[i]
        example: Batch = part.slice(number - (self.ends[i] - part.num_rows), 1).to_pylist()[0]
        return {**example, "rows": row}


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences as one tensor of token ids (N, T), padded on the right, and which of them are real, (N, T)."""
    lengths = np.array([len(sequence) for sequence in sequences])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(real.shape, dtype=np.int64)
    tokens[real] = np.concatenate(sequences)
    return torch.from_numpy(tokens), torch.from_numpy(real)


def _some_at_a_time(rows: Iterator[tuple[str, Row]], count: int) -> Iterator[list[tuple[str, Row]]]:
    some: list[tuple[str, Row]] = []
    for row in rows:
        some.append(row)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some


def _damage(folder: Path, *, again: bool = False) -> str | None:
    """What is wrong with a folder of tokenised examples, or None; see `damaged_file` for ``again``."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return f"{MANIFEST} has format version {manifest['format_version']}, this code reads {FORMAT_VERSION}"
        checksums = {entry["file"]: entry["sha256"] for entry in manifest["splits"].values()}
        if damaged := damaged_file(folder, checksums, again=again):
            return f"{damaged} does not match its checksum"
        if tokenizer_hash(load_tokenizer(folder / TOKENIZER)) != manifest["tokenizer_sha256"]:
            return f"{TOKENIZER} is not the tokenizer of the examples"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({error})"
    return None


def _is_usable(folder: Path) -> bool:
    problem = _damage(folder, again=True)
    if problem is not None:
        print(f"prepare: building {folder.name} anew, because {problem}", file=sys.stderr)
    return problem is None
