"""Training on a corpus that is too large to pack: tokenised as it is read, with weaker guarantees."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset

from mhe_lightning.data.base import Batch
from mhe_lightning.data.corpus import CorpusSpec
from mhe_lightning.data.language_modeling import LanguageModelingData
from mhe_lightning.data.loading import Loader, heed_parent_only
from mhe_lightning.data.sampler import RowOrder, rows_per_rank
from mhe_lightning.data.tokenizer import KINDS, end_of_text_id

ENDLESS = 2**62
"""Rows of a stream whose length nobody knows."""


class StreamedLanguageModelingData(LanguageModelingData):
    """As `LanguageModelingData`, but the training split is read and tokenised during training; nothing of it is stored.

    Only the evaluation splits are packed. What is weaker than with a packed corpus:

    * rows come in the order of the source, they are not shuffled;
    * every rank reads and tokenises everything and keeps its share, so many ranks wait for the tokenizer;
    * a resumed run reads and tokenises again what was trained, which takes time but gives the same rows, as long as the
      source still has the same documents in the same order: only its path and revision are checked, not its content;
    * no epochs are counted: after the last document the first follows.

    Args:
        corpus: as for packing, with the path of a tokenizer.json, and evaluation splits of its own.
        block_length: tokens T of a row.
        batch_size: rows per micro-batch over all ranks.
        seed: linked to ``seed_everything``; the order of rows does not depend on it.
        eval_batch_size: rows per evaluation batch over all ranks; ``batch_size`` if not given.
        eval_stride: tokens by which the evaluation window moves; ``block_length`` if not given.
        document_mask: keep documents from attending to each other, and count positions from each one's start.
        read_ahead: read and tokenise in a process of its own, while the model computes.
        cache_dir: folder of packed evaluation splits.
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
        read_ahead: bool = True,
        cache_dir: str = "prepared",
    ) -> None:
        if corpus.tokenizer in KINDS:
            raise ValueError(
                f"corpus.tokenizer ({corpus.tokenizer!r}) must be the path of a tokenizer.json: a stream is too large "
                "to train one on; prepare a sample of the corpus and use the tokenizer of that"
            )
        if corpus.held_out():
            raise ValueError(
                "nothing can be held out from a stream; name the source's own split (corpus.splits) or give "
                "corpus.validation_path, and set validation_fraction and test_fraction to 0 otherwise"
            )
        super().__init__(
            dataclasses.replace(corpus, pack_train=False),
            block_length,
            batch_size,
            seed,
            eval_batch_size=eval_batch_size,
            eval_stride=eval_stride,
            document_mask=document_mask,
            shuffle=False,
            cache_dir=cache_dir,
        )
        self.read_ahead = read_ahead

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world()
        self._begin_segment(rank, world_size)
        blocks = StreamedBlocks(
            self.spec,
            self.tokenizer,
            length=self.block_length,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start=self.consumed,
            document_mask=self.document_mask,
        )
        return Loader(
            blocks,
            batch_size=rows_per_rank(self.batch_size, world_size),
            num_workers=int(self.read_ahead),
            worker_init_fn=heed_parent_only,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.read_ahead,
        )

    def order(self) -> RowOrder:
        return RowOrder(ENDLESS, self.seed, shuffle=False)

    def fingerprint(self) -> str:
        source = {
            "spec": self.spec.as_dict(),
            "tokenizer": self.corpus.manifest["tokenizer"]["sha256"],
            "block_length": self.block_length,
        }
        return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        return {**self._description(), "streamed": True}


class StreamedBlocks(IterableDataset[Batch]):
    """This rank's rows of a corpus that is tokenised while it is read, from row ``start`` on, again and again.

    Args:
        spec: the corpus.
        tokenizer: its tokenizer.
        length: tokens T per row.
        batch_size: rows of a global batch; each rank takes its slice.
        rank: this rank.
        world_size: ranks that share each batch.
        start: rows, over all ranks, that were trained before.
        document_mask: whether to give ``documents``.
    """

    def __init__(
        self,
        spec: CorpusSpec,
        tokenizer: Tokenizer,
        *,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        document_mask: bool = False,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.per_rank = rows_per_rank(batch_size, world_size)
        self.start = start
        self.document_mask = document_mask
        self.end_of_text = end_of_text_id(tokenizer)

    def __iter__(self) -> Iterator[Batch]:
        for row, window in enumerate(self._windows()):
            if row < self.start or (row - self.start) % self.batch_size // self.per_rank != self.rank:
                continue
            tokens = torch.from_numpy(window)
            batch: Batch = {"tokens": tokens[:-1], "targets": tokens[1:], "rows": row}
            if self.document_mask:
                batch["documents"] = (tokens[:-1] == self.end_of_text).cumsum(0)
            yield batch

    def _windows(self) -> Iterator[np.ndarray]:
        """Rows of length + 1 tokens, each beginning with the last token of the one before."""
        buffer = np.array([self.end_of_text], dtype=np.int64)
        while True:
            read = 0
            for tokens in self.spec.training_tokens(self.tokenizer):
                read += len(tokens)
                buffer = np.concatenate([buffer, tokens])
                rows = (len(buffer) - 1) // self.length
                for row in range(rows):
                    yield buffer[row * self.length : (row + 1) * self.length + 1]
                buffer = buffer[rows * self.length :]
            if read == 0:
                raise ValueError(
                    f"{self.spec.path} has no text in its training split; check the source and text_column"
                )
