"""Which rows a rank sees at a step: a pure function of (seed, epoch, position, rank, world size).

The training rows form one infinite stream: a permutation of all rows per epoch, one after another. Position p of the
stream is row ``permutation(seed, p // rows)[p % rows]``. A global batch is the next ``batch_size`` positions, of which
every rank takes its slice, so the rows of a step depend neither on the number of ranks nor on workers, and a run goes
on from any position without replaying anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

PADDING_ROW = -1
"""Stands for no row: it evens out the ranks' batches in evaluation, and must count for nothing."""


GROUPS_SORTED_TOGETHER = 50
"""Groups of similar length are cut from this many groups' worth of shuffled rows."""

BUCKET_GROWTH = 1.1
"""A bucket's longest row is at most this many times as long as its shortest, which bounds the padding."""


class Order(Protocol):
    """The training rows as an infinite stream of positions, which micro-batches take one after another."""

    unit: str
    """What a position holds, in the plural."""
    epoch_length: int
    """Positions of an epoch."""

    def share(self, position: int, size: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """What one rank trains of the micro-batch at the positions position … position + size - 1.

        Returns:
            Row ids, and the epoch of each.
        """
        ...

    def check_world(self, size: int, world_size: int) -> None:
        """Raise a ValueError if micro-batches of ``size`` positions cannot be shared by so many ranks."""
        ...

    def state(self) -> dict[str, Any]:
        """What defines the order, for a checkpoint; `order_from` reads it."""
        ...


class RowOrder:
    """The infinite stream of training rows.

    With ``lengths``, every ``group`` consecutive positions of the stream, counted from its start, hold rows of similar
    length, so that a batch of that size needs little padding: an epoch's shuffled rows are sorted by length in parts,
    cut into groups, and the groups are shuffled. Where two epochs meet, a group is of mixed lengths.

    Args:
        n_rows: rows of the training set.
        seed: of the permutations.
        shuffle: whether rows are permuted; False repeats them in their own order.
        lengths: length of each row, (n_rows,).
        group: rows of a group.
    """

    unit = "rows"

    def __init__(
        self, n_rows: int, seed: int, shuffle: bool = True, lengths: np.ndarray | None = None, group: int = 1
    ) -> None:
        if n_rows < 1:
            raise ValueError(f"n_rows ({n_rows}) must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed ({seed}) must be in [0, 2³²)")
        if lengths is not None and len(lengths) != n_rows:
            raise ValueError(f"{len(lengths)} lengths were given for {n_rows} rows")
        self.n_rows = self.epoch_length = n_rows
        self.seed = seed
        self.shuffle = shuffle
        self.lengths = lengths
        self.group = group
        self._permutation: tuple[int, np.ndarray] | None = None

    def rows(self, start: int, count: int) -> np.ndarray:
        """Row ids (count,) at the positions start … start + count - 1 of the stream."""
        if not self.shuffle:
            return np.arange(start, start + count, dtype=np.int64) % self.n_rows
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.n_rows)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def share(self, position: int, size: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        per_rank = rows_per_rank(size, world_size)
        start = position + rank * per_rank
        return self.rows(start, per_rank), np.arange(start, start + per_rank, dtype=np.int64) // self.n_rows

    def check_world(self, size: int, world_size: int) -> None:
        rows_per_rank(size, world_size)

    def state(self) -> dict[str, Any]:
        return {
            "n_rows": self.n_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lengths": None if self.lengths is None else torch.from_numpy(self.lengths),
            "group": self.group,
        }

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # RandomState's streams are frozen across numpy versions, those of Generator are not
            order = np.random.RandomState([self.seed, epoch]).permutation(self.n_rows)
            if self.lengths is not None:
                order = self._grouped(order, epoch, self.lengths)
            self._permutation = (epoch, order)
        return self._permutation[1]

    def _grouped(self, order: np.ndarray, epoch: int, lengths: np.ndarray) -> np.ndarray:
        begun = min(-epoch * self.n_rows % self.group, self.n_rows)  # fills up the last group of the epoch before
        n_groups = (self.n_rows - begun) // self.group
        head, middle, tail = np.split(order, [begun, begun + n_groups * self.group])
        part = GROUPS_SORTED_TOGETHER * self.group
        by_length = [
            rows[np.argsort(lengths[rows], kind="stable")]
            for rows in (middle[start : start + part] for start in range(0, len(middle), part))
        ]
        groups = np.concatenate([middle[:0], *by_length]).reshape(n_groups, self.group)
        shuffled = groups[np.random.RandomState([self.seed, epoch, 1]).permutation(n_groups)]
        return np.concatenate([head, shuffled.reshape(-1), tail])


class TokenBatchOrder:
    """Rows in batches of about equally many tokens; a position of the stream is such a batch.

    Rows are sorted by length into buckets, a bucket is cut into batches that are as large as ``batch_tokens`` allows,
    and every epoch permutes the rows within each bucket, and the batches. Where batches are cut does not depend on the
    epoch, so the batch at any position is found without those before it. A bucket with less than one full batch
    takes as many of the next longer rows as its batch holds, and the batches of a bucket differ by one row at most: a
    batch is a small remainder only where longer rows are missing, or far longer.

    Args:
        lengths: tokens of each row, (n_rows,): of its longer side, where it has several.
        batch_tokens: most tokens of a batch, padding to the longest row included.
        seed: of the permutations.
        shuffle: whether rows and batches are permuted; False takes them from the shortest to the longest.

    Raises:
        ValueError: an argument is out of range, or a row is longer than a batch may be.
    """

    unit = "batches"

    def __init__(self, lengths: np.ndarray, batch_tokens: int, seed: int, shuffle: bool = True) -> None:
        if len(lengths) < 1:
            raise ValueError("there are no training rows")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed ({seed}) must be in [0, 2³²)")
        if batch_tokens < lengths.max():
            raise ValueError(
                f"batch_tokens ({batch_tokens}) must hold the longest row, of {lengths.max()} tokens; raise it, or "
                "lower max_length"
            )
        self.lengths = lengths
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.shuffle = shuffle
        self._by_length = np.argsort(lengths, kind="stable")
        self._buckets, self._batches = self._cut(lengths[self._by_length])
        self.epoch_length = len(self._batches)
        self._permutation: tuple[int, np.ndarray, np.ndarray] | None = None

    def _cut(self, ascending: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """[start, stop) of each bucket and of each batch along the rows sorted by length."""
        buckets: list[tuple[int, int]] = []
        batches: list[tuple[int, int]] = []
        start = 0
        while start < len(ascending):
            longest = max(int(ascending[start] * BUCKET_GROWTH), int(ascending[start]) + 1)
            stop = int(np.searchsorted(ascending, longest, side="right"))
            # only while one batch holds all with the next row, the longest: a far longer one would need many batches
            while stop < len(ascending) and stop - start < self.batch_tokens // ascending[stop]:
                stop += 1
            n_batches = -(-(stop - start) // (self.batch_tokens // int(ascending[stop - 1])))
            cuts = [start + (stop - start) * i // n_batches for i in range(n_batches + 1)]
            buckets.append((start, stop))
            batches += pairwise(cuts)
            start = stop
        return buckets, batches

    def batch(self, position: int) -> np.ndarray:
        """Row ids of the batch at a position of the stream."""
        epoch, index = divmod(position, self.epoch_length)
        rows, order = self._epoch(epoch)
        start, stop = self._batches[order[index]]
        return rows[start:stop]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows, permuted within each bucket, and the order of the batches."""
        if not self.shuffle:
            return self._by_length, np.arange(self.epoch_length)
        if self._permutation is None or self._permutation[0] != epoch:
            # RandomState's streams are frozen across numpy versions, those of Generator are not
            draw = np.random.RandomState([self.seed, epoch])
            rows = np.concatenate([draw.permutation(self._by_length[start:stop]) for start, stop in self._buckets])
            self._permutation = (epoch, rows, draw.permutation(self.epoch_length))
        return self._permutation[1:]

    def share(self, position: int, size: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        if size != 1:
            raise ValueError(f"a micro-batch takes one position of batches by tokens, not {size}")
        rows = self.batch(position)[rank::world_size]
        if len(rows) == 0:
            rows = np.array([PADDING_ROW])  # every rank takes part in every step
        return rows, np.full(len(rows), position // self.epoch_length)

    def check_world(self, size: int, world_size: int) -> None:
        """Any number of ranks can share a batch."""

    def state(self) -> dict[str, Any]:
        return {
            "n_rows": len(self.lengths),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "lengths": torch.from_numpy(self.lengths),
            "batch_tokens": self.batch_tokens,
        }


def order_from(state: Mapping[str, Any]) -> Order:
    """The order that a checkpoint's state defines."""
    lengths = state.get("lengths")  # older checkpoints have neither these nor a group
    if "batch_tokens" in state:
        return TokenBatchOrder(state["lengths"].numpy(), state["batch_tokens"], state["seed"], state["shuffle"])
    return RowOrder(
        state["n_rows"],
        state["seed"],
        state["shuffle"],
        None if lengths is None else lengths.numpy(),
        state.get("group", 1),
    )


class TrainingSampler(Sampler[list[Any]]):
    """Batch sampler that never ends: this rank's rows of one global batch after another.

    Args:
        order: the stream of rows.
        batch_size: positions of the stream in a global batch, over all ranks.
        rank: this rank.
        world_size: ranks that share each batch.
        start: position of the stream to begin at.
        with_epochs: give (row, epoch) for each row, for data that differ from epoch to epoch.
    """

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        with_epochs: bool = False,
    ) -> None:
        order.check_world(batch_size, world_size)
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.with_epochs = with_epochs
        self._begun = False

    def __iter__(self) -> Iterator[list[Any]]:
        if self._begun:
            raise ValueError(
                "the training rows have no end and were asked for a second time, which would repeat them: leave out "
                "trainer.limit_train_batches and trainer.overfit_batches, and end training by trainer.max_steps"
            )
        self._begun = True
        position = self.start
        while True:
            rows, epochs = self.order.share(position, self.batch_size, self.rank, self.world_size)
            yield list(zip(rows.tolist(), epochs.tolist(), strict=True)) if self.with_epochs else rows.tolist()
            position += self.batch_size


class EvaluationSampler(Sampler[list[int]]):
    """Batch sampler that gives every row once, to one rank; all ranks get equally many batches.

    Rank r takes the rows r, r + world_size, … of those given. With ``whole_batches`` it takes the batches r,
    r + world_size, … of ``batch_size`` rows each: then a row's batch does not depend on the number of ranks, nor does
    what rounding makes of it. Short ranks are filled up with `PADDING_ROW`, since sharded models need every rank at
    every step.

    Args:
        rows: the row ids, in any order.
        batch_size: rows of a batch over all ranks, which ``world_size`` must divide; of each rank's with
            ``whole_batches``.
        rank: this rank.
        world_size: ranks that share the rows.
        whole_batches: whether batches, not rows, are dealt out.
    """

    def __init__(
        self,
        rows: Sequence[int],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        whole_batches: bool = False,
    ) -> None:
        if whole_batches:
            batches = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
            batches += [[PADDING_ROW]] * (-len(batches) % world_size)
            self.batches = batches[rank::world_size]
            return
        per_rank = rows_per_rank(batch_size, world_size)
        own = list(rows[rank::world_size])
        own += [PADDING_ROW] * (-(-len(rows) // world_size) - len(own))
        self.batches = [own[i : i + per_rank] for i in range(0, len(own), per_rank)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def rows_per_rank(batch_size: int, world_size: int) -> int:
    """``batch_size / world_size``, or ``ValueError`` with a remedy."""
    if batch_size < 1 or batch_size % world_size:
        above = max(world_size, -(-batch_size // world_size) * world_size)
        raise ValueError(
            f"batch_size ({batch_size}) counts the rows of all {world_size} ranks and must be a multiple of "
            f"{world_size}; try {above}"
        )
    return batch_size // world_size


def extend_chain(digest: str, rows: Sequence[int]) -> str:
    """The next link of the hash chain over trained rows: ``sha256(digest, rows)``, as a hex digest."""
    data = bytes.fromhex(digest) + np.asarray(rows, dtype="<i8").tobytes()
    return hashlib.sha256(data).hexdigest()


def replay_chain(order: Order, *, batch_size: int, rank: int, world_size: int, start: int, stop: int) -> str:
    """The digest that ``rank`` must have reached after training the positions ``start`` … ``stop - 1``."""
    sampler = TrainingSampler(order, batch_size=batch_size, rank=rank, world_size=world_size, start=start)
    digest = ""
    for _, rows in zip(range(start, stop, batch_size), sampler, strict=False):
        digest = extend_chain(digest, rows)
    return digest
