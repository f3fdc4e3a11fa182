"""Which rows a rank sees at a step: a pure function of (seed, epoch, position, rank, world size).

The training rows form one infinite stream: a permutation of all rows per epoch, one after another. Position p of the
stream is row ``permutation(seed, p // rows)[p % rows]``. A global batch is the next ``batch_size`` positions, of which
every rank takes its slice, so the rows of a step depend neither on the number of ranks nor on workers, and a run goes
on from any position without replaying anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

PADDING_ROW = -1
"""Stands for no row: it evens out the ranks' batches in evaluation, and must count for nothing."""


GROUPS_SORTED_TOGETHER = 50
"""Groups of similar length are cut from this many groups' worth of shuffled rows."""


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

    def __init__(
        self, n_rows: int, seed: int, shuffle: bool = True, lengths: np.ndarray | None = None, group: int = 1
    ) -> None:
        if n_rows < 1:
            raise ValueError(f"n_rows ({n_rows}) must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed ({seed}) must be in [0, 2³²)")
        if lengths is not None and len(lengths) != n_rows:
            raise ValueError(f"{len(lengths)} lengths were given for {n_rows} rows")
        self.n_rows = n_rows
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

    def epochs(self, start: int, count: int) -> np.ndarray:
        """The epoch (count,) that each of the positions start … start + count - 1 belongs to."""
        return np.arange(start, start + count, dtype=np.int64) // self.n_rows

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


class TrainingSampler(Sampler[list[Any]]):
    """Batch sampler that never ends: this rank's rows of one global batch after another.

    Args:
        order: the stream of rows.
        batch_size: rows of a global batch, over all ranks; ``world_size`` must divide it.
        rank: this rank.
        world_size: ranks that share each batch.
        start: position of the stream to begin at.
        with_epochs: give (row, epoch) for each row, for data that differ from epoch to epoch.
    """

    def __init__(
        self,
        order: RowOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        with_epochs: bool = False,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.per_rank = rows_per_rank(batch_size, world_size)
        self.rank = rank
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
        position = self.start + self.rank * self.per_rank
        while True:
            rows = self.order.rows(position, self.per_rank).tolist()
            if self.with_epochs:
                yield list(zip(rows, self.order.epochs(position, self.per_rank).tolist(), strict=True))
            else:
                yield rows
            position += self.batch_size


class EvaluationSampler(Sampler[list[int]]):
    """Batch sampler that gives every row once, to one rank; all ranks get equally many batches.

    Rank r takes the rows r, r + world_size, … of those given; short ranks are filled up with `PADDING_ROW`, since
    sharded models need every rank at every step.

    Args:
        rows: the row ids, in any order.
        batch_size: rows of a batch over all ranks; ``world_size`` must divide it.
        rank: this rank.
        world_size: ranks that share the rows.
    """

    def __init__(self, rows: Sequence[int], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.per_rank = rows_per_rank(batch_size, world_size)
        own = list(rows[rank::world_size])
        self.rows = own + [PADDING_ROW] * (-(-len(rows) // world_size) - len(own))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.per_rank)

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(0, len(self.rows), self.per_rank):
            yield self.rows[i : i + self.per_rank]


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


def replay_chain(order: RowOrder, *, batch_size: int, rank: int, world_size: int, start: int, stop: int) -> str:
    """The digest that ``rank`` must have reached after training the positions ``start`` … ``stop - 1``."""
    sampler = TrainingSampler(order, batch_size=batch_size, rank=rank, world_size=world_size, start=start)
    digest = ""
    for _, rows in zip(range(start, stop, batch_size), sampler, strict=False):
        digest = extend_chain(digest, rows)
    return digest
