"""What tables of comparisons are made of: columns with their cells, shown alike in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mhe_lightning.comparison.results import Comparison, Estimate, Metric
from mhe_lightning.comparison.tables import Column, Table, Value

UNDEFINED = "–"


class Cell(NamedTuple):
    shown: str
    values: tuple[Value, ...]


class Part(NamedTuple):
    column: Column
    cells: Sequence[Cell]


def assemble(caption: str, parts: Iterable[Part], notes: Iterable[str], others: Iterable[str]) -> Table:
    """Without the parts in which nothing is known."""
    kept = [part for part in parts if any(value is not None for cell in part.cells for value in cell.values)]
    rows = list(zip(*(part.cells for part in kept), strict=True))
    shown = [[cell.shown for cell in row] for row in rows]
    if any("±" in text for row in shown for text in row):
        notes = ["± is the 95 % interval of the mean over seeds (Student's t).", *notes]
    values = [[value for cell in row for value in cell.values] for row in rows]
    return Table(caption, [part.column for part in kept], shown, [*notes, *others], values)


def estimate_column(title: str, field: str, description: str) -> Column:
    return Column(title, "right", description, (field, f"{field}_half_width"))


def name_part(names: Sequence[str]) -> Part:
    return Part(Column("attention"), [Cell(name, (name,)) for name in names])


def score_part(c: Comparison, title: str, field: str, scores: Sequence[Estimate | None]) -> Part:
    column = estimate_column(title, field, f"on {c.split}, {direction(c.metric)} is better")
    return Part(column, [estimate_cell(score, 2, c.metric.unit) for score in scores])


def retained_part(estimates: Sequence[Estimate | None], reference: str) -> Part:
    column = estimate_column("PRR %", "prr_percent", f"performance retention ratio: what is kept of {reference}")
    return Part(column, [estimate_cell(e, 1, 100) for e in estimates])


def efficiency_part(estimates: Sequence[Estimate | None], baseline: str) -> Part:
    description = f"performance elasticity of parameters: relative gain over {baseline} per relative gain in parameters"
    return Part(estimate_column("PEoP", "peop", description), [estimate_cell(e, 3) for e in estimates])


def attention_parameters_part(counts: Sequence[int], reference: int | None) -> Part:
    def cell(count: int) -> Cell:
        if not reference:
            return Cell(f"{count:,}", (count, None))
        percent = 100 * count / reference
        return Cell(f"{count:,} ({percent:.1f} %)", (count, percent))

    column = Column(
        "attention parameters",
        "right",
        "with output projections, without biases; in per cent of the reference",
        ("attention_parameters", "attention_parameters_percent"),
    )
    return Part(column, [cell(count) for count in counts])


def estimate_cell(e: Estimate | None, digits: int, factor: float = 1.0) -> Cell:
    if e is None:
        return Cell(UNDEFINED, (None, None))
    mean = factor * e.mean
    if e.half_width is None:
        return Cell(number(mean, digits), (mean, None))
    half_width = factor * e.half_width
    return Cell(f"{number(mean, digits)} ± {number(half_width, digits)}", (mean, half_width))


def number(value: float | None, digits: int) -> str:
    # adding zero turns a rounded -0.0
    return UNDEFINED if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"


def whole(e: Estimate | None) -> Estimate | None:
    """Of the reference itself, which has no spread."""
    return Estimate(e.mean, None, e.n) if e else None


def title_of(metric: Metric) -> str:
    if metric.unit == 1:
        return metric.name
    return f"{metric.name} %" if metric.unit == 100 else f"{metric.name} × {metric.unit:g}"


def field_of(metric: Metric) -> str:
    return f"{metric.name}_percent" if metric.unit == 100 else metric.name


def direction(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def seeds_note(scores: Sequence[Mapping[int, float]]) -> str:
    counts = {len(own) for own in scores} or {0}
    if counts == {1}:
        return "Scores are of n = 1 seed."
    return f"Means are over n = {' to '.join(str(n) for n in sorted({min(counts), max(counts)}))} seeds."
