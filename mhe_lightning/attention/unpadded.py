"""Batches without their padding: the real tokens of all sequences one after another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Unpadded(NamedTuple):
    """Where the M real tokens of a batch (B, T) are.

    What is computed position by position is computed of (M, D) rows then; only queries, keys and values are spread out
    to sequences again, since attention is between the tokens of one.

    Args:
        places: (M,) int64, the real tokens' positions along the flattened (B, T), each once.
        batch: sequences B.
        length: tokens T of the longest.
    """

    places: Tensor
    batch: int
    length: int

    def spread(self, rows: Tensor) -> Tensor:
        """(M, …) → (B, T, …), zero at padding."""
        spread = rows.new_zeros(self.batch * self.length, *rows.shape[1:])
        return spread.index_copy_(0, self.places, rows).unflatten(0, (self.batch, self.length))

    def gather(self, sequences: Tensor) -> Tensor:
        """(B, T, …) → (M, …)."""
        return sequences.flatten(0, 1).index_select(0, self.places)

    def spread_heads(self, rows: Tensor) -> Tensor:
        """(1, n, M, d), what one sequence of all tokens has, → (B, n, T, d)."""
        return self.spread(rows[0].transpose(0, 1)).transpose(1, 2)

    def gather_heads(self, heads: Tensor) -> Tensor:
        """(B, n, T, d) → (1, n, M, d)."""
        return self.gather(heads.transpose(1, 2)).transpose(0, 1)[None]
