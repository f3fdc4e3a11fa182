"""From what the ranks say of themselves: whether the run is in trouble, and which of them is the cause."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["failed", "gone", "collateral", "terminated", "hung"]

SETTLE = {"failed": 1.5, "gone": 1.5, "collateral": 3.0, "terminated": 20.0}
"""Seconds from the first sign of trouble to the verdict: where one rank dies, the others' collectives fail too, and
any of them may be heard first. Ranks that were terminated have that time to end by themselves."""

CAUSES = ("failed", "terminated", "gone", "collateral")
"""What is rather the cause of the others comes first."""


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on.

    Args:
        kind: what has happened.
        ranks: to which ranks.
        text: the same for people.
    """

    kind: Kind
    ranks: tuple[int, ...]
    text: str


@dataclass
class _Trouble:
    kind: Kind
    rank: int
    text: str
    age: float = 0.0


class Judge:
    """Hears the ranks, and finds out who is the cause when they stop.

    Args:
        timeout: seconds after which a run in which no rank moves is hung; None: never.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._signs: dict[int, dict[str, Any]] = {}
        self._troubles: list[_Trouble] = []
        self._still = 0.0

    def hear(self, rank: int, message: Mapping[str, Any] | None) -> None:
        """Take what a rank says of itself; None: its process is gone.

        Args:
            rank: who says it.
            message: ``name`` (rank, host and process, for people), ``moves`` (how often it has moved), ``position``,
                ``where`` (the line of Python it is in), ``state`` ("running", "failed", "collateral", "terminated" or
                "ended") and, for a failure, ``text``.
        """
        known = self._signs.get(rank, {})
        if message is None:
            if known.get("state") == "running":
                self._trouble(
                    "gone", rank, f"{_name(rank, known)} is gone, last seen in {known.get('position')}: {_GONE}"
                )
            self._signs.pop(rank, None)
            return
        if message.get("moves") != known.get("moves"):
            self._still = 0.0
        self._signs[rank] = dict(message)
        state = message.get("state")
        if state in ("failed", "collateral", "terminated") and state != known.get("state"):
            self._trouble(state, rank, f"{_name(rank, message)} {message.get('text')}")

    def verdict(self, elapsed: float) -> Verdict | None:
        """What is wrong, if something is.

        Args:
            elapsed: seconds since this was asked before.
        """
        self._still += elapsed
        for trouble in self._troubles:
            trouble.age += elapsed
        if self._troubles:
            if all(sign["state"] in ("ended", "terminated") for sign in self._signs.values()) and all(
                trouble.kind == "terminated" for trouble in self._troubles
            ):
                return None  # they all end as they should
            cause = min(self._troubles, key=lambda trouble: CAUSES.index(trouble.kind))
            return Verdict(cause.kind, (cause.rank,), cause.text) if cause.age >= SETTLE[cause.kind] else None
        running = {rank: sign for rank, sign in self._signs.items() if sign["state"] == "running"}
        if self.timeout is None or self._still < self.timeout or not running:
            return None
        return self._hung(running)

    def _trouble(self, kind: Kind, rank: int, text: str) -> None:
        self._troubles.append(_Trouble(kind, rank, text))

    def _hung(self, running: dict[int, dict[str, Any]]) -> Verdict:
        """All ranks make the same moves, so whoever has made fewer holds up the others."""
        fewest = min(sign["moves"] for sign in running.values())
        behind = {rank: sign for rank, sign in running.items() if sign["moves"] == fewest}
        others = {rank: sign for rank, sign in running.items() if rank not in behind}
        seconds = f"for {self._still:.0f} s"
        if others:
            first = next(iter(others.values()))
            told = "; ".join(f"{_name(rank, sign)} has been {_at(sign)} {seconds}" for rank, sign in _some(behind))
            return Verdict("hung", tuple(behind), f"{told}; the others wait {_at(first)}")
        groups: dict[str, list[int]] = defaultdict(list)
        for rank, sign in running.items():
            groups[_at(sign)].append(rank)
        if len(running) == 1:
            rank, sign = next(iter(running.items()))
            return Verdict("hung", (rank,), f"{_name(rank, sign)} has been {_at(sign)} {seconds}")
        told = "; ".join(f"rank {', '.join(map(str, ranks[:8]))} {at}" for at, ranks in groups.items())
        return Verdict("hung", tuple(running), f"no rank has moved {seconds}, and none is behind the others: {told}")


_GONE = "killed, or crashed; the kernel's log (dmesg) tells whether the host ran out of memory"


def _name(rank: int, sign: Mapping[str, Any]) -> str:
    return str(sign.get("name") or f"rank {rank}")


def _at(sign: Mapping[str, Any]) -> str:
    return f"in {sign['position']} ({sign['where']})"


def _some(signs: dict[int, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return list(signs.items())[:8]
