"""Language modelling: packed corpora as blocks of tokens with their next tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from mhe_lightning.data.base import Batch, ExactDataModule
from mhe_lightning.data.corpus import CorpusSpec, find_corpus, prepare
from mhe_lightning.data.packed import PackedCorpus, PackedSplit, open_corpus
from mhe_lightning.data.sampler import PADDING_ROW, rows_per_rank
from mhe_lightning.data.tokenizer import expected_vocab_size

IGNORE = -100
"""Target of a position that is not predicted, as in ``torch.nn.functional.cross_entropy``."""


class CorpusData(ExactDataModule):
    """Rows of a corpus that is tokenised and packed once (`prepare`) and then memory-mapped.

    Args:
        corpus: what to pack; `mhe_lightning.data.corpus.CorpusSpec`.
        block_length: tokens T of a row.
        batch_size: rows per micro-batch over all ranks.
        seed: of the order of the rows.
        eval_batch_size: rows per evaluation batch over all ranks; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        shuffle: whether training rows are permuted anew each epoch.
        cache_dir: folder of packed corpora.
        verify_shards: compare the shards' checksums before training, not just their sizes.
    """

    document_mask: bool
    """Whether documents in a row are kept from attending to each other."""

    def __init__(
        self,
        corpus: CorpusSpec,
        block_length: int,
        *,
        batch_size: int,
        seed: int,
        eval_batch_size: int | None,
        num_workers: int,
        shuffle: bool,
        cache_dir: str,
        verify_shards: bool,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            shuffle=shuffle,
        )
        if block_length < 1:
            raise ValueError(f"block_length ({block_length}) must be at least 1")
        self.spec = corpus
        self.block_length = block_length
        self.cache_dir = cache_dir
        self.verify_shards = verify_shards
        self._corpus: PackedCorpus | None = None

    @property
    def prepared(self) -> bool:
        return self._corpus is not None or find_corpus(self.spec, self.cache_dir) is not None

    def prepare(self) -> None:
        self._corpus = prepare(self.spec, self.cache_dir)

    @property
    def corpus(self) -> PackedCorpus:
        """The packed corpus.

        Raises:
            ValueError: it is not prepared, or damaged.
        """
        if self._corpus is None:
            folder = find_corpus(self.spec, self.cache_dir)
            if folder is None:
                raise ValueError(
                    f"the corpus {self.spec.path} is not prepared in {self.cache_dir}; run "
                    "`python train.py prepare` with the same config first"
                )
            self._corpus = open_corpus(folder, verify=self.verify_shards)
        return self._corpus

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary; the net's embedding is linked to it."""
        return self.corpus.vocab_size

    @property
    def expected_vocab_size(self) -> int | None:
        return expected_vocab_size(self.spec.tokenizer, self.spec.tokenizer_size)

    def largest_batch(self, world_size: int) -> Batch:
        tokens = torch.zeros(rows_per_rank(self.batch_size, world_size), self.block_length, dtype=torch.long)
        batch: Batch = {"tokens": tokens, "targets": tokens.clone(), "rows": torch.arange(len(tokens))}
        if self.document_mask:
            batch["documents"] = tokens.clone()
        return batch

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer."""
        return self.corpus.tokenizer

    def fingerprint(self) -> str:
        manifest = self.corpus.manifest
        rows = {
            "shards": [shard["sha256"] for shard in manifest["splits"]["train"]["shards"]],
            "block_length": self.block_length,
        }
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Where the data come from and how much there is, for the run's record."""
        return {**self._description(), "epochs": round(self.consumed / self.order().epoch_length, 4)}

    def _description(self) -> dict[str, Any]:
        manifest = self.corpus.manifest
        splits = {
            name: {key: entry[key] for key in ("tokens", "documents", "words", "bytes", "duplicates_removed")}
            for name, entry in manifest["splits"].items()
        }
        return {
            "path": self.spec.path,
            "subset": self.spec.subset,
            "corpus_sha256": manifest["corpus_sha256"],
            "tokenizer_sha256": manifest["tokenizer"]["sha256"],
            "vocab_size": self.vocab_size,
            "block_length": self.block_length,
            "splits": splits,
        }


class LanguageModelingData(CorpusData):
    """Blocks of a packed corpus, for predicting the next token.

    The corpus is tokenised and packed once (`prepare`) and then memory-mapped. A batch has ``tokens`` and ``targets``
    (B, T), ``rows`` (B,), with ``document_mask`` also ``documents`` (B, T), and in evaluation ``words_per_token`` and
    ``bytes_per_token`` (B,), the same number for all rows. In evaluation every token but the very first, an
    end-of-text token, is predicted once.

    Args:
        corpus: what to pack; `mhe_lightning.data.corpus.CorpusSpec`.
        block_length: tokens T of a row.
        batch_size: rows per micro-batch over all ranks.
        seed: of the order of the rows; linked to ``seed_everything``.
        eval_batch_size: rows per evaluation batch over all ranks; ``batch_size`` if not given.
        eval_stride: evaluate with a sliding window that moves by this many tokens, so that each is predicted from at
            least T - stride tokens before it; ``block_length`` (no overlap) if not given.
        document_mask: keep documents from attending to each other, and count positions from each one's start;
            otherwise a block may hold several, separated by end-of-text tokens.
        num_workers: worker processes of each loader.
        shuffle: whether training rows are permuted anew each epoch.
        cache_dir: folder of packed corpora.
        verify_shards: compare the shards' checksums before training, not just their sizes.
    """

    def __init__(
        self,
        corpus: CorpusSpec,
        block_length: int,
        batch_size: int,
        seed: int,
        eval_batch_size: int | None = None,
        eval_stride: int | None = None,
        document_mask: bool = False,
        num_workers: int = 0,
        shuffle: bool = True,
        cache_dir: str = "prepared",
        verify_shards: bool = True,
    ) -> None:
        super().__init__(
            corpus,
            block_length,
            batch_size=batch_size,
            seed=seed,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            cache_dir=cache_dir,
            verify_shards=verify_shards,
        )
        if eval_stride is not None and not 1 <= eval_stride <= block_length:
            raise ValueError(f"eval_stride ({eval_stride}) must be between 1 and block_length ({block_length})")
        self.eval_stride = eval_stride or block_length
        self.document_mask = document_mask

    def dataset(self, split: str) -> PackedBlocks:
        return PackedBlocks(
            self.corpus.split(split),
            length=self.block_length,
            stride=None if split == "train" else self.eval_stride,
            document_start=self.corpus.end_of_text_id if self.document_mask else None,
        )


class PackedBlocks(Dataset[Batch]):
    """Rows of ``length`` tokens with their next tokens.

    Args:
        split: the packed tokens.
        length: tokens T per row.
        stride: None for training: rows follow each other, and what does not fill a row at the end is left out.
            A number for evaluation: row i starts at token i × stride, and only tokens that the rows before did not
            predict are targets; the last row is filled up with padding.
        document_start: the token that begins a document, to give ``documents``; None gives none.

    Raises:
        ValueError: the split has too few tokens for one row.
    """

    def __init__(
        self, split: PackedSplit, *, length: int, stride: int | None = None, document_start: int | None = None
    ) -> None:
        self.split = split
        self.length = length
        self.stride = stride
        self.document_start = document_start
        predicted = len(split) - 1
        if stride is None:
            self.n_rows = predicted // length
            if self.n_rows == 0:
                raise ValueError(
                    f"the training split has {len(split)} tokens, less than one row of block_length + 1 = "
                    f"{length + 1}; lower block_length or give more text"
                )
        else:
            if predicted < 1:
                raise ValueError("the evaluation split has no text")
            self.n_rows = 1 + max(0, -(-(predicted - length) // stride))

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, row: int) -> Batch:
        tokens = np.zeros(self.length, dtype=np.int64)
        targets = np.full(self.length, IGNORE, dtype=np.int64)
        step = self.stride or self.length
        if row != PADDING_ROW:
            start = row * step
            window = self.split.read(start, min(start + self.length + 1, len(self.split)))
            count = len(window) - 1
            tokens[:count] = window[:-1]
            targets[:count] = window[1:]
            if row > 0:
                targets[: self.length - step] = IGNORE
        batch: Batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets), "rows": row}
        if self.document_start is not None:
            batch["documents"] = torch.from_numpy(np.cumsum(tokens == self.document_start))
        if self.stride is not None:
            batch["words_per_token"] = self.split.counts.words / (len(self.split) - 1)
            batch["bytes_per_token"] = self.split.counts.bytes / (len(self.split) - 1)
        return batch
