"""Which pieces of text go to which split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import floor

from mhe_lightning.data.pieces import Piece, Source

SPLITS = ("train", "validation", "test")


class Assignment:
    """Which pieces go to which split. Each call of `pieces` reads the sources from the beginning.

    Args:
        inputs: (our split, source, its split) for each split that is not cut from the training split, which
            comes last.
        shares: The splits that are cut from the training split, and their shares of it.
        deduplicate: Drop exact duplicates within each split, and from the training split what others have;
            always done where something is held out.
    """

    def __init__(
        self, inputs: Sequence[tuple[str, Source, str]], shares: Mapping[str, float], deduplicate: bool
    ) -> None:
        self.inputs = inputs
        self.shares = shares
        self.deduplicate = deduplicate or bool(shares)
        names = {split for split, _, _ in self.inputs} | set(self.shares)
        self.splits = tuple(split for split in SPLITS if split in names)
        self.duplicates: Counter[str] = Counter()

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """(split, piece) in order. A piece whose successor goes elsewhere ends its document."""
        return self._pieces(self.inputs)

    def training_pieces(self) -> Iterator[tuple[str, Piece]]:
        """Those of the training split; the others are read only where it must give up what they have."""
        inputs = [given for given in self.inputs if self.deduplicate or given[0] == "train"]
        return (item for item in self._pieces(inputs) if item[0] == "train")

    def _pieces(self, inputs: Sequence[tuple[str, Source, str]]) -> Iterator[tuple[str, Piece]]:
        self.duplicates.clear()
        seen: dict[str, set[bytes]] = {}
        for split, source, theirs in inputs:
            # The training split comes last and gives up what the others have; those keep what they share.
            known = set().union(*seen.values()) if split == "train" else set()
            seen[split] = known
            held: tuple[str, Piece] | None = None
            for piece, target in self._targets(split, source.pieces(theirs), known):
                if held is not None:
                    yield held if target == held[0] else (held[0], held[1]._replace(ends_document=True))
                held = None if target is None else (target, piece)
            if held is not None:
                yield held

    def _targets(self, split: str, pieces: Iterable[Piece], known: set[bytes]) -> Iterator[tuple[Piece, str | None]]:
        """Each piece with its split, or None for a duplicate."""
        turns = Turns(self.shares if split == "train" else {})
        for piece in pieces:
            if self.deduplicate:
                digest = hashlib.blake2b(piece.text.encode(), digest_size=16).digest()
                if digest in known:
                    self.duplicates[split] += 1
                    yield piece, None
                    continue
                known.add(digest)
            yield piece, turns.next() or split


class Turns:
    """Spreads held-out documents evenly: number i is taken when floor((i + 1) * share) > floor(i * share)."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.shares: list[tuple[str, float]] = []
        rest = 1.0
        for split, share in shares.items():
            # A later split chooses among what earlier ones left, so that equal shares do not collide.
            self.shares.append((split, share / rest))
            rest -= share
        self.asked = [0] * len(self.shares)

    def next(self) -> str | None:
        """The split that the next document goes to, or None if it is not held out."""
        for turn, (split, share) in enumerate(self.shares):
            number = self.asked[turn]
            self.asked[turn] += 1
            if floor((number + 1) * share) > floor(number * share):
                return split
        return None
