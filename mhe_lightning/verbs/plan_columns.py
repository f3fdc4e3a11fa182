"""Columns of the tables that `plan` prints: a row for each attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mhe_lightning.comparison.tables import Column, Table
from mhe_lightning.planning import Cost

MIB = 2**20

MakeTable = Callable[..., Table]
Against = Callable[[Callable[[Cost], float | None]], "list[Part]"]


class Part:
    """A column: what it measures of a variant, and how that is shown."""

    def __init__(self, title: str, measure: Callable[[Cost], Any], show: Callable[[Any], str], align: Any = "right"):
        self.column = Column(title, align)
        self.measure = measure
        self.show = show


def make_table(caption: str, parts: Sequence[Part], costs: Sequence[Cost], notes: Sequence[str]) -> Table:
    values = [[part.measure(cost) for part in parts] for cost in costs]
    rows = [
        ["–" if value is None else part.show(value) for part, value in zip(parts, row, strict=True)] for row in values
    ]
    return Table(caption, [part.column for part in parts], rows, notes, values)


def ratio_to(measure: Callable[[Cost], float | None], other: Cost) -> Part:
    def ratio(cost: Cost) -> float | None:
        one, all_ = measure(cost), measure(other)
        return one / all_ if one is not None and all_ else None

    return Part(f"× {other.name}", ratio, lambda value: f"{value:.3f}")


def count(value: int) -> str:
    return f"{value:,}"


def decimal(value: float) -> str:
    return f"{value:,.1f}"


def big(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:g}"
