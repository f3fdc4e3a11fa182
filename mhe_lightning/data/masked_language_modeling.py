"""Masked language modelling: packed corpora as rows in which some tokens are hidden."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mhe_lightning.data.base import Batch
from mhe_lightning.data.corpus import CorpusSpec
from mhe_lightning.data.language_modeling import IGNORE, CorpusData
from mhe_lightning.data.masking import Masking
from mhe_lightning.data.packed import PackedSplit
from mhe_lightning.data.sampler import PADDING_ROW
from mhe_lightning.data.tokenizer import start_of_sequence_id


class MaskedLanguageModelingData(CorpusData):
    """Rows of a packed corpus for predicting masked tokens, as in BERT, without padding.

    A row is ``[CLS]``, the next T - 2 tokens of the corpus with ``[SEP]`` between documents, and ``[SEP]``: the form
    of a finetuning example. What follows a row's first ``[SEP]`` is segment 1, so that both segments are trained; next
    sentences are not predicted (Liu et al. 2019 found no use in it). A batch has ``tokens``, ``targets`` (-100 where
    nothing is predicted), ``segments`` (B, T), ``masked`` (M,), the positions along the flattened (B, T) where
    something is predicted, ``rows`` (B,), with ``document_mask`` also ``documents`` (B, T), and in evaluation
    ``padding`` (B, T), for the last row, ``ordinary`` (B, T), True where a token is not a special one, and
    ``mask_token`` (B,), the id of [MASK].

    Masks are drawn afresh in every epoch, as a function of (seed, epoch, row); in evaluation they are fixed, whatever
    the seed.

    Args:
        corpus: what to pack, with a tokenizer that has a mask token; `mhe_lightning.data.corpus.CorpusSpec`.
        block_length: tokens T of a row.
        batch_size: rows per micro-batch over all ranks.
        seed: of the order of the rows and of the masks; linked to ``seed_everything``.
        mask_share: share of a row's tokens to predict.
        whole_words: mask all tokens of a word or none.
        eval_batch_size: rows per evaluation batch over all ranks; ``batch_size`` if not given.
        document_mask: keep documents from attending to each other, and count positions from each one's start.
        num_workers: worker processes of each loader.
        shuffle: whether training rows are permuted anew each epoch.
        cache_dir: folder of packed corpora.
        verify_shards: compare the shards' checksums before training, not just their sizes.
    """

    with_epochs = True

    def __init__(
        self,
        corpus: CorpusSpec,
        block_length: int,
        batch_size: int,
        seed: int,
        mask_share: float = 0.15,
        whole_words: bool = False,
        eval_batch_size: int | None = None,
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
        if block_length < 3:
            raise ValueError(f"block_length ({block_length}) must be at least 3: [CLS], a token and [SEP]")
        if not 0 < mask_share < 1:
            raise ValueError(f"mask_share ({mask_share}) must be between 0 and 1; BERT's is 0.15")
        self.mask_share = mask_share
        self.whole_words = whole_words
        self.document_mask = document_mask

    def dataset(self, split: str) -> MaskedBlocks:
        masking = Masking(self.tokenizer, share=self.mask_share, whole_words=self.whole_words)
        start = start_of_sequence_id(self.tokenizer)
        if start is None:
            raise ValueError(
                "the tokenizer has no token that begins a sequence; use a wordpiece one, or add [CLS] to its special "
                "tokens"
            )
        return MaskedBlocks(
            self.corpus.split(split),
            length=self.block_length,
            masking=masking,
            start=start,
            separator=self.corpus.end_of_text_id,
            seed=self.seed if split == "train" else None,
            document_mask=self.document_mask,
        )

    def collate(self, rows: list[Batch]) -> Batch:
        batch = super().collate(rows)
        return {**batch, "masked": _masked(batch["targets"])}

    def largest_batch(self, world_size: int) -> Batch:
        batch = super().largest_batch(world_size)
        count = round(self.mask_share * self.block_length)
        batch["targets"][:, count:] = IGNORE
        return {**batch, "segments": torch.zeros_like(batch["tokens"]), "masked": _masked(batch["targets"])}

    def fingerprint(self) -> str:
        options = ("-whole-words" if self.whole_words else "") + ("-document-mask" if self.document_mask else "")
        return f"{super().fingerprint()}-masked-{self.mask_share}{options}"


def _masked(targets: Tensor) -> Tensor:
    """Where something is predicted, (M,): found on the host, for how many a device finds would be waited for."""
    return (targets.flatten() != IGNORE).nonzero().flatten()


class MaskedBlocks(Dataset[Batch]):
    """Rows of ``length`` tokens, some of them masked.

    Args:
        split: the packed tokens.
        length: tokens T per row, [CLS] and [SEP] included.
        masking: chooses what is predicted.
        start: id of [CLS].
        separator: id of [SEP], which stands between documents.
        seed: of the masks in training, where the data set is indexed by (row, epoch) and what does not fill a row at
            the end is left out. None for evaluation: it is indexed by row, and the last row is filled up.
        document_mask: whether to give ``documents``, and no second segment.

    Raises:
        ValueError: the split has too few tokens for one row.
    """

    def __init__(
        self,
        split: PackedSplit,
        *,
        length: int,
        masking: Masking,
        start: int,
        separator: int,
        seed: int | None,
        document_mask: bool = False,
    ) -> None:
        self.split = split
        self.length = length
        self.masking = masking
        self.start = start
        self.separator = separator
        self.seed = seed
        self.document_mask = document_mask
        self.step = length - 2
        tokens = len(split) - 2  # without the separators before the first and after the last document
        self.n_rows = tokens // self.step if seed is not None else -(-tokens // self.step)
        if self.n_rows < 1:
            raise ValueError(
                f"the split has {max(tokens, 0)} tokens, less than one row of block_length - 2 = {self.step}; lower "
                "block_length or give more text"
            )

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        row, epoch = key if isinstance(key, tuple) else (key, -1)
        tokens = np.full(self.length, self.separator, dtype=np.int64)
        tokens[0] = self.start
        count = 1
        if row != PADDING_ROW:
            first = 1 + row * self.step
            window = self.split.read(first, min(first + self.step, len(self.split) - 1))
            count = 1 + len(window)
            tokens[1:count] = window
        draw = [0, 0, max(row, 0)] if self.seed is None else [self.seed, 1 + epoch, row]
        seen, chosen = self.masking(tokens, draw)
        targets = np.where(chosen, tokens, IGNORE)
        separators = np.cumsum(tokens == self.separator) - (tokens == self.separator)
        segments = np.zeros_like(tokens) if self.document_mask else (separators > 0).astype(np.int64)
        segments[count + 1 :] = 0  # what fills up the last row comes after the separator that ends it
        batch: Batch = {
            "tokens": torch.from_numpy(seen),
            "targets": torch.from_numpy(targets),
            "segments": torch.from_numpy(segments),
            "rows": row,
        }
        if self.document_mask:
            batch["documents"] = torch.from_numpy(separators)
        if self.seed is None:
            batch["padding"] = torch.from_numpy(np.arange(self.length) <= count)  # the separator after the text is real
            batch["ordinary"] = torch.from_numpy(~self.masking.special[tokens])
            batch["mask_token"] = self.masking.mask
        return batch
