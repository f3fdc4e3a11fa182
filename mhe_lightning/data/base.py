"""What all data modules share: exactly resumable training batches, and evaluation that sees every row once."""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mhe_lightning.data.loading import Loader, heed_parent_only
from mhe_lightning.data.sampler import (
    EvaluationSampler,
    Order,
    RowOrder,
    TrainingSampler,
    extend_chain,
    order_from,
    replay_chain,
)

Batch = dict[str, Any]


class ExactDataModule(LightningDataModule):
    """Base of the data modules whose training rows are a function of (seed, position) alone.

    A subclass offers map-style data sets. This class makes their loaders, counts the rows *trained* (not loaded ahead)
    and keeps the resume certificate: per rank, a hash chain over the ids of the rows it trained on, in segments of
    constant world size and batch size. `verify_certificate` replays it.

    Args:
        batch_size: training rows per micro-batch over all ranks; the number of ranks must divide it, so that the same
            config trains on the same rows with any number of them.
        eval_batch_size: likewise for evaluation; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        seed: of the order of the rows.
        shuffle: whether training rows are permuted anew each epoch.
    """

    with_epochs = False
    """Whether the training data set is asked for (row, epoch) rather than for a row."""

    whole_evaluation_batches = False
    """Whether evaluation deals out batches, not rows, to the ranks; ``eval_batch_size`` is then each rank's own."""

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name} ({size}) must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers ({num_workers}) must not be negative; 0 loads in the main process")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle = shuffle
        self.consumed = 0
        self._segments: list[dict[str, Any]] = []
        self._untallied: list[Tensor] = []

    # What a subclass defines

    @property
    @abstractmethod
    def prepared(self) -> bool:
        """Whether the data lie ready, so that `fit` need not make them."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the data ready on disk; in one process, before training."""

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Batch]:
        """Map-style data set of "train", "validation" or "test", with a length; row -1 must count for nothing."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the training rows: equal fingerprints mean equal rows."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Where the data come from and how much there is, for the run's record."""

    # What it may change

    @property
    def row_lengths(self) -> np.ndarray | None:
        """Length of each training row, to batch rows of similar length; None takes them as they come."""
        return None

    def order(self) -> Order:
        """The stream of training rows, of which a micro-batch takes ``batch_size`` positions."""
        n_rows = len(self.dataset("train"))  # type: ignore[arg-type]
        return RowOrder(n_rows, self.seed, self.shuffle, self.row_lengths, self.batch_size)

    def collate(self, rows: list[Batch]) -> Batch:
        """The rows of a batch as one: tensors of one shape are stacked."""
        batch: Batch = default_collate(rows)
        return batch

    def evaluation_rows(self, split: str, n_rows: int) -> Sequence[int]:
        """The rows of an evaluation split in the order in which they are batched, each once."""
        return range(n_rows)

    @property
    def expected_vocab_size(self) -> int | None:
        """Tokens that the vocabulary has or is meant to have, known before any data are read; None if it is not."""
        return None

    def largest_batch(self, world_size: int) -> Batch:
        """A training micro-batch of one rank in the largest shape there is, of no particular tokens, made without data.

        For planning: what a step with it needs is what training needs.
        """
        raise ValueError(f"{type(self).__name__} must define largest_batch(world_size) to be planned")

    def largest_row(self) -> Batch:
        """As `largest_batch`, of as few rows as can be."""
        return self.largest_batch(self.batch_size)

    def submission(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """Files that the data set's benchmark asks for, by name, from all rows that `predict` gave."""
        return {}

    # Loaders

    def setup(self, stage: str) -> None:
        if not self.prepared:
            raise ValueError(
                f"{type(self).__name__}: the data are not prepared; run the `prepare` command with the same "
                "config first, or call prepare() in one process"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world()
        self._begin_segment(rank, world_size)
        dataset = self.dataset("train")
        sampler = TrainingSampler(
            self.order(),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start=self.consumed,
            with_epochs=self.with_epochs,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world()
        dataset = self.dataset(split)
        n_rows = len(dataset)  # type: ignore[arg-type]
        size = self.eval_batch_size
        if not self.whole_evaluation_batches:
            size = -(-size // world_size) * world_size  # batch shapes are free here: round up
        sampler = EvaluationSampler(
            self.evaluation_rows(split, n_rows),
            batch_size=size,
            rank=rank,
            world_size=world_size,
            whole_batches=self.whole_evaluation_batches,
        )
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Dataset[Batch], sampler: TrainingSampler | EvaluationSampler) -> DataLoader[Batch]:
        if self.num_workers > 0:
            # `tokenizers` up to 0.22 warns in each process that is forked after it has used its threads, as `prepare`
            # does, unless this is set. The workers tokenize nothing.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        collator = copy.copy(self)
        collator.trainer = None  # workers that are spawned, not forked, get what collates pickled; a trainer cannot be
        return Loader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator.collate,
            num_workers=self.num_workers,
            worker_init_fn=heed_parent_only,
            pin_memory=self._pins,
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _pins(self) -> bool:
        """Whether batches lie where a GPU can fetch them from while the host goes on, as Lightning lets it."""
        trainer = self.trainer
        return torch.cuda.is_available() and trainer is not None and trainer.strategy.root_device.type == "cuda"

    def _rank_and_world(self) -> tuple[int, int]:
        """Among the ranks that see different data (tensor-parallel ranks share theirs)."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    # Exact resume

    @property
    def micro_batches(self) -> int:
        """Global micro-batches trained so far, over all resumes."""
        return self.consumed // self.batch_size

    def mark_trained(self, rows: Tensor) -> None:
        """Count one global micro-batch as trained; ``rows`` are the ids of this rank's rows."""
        self._untallied.append(rows)  # hashed when a checkpoint is written, so that no step waits for a device
        self.consumed += self.batch_size

    def state_dict(self) -> dict[str, Any]:
        self._tally()
        rank, _ = self._rank_and_world()
        segments = [dict(segment) for segment in self._segments]
        if segments:
            segments[-1]["digests"] = _gather_digests(rank, segments[-1]["digests"])
        return {
            **self.order().state(),
            "consumed": self.consumed,
            "fingerprint": self.fingerprint(),
            "segments": segments,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # a model may be evaluated on other data than it was trained on
        if state_dict["fingerprint"] != self.fingerprint():
            raise ValueError(
                f"the checkpoint was trained on data {state_dict['fingerprint']}, but these are "
                f"{self.fingerprint()}; resume with the same corpus, tokenizer and block length, or start a new run"
            )
        own = self.order().state()
        for name in ("seed", "shuffle", "batch_tokens"):
            if state_dict.get(name) != own.get(name):
                raise ValueError(
                    f"the checkpoint's row order has {name}={state_dict.get(name)}, the config says {own.get(name)}; "
                    f"resume with {name} {state_dict.get(name)}, or start a new run"
                )
        grouped = state_dict.get("lengths") is not None  # older checkpoints have none
        if grouped != (own["lengths"] is not None):
            raise ValueError(
                f"the checkpoint's rows are {'' if grouped else 'not '}grouped by length, the config's are "
                f"{'not' if grouped else 'so'}; resume as they were, or start a new run"
            )
        if grouped and state_dict.get("group") != own.get("group"):
            raise ValueError(
                f"the checkpoint's rows are grouped by length in batches of {state_dict['group']}, the config's "
                f"batch_size is {self.batch_size}; resume with batch_size {state_dict['group']}, or start a new run"
            )
        self.consumed = state_dict["consumed"]
        self._segments = [dict(segment) for segment in state_dict["segments"]]
        self._untallied = []

    def _begin_segment(self, rank: int, world_size: int) -> None:
        self.order().check_world(self.batch_size, world_size)
        self._tally()  # what was trained with another shape belongs to the segment before
        last = self._segments[-1] if self._segments else None
        shape = {"world_size": world_size, "batch_size": self.batch_size}
        if last is None or any(last[key] != value for key, value in shape.items()):
            digests = {str(r): "" for r in range(world_size)}
            self._segments.append({**shape, "start": self.consumed, "stop": self.consumed, "digests": digests})

    def _tally(self) -> None:
        if not self._untallied:  # of a segment on fewer ranks, this one may have none
            return
        rank, _ = self._rank_and_world()
        segment = self._segments[-1]
        digest = segment["digests"][str(rank)]
        for rows in self._untallied:
            digest = extend_chain(digest, rows.tolist())
        segment["digests"] = {**segment["digests"], str(rank): digest}
        segment["stop"] = self.consumed
        self._untallied = []


def verify_certificate(state: Mapping[str, Any]) -> int:
    """Check a checkpoint's resume certificate against the order that its seed defines.

    Args:
        state: the data module's state in a checkpoint.

    Returns:
        The number of positions of the stream that were trained (rows; batches, where they are cut by tokens), each
        exactly as often and in the order that the seed defines.

    Raises:
        ValueError: a segment is missing, overlaps, or a digest differs: rows were skipped, repeated or reordered.
    """
    order = order_from(state)
    position = 0
    for segment in state["segments"]:
        if segment["start"] != position:
            raise ValueError(f"the segment after row {position} of the stream starts at row {segment['start']}")
        rows = segment["stop"] - segment["start"]
        if rows < 0 or rows % segment["batch_size"]:
            raise ValueError(f"the segment of rows {position} to {segment['stop']} is not one of whole batches")
        for rank in range(segment["world_size"]):
            expected = replay_chain(
                order,
                batch_size=segment["batch_size"],
                rank=rank,
                world_size=segment["world_size"],
                start=segment["start"],
                stop=segment["stop"],
            )
            if segment["digests"].get(str(rank)) != expected:
                raise ValueError(
                    f"rank {rank} did not train rows {segment['start']} to {segment['stop']} of the stream in order: "
                    f"its digest is {segment['digests'].get(str(rank))}, the replay gives {expected}"
                )
        position = segment["stop"]
    if position != state["consumed"]:
        raise ValueError(f"the certificate ends at row {position}, but {state['consumed']} rows count as trained")
    return position


def _gather_digests(rank: int, digests: Mapping[str, str]) -> dict[str, str]:
    """Every rank's own digest; a collective call where there are several."""
    own = {str(rank): digests[str(rank)]}
    if not (dist.is_available() and dist.is_initialized()):
        return own
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {key: value for part in gathered for key, value in sorted(part.items())}
