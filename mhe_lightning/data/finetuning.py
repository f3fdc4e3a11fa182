"""What the data modules of labelled examples share: sequences with segments, batched by length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mhe_lightning.data.examples import ExampleData, pad


class FinetuningData(ExampleData):
    """Labelled examples of a Hub data set or a mirror of it.

    A subclass says which columns it reads and how a row becomes one or several examples. `prepare` tokenises all
    splits into one Arrow file each, below ``cache_dir``; these are memory-mapped. Batches hold examples of similar
    length and are padded to their longest; a text that is too long is cut, and how many were is in the run's record.

    Args:
        path: name of a Hub data set, or a folder in its layout.
        subset: configuration of the data set.
        revision: Git revision on the Hub.
        splits: our "train", "validation", "test" → the data set's names; several are joined by "+".
        tokenizer: path of a tokenizer.json (a pretraining run has one), or "wordpiece" or "bpe" to train one on the
            training split's texts. Not set, it is that of ``init_from`` or of the run that goes on.
        tokenizer_size: largest vocabulary of a tokenizer that is trained.
        max_length: most tokens of a sequence.
        batch_size: examples per micro-batch over all ranks.
        seed: of the order of the examples.
        eval_batch_size: likewise in evaluation; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        shuffle: whether training examples are permuted anew each epoch.
        group_by_length: batch examples of similar length in training.
        cache_dir: folder of tokenised data sets.
    """

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
        group_by_length: bool,
        cache_dir: str,
    ) -> None:
        super().__init__(
            path=path,
            subset=subset,
            revision=revision,
            splits=splits,
            tokenizer=tokenizer,
            tokenizer_size=tokenizer_size,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            cache_dir=cache_dir,
        )
        self.group_by_length = group_by_length

    @property
    def row_lengths(self) -> np.ndarray | None:
        if not (self.group_by_length and self.shuffle):
            return None
        lengths: np.ndarray = self.table("train")["length"].to_numpy().copy()  # what is mapped is read-only
        return lengths


def pad_segments(sequences: list[list[int]], boundaries: list[int]) -> dict[str, Tensor]:
    """Sequences as ``tokens``, ``segments`` (N, T) and, unless all are equally long, ``padding`` and ``real``.

    ``padding`` (N, T) is True at real tokens, and ``real`` (M,) their positions along the flattened (N, T).

    Args:
        sequences: token ids.
        boundaries: of each the index from which on tokens are of segment 1.
    """
    tokens, real = pad(sequences)
    segments = (torch.arange(tokens.shape[1]) >= torch.tensor(boundaries)[:, None]) & real
    batch = {"tokens": tokens, "segments": segments.long()}
    if not real.all():
        batch["padding"] = real
        batch["real"] = real.flatten().nonzero().flatten()
    return batch
