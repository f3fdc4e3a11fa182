"""Tables of comparisons, and their renderings: for a terminal, Markdown, CSV, LaTeX and HTML.

A column is described once, by its title, the cells that are shown, and the numbers behind them; every rendering is
made of that.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from mhe_lightning.comparison.results import Comparison, Estimate, Metric, Variant
from mhe_lightning.comparison.statistics import common_seeds, elasticity, estimate, holm, retained, retention
from mhe_lightning.verbs.average import BENCHMARKS, benchmark_average

Value = float | int | str | None

UNDEFINED = "–"
GROUPS = {"glue": "GLUE", "superglue": "SuperGLUE", "squad": "SQuAD"}
"""Tasks that have an average, by what their names begin with."""

MIB = 2**20


@dataclass(frozen=True)
class Column:
    """What is in a column.

    Args:
        title: its head, with the unit.
        align: "right" for numbers.
        description: what the title leaves out, a sentence; empty if nothing.
        fields: names of the numbers of a cell, units included, for CSV; the title if not given.
    """

    title: str
    align: Literal["left", "right"] = "left"
    description: str = ""
    fields: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.fields or (self.title,)


@dataclass(frozen=True)
class Table:
    """Cells as they are shown, and the numbers behind them.

    Args:
        caption: what it is about, a line.
        columns: from left to right.
        rows: of each row a text per column.
        notes: what a reader should know, a sentence each.
        values: of each row the numbers of all columns' ``fields`` in the shown units, unrounded, None where there is
            none; the texts if not given.

    Raises:
        ValueError: a row has more or fewer cells than the columns.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    values: Sequence[Sequence[Value]] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells; give one for each of {len(self.columns)} columns")
        if self.values and len(self.values) != len(self.rows):
            raise ValueError(f"values are of {len(self.values)} rows; give those of each of {len(self.rows)}")
        n = sum(len(column.names) for column in self.columns)
        for values in self.values:
            if len(values) != n:
                raise ValueError(f"a row has {len(values)} values; give one for each of {n} fields of the columns")


def render(table: Table, kind: str) -> str:
    """``table`` as a text that ends with a line break.

    Args:
        table: what to show.
        kind: "text" (aligned, for terminals), "markdown" (GitHub's), "csv" (RFC 4180: the unrounded numbers, without
            caption and notes), "latex" (needs the package booktabs) or "html" (a ``<table>``; numbers have the class
            "num").

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in RENDERERS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(RENDERERS)}")
    return RENDERERS[kind](table)


def comparison_table(c: Comparison) -> Table:
    """A row per variant: its score, retention (PRR), elasticity (PEoP) and test against the reference, and its costs.

    Columns of which no variant has anything are left out. Time for a token is shown at the longest context that was
    measured with all variants that have any.
    """
    variants = c.variants
    reference = next((variant for variant in variants if variant.name == c.reference), None)
    p_values = {variant.name: None if variant is reference else variant.p_value for variant in variants}
    parts = [
        _name_part([variant.name for variant in variants]),
        _Part(Column("seeds", "right"), [_count(len(variant.scores)) for variant in variants]),
        _score_part(c, _title(c.metric), _field(c.metric), [variant.score for variant in variants]),
        _retained_part(
            [
                _whole(retained(variant.scores, variant.scores, c.metric)) if variant is reference else variant.retained
                for variant in variants
            ],
            c.reference,
        ),
        _efficiency_part(
            [None if variant.name == c.baseline else variant.efficiency for variant in variants], c.baseline
        ),
        _p_part("p", "p", f"two-sided paired t-test over seeds against {c.reference}", p_values),
        _p_part("p, Holm", "p_holm", "p corrected for the number of comparisons by Holm's method", holm(p_values)),
        _attention_parameters_part(
            [variant.attention_parameters for variant in variants],
            reference.attention_parameters if reference else None,
        ),
        _Part(
            Column("all parameters", "right", "of the whole model", ("parameters",)),
            [_count(variant.parameters) for variant in variants],
        ),
        _Part(
            _estimate_column("tokens/s", "tokens_per_second", "in training"),
            [_estimate(variant.tokens_per_second, 0) for variant in variants],
        ),
        _Part(
            _estimate_column("peak memory MiB", "peak_memory_mib", "of the training process"),
            [_estimate(variant.peak_memory_bytes, 0, 1 / MIB) for variant in variants],
        ),
        _latency_part(variants),
        _cache_part(variants, reference.cache_bytes_per_token if reference else None),
        _settings_part(variants),
    ]
    notes = [_seeds_note([variant.scores for variant in variants])]
    tests = sum(p is not None for p in p_values.values())
    if tests:
        comparisons = "1 comparison" if tests == 1 else f"{tests} comparisons"
        notes.append(f"p is of the two-sided paired t-test over seeds against {c.reference}, for {comparisons}.")
    caption = f"{c.task} ({c.split}): {_title(c.metric)}, {_direction(c.metric)} is better; {c.mode.replace('_', ' ')}"
    return _assemble(caption, parts, notes, c.notes)


def multi_task_table(comparisons: Sequence[Comparison]) -> Table:
    """A row per variant, a column per task: scores, averages of benchmarks, and PRR and PEoP over all tasks.

    The tasks of GLUE, SuperGLUE and SQuAD stand together, each group of two or more followed by its average, a mean of
    the shown numbers without the benchmark's diagnostics. Averages are over tasks for each seed that all of the tasks
    have, then over seeds, as are PRR and PEoP. What a variant has for only some of the tasks is not averaged. A task in
    which PRR (or PEoP) is not defined for a variant is left out of that mean for all variants, and a note names it;
    PEoP does not count a variant with as many attention parameters as the baseline, which has none in any task.
    Attention parameters are shown where those of every variant are the same in all tasks.

    Args:
        comparisons: one per task, in the order of the columns, all with one reference and one baseline.

    Raises:
        ValueError: there are none, two are of one task, or they differ in their reference or baseline.
        UserError: as in `mhe_lightning.comparison.statistics.estimate`.

    Source: the layout of the tables of Xue and Aletras 2023, *Pit One Against Many*.
    """
    _check(comparisons)
    reference, baseline = comparisons[0].reference, comparisons[0].baseline
    found = [{variant.name: variant for variant in c.variants} for c in comparisons]
    names = list(dict.fromkeys(variant.name for c in comparisons for variant in c.variants))
    by_task = dict(zip((c.task for c in comparisons), found, strict=True))
    parts, notes = [_name_part(names)], []
    splits = {c.split for c in comparisons}
    for benchmark, group in _groups(comparisons):
        for c in group:
            title = f"{c.task} {_title(c.metric)}" + (f" ({c.split})" if len(splits) > 1 else "")
            scores = [by_task[c.task][name].score if name in by_task[c.task] else None for name in names]
            parts.append(_score_part(c, title, f"{c.task}_{_field(c.metric)}", scores))
        part, note = _average_part(benchmark, group, by_task, names)
        parts += part
        notes += note

    # of different kinds of models they differ
    parameters = {name: {own[name].attention_parameters for own in found if name in own} for name in names}
    if all(len(counts) == 1 for counts in parameters.values()):
        alike = {name: min(counts) for name, counts in parameters.items()}
        parts.append(_attention_parameters_part(list(alike.values()), alike.get(reference)))

    ratios, note = _over_tasks("PRR", comparisons, [_retentions(c) for c in comparisons], names)
    notes += note
    gains, note = _over_tasks("PEoP", comparisons, [_elasticities(c) for c in comparisons], names)
    notes += note
    parts.append(_retained_part([_whole(e) if name == reference else e for name, e in ratios.items()], reference))
    parts.append(_efficiency_part(list(gains.values()), baseline))
    if len(comparisons) > 1:
        notes.append("PRR and PEoP are computed per seed and task, then averaged over tasks, then over seeds.")

    told: dict[str, list[str]] = {}
    for c in comparisons:
        for text in c.notes:
            told.setdefault(text, []).append(c.task)
    theirs = [
        text if len(tasks) == len(comparisons) > 1 else f"{', '.join(tasks)}: {text}" for text, tasks in told.items()
    ]
    scores_of_all = [variant.scores for c in comparisons for variant in c.variants]
    caption = f"Scores by task ({', '.join(sorted(splits))})"
    return _assemble(caption, parts, [_seeds_note(scores_of_all), *notes], theirs)


# Parts of a table: a column with its cells


class _Cell(NamedTuple):
    shown: str
    values: tuple[Value, ...]


class _Part(NamedTuple):
    column: Column
    cells: Sequence[_Cell]


def _assemble(caption: str, parts: Iterable[_Part], notes: Iterable[str], others: Iterable[str]) -> Table:
    """Without the parts in which nothing is known."""
    kept = [part for part in parts if any(value is not None for cell in part.cells for value in cell.values)]
    rows = list(zip(*(part.cells for part in kept), strict=True))
    shown = [[cell.shown for cell in row] for row in rows]
    if any("±" in text for row in shown for text in row):
        notes = ["± is the 95 % interval of the mean over seeds (Student's t).", *notes]
    values = [[value for cell in row for value in cell.values] for row in rows]
    return Table(caption, [part.column for part in kept], shown, [*notes, *others], values)


def _estimate_column(title: str, field: str, description: str) -> Column:
    return Column(title, "right", description, (field, f"{field}_half_width"))


def _name_part(names: Sequence[str]) -> _Part:
    return _Part(Column("attention"), [_Cell(name, (name,)) for name in names])


def _score_part(c: Comparison, title: str, field: str, scores: Sequence[Estimate | None]) -> _Part:
    column = _estimate_column(title, field, f"on {c.split}, {_direction(c.metric)} is better")
    return _Part(column, [_estimate(score, 2, c.metric.unit) for score in scores])


def _retained_part(estimates: Sequence[Estimate | None], reference: str) -> _Part:
    column = _estimate_column("PRR %", "prr_percent", f"performance retention ratio: what is kept of {reference}")
    return _Part(column, [_estimate(e, 1, 100) for e in estimates])


def _efficiency_part(estimates: Sequence[Estimate | None], baseline: str) -> _Part:
    description = f"performance elasticity of parameters: relative gain over {baseline} per relative gain in parameters"
    return _Part(_estimate_column("PEoP", "peop", description), [_estimate(e, 3) for e in estimates])


def _p_part(title: str, field: str, description: str, p_values: Mapping[str, float | None]) -> _Part:
    def cell(p: float | None) -> _Cell:
        return _Cell("< 0.001" if p is not None and p < 0.001 else _number(p, 3), (p,))

    return _Part(Column(title, "right", description, (field,)), [cell(p) for p in p_values.values()])


def _attention_parameters_part(counts: Sequence[int], reference: int | None) -> _Part:
    def cell(count: int) -> _Cell:
        if not reference:
            return _Cell(f"{count:,}", (count, None))
        percent = 100 * count / reference
        return _Cell(f"{count:,} ({percent:.1f} %)", (count, percent))

    column = Column(
        "attention parameters",
        "right",
        "with output projections, without biases; in per cent of the reference",
        ("attention_parameters", "attention_parameters_percent"),
    )
    return _Part(column, [cell(count) for count in counts])


def _latency_part(variants: Sequence[Variant]) -> _Part:
    measured = [set(variant.latency) for variant in variants if variant.latency]
    # lengths that all have, as others cannot be compared
    length = max(set.intersection(*measured) or set.union(*measured)) if measured else 0

    def cell(seconds: float | None) -> _Cell:
        ms = None if seconds is None else 1000 * seconds
        return _Cell(_number(ms, 2), (ms,))

    description = f"median time for the next token of one sequence after {length:,} tokens"
    column = Column(f"ms/token at {length:,}", "right", description, (f"decode_ms_per_token_at_{length}",))
    return _Part(column, [cell(variant.latency.get(length)) for variant in variants])


def _cache_part(variants: Sequence[Variant], reference: int | None) -> _Part:
    def cell(size: int | None) -> _Cell:
        if size is None:
            return _Cell(UNDEFINED, (None, None))
        if not reference or not size:
            return _Cell(f"{size:,}", (size, None))
        share = f"1/{reference / size:.4g}" if size <= reference else f"× {size / reference:.4g}"
        return _Cell(f"{size:,} ({share})", (size, size / reference))

    description = "of the KV caches of all layers, for one sequence; as a share of the reference's"
    column = Column("cache bytes/token", "right", description, ("cache_bytes_per_token", "cache_share"))
    return _Part(column, [cell(variant.cache_bytes_per_token) for variant in variants])


def _settings_part(variants: Sequence[Variant]) -> _Part:
    keys = dict.fromkeys(key for variant in variants for key in variant.settings)
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}

    def cell(settings: Mapping[str, object]) -> _Cell:
        if not settings:
            return _Cell(UNDEFINED, (None,))
        shown = ", ".join(f"{short[key]}={value}" for key, value in settings.items())
        return _Cell(shown, (json.dumps(dict(settings), default=str),))

    column = Column("settings", "left", "chosen for this variant", ("settings",))
    return _Part(column, [cell(variant.settings) for variant in variants])


def _count(count: int) -> _Cell:
    return _Cell(f"{count:,}", (count,))


def _estimate(e: Estimate | None, digits: int, factor: float = 1.0) -> _Cell:
    if e is None:
        return _Cell(UNDEFINED, (None, None))
    mean = factor * e.mean
    if e.half_width is None:
        return _Cell(_number(mean, digits), (mean, None))
    half_width = factor * e.half_width
    return _Cell(f"{_number(mean, digits)} ± {_number(half_width, digits)}", (mean, half_width))


def _number(value: float | None, digits: int) -> str:
    # adding zero turns a rounded -0.0
    return UNDEFINED if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"


def _whole(e: Estimate | None) -> Estimate | None:
    """Of the reference itself, which has no spread."""
    return Estimate(e.mean, None, e.n) if e else None


def _title(metric: Metric) -> str:
    if metric.unit == 1:
        return metric.name
    return f"{metric.name} %" if metric.unit == 100 else f"{metric.name} × {metric.unit:g}"


def _field(metric: Metric) -> str:
    return f"{metric.name}_percent" if metric.unit == 100 else metric.name


def _direction(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def _seeds_note(scores: Sequence[Mapping[int, float]]) -> str:
    counts = {len(own) for own in scores} or {0}
    if counts == {1}:
        return "Scores are of n = 1 seed."
    return f"Means are over n = {' to '.join(str(n) for n in sorted({min(counts), max(counts)}))} seeds."


# Over tasks


def _check(comparisons: Sequence[Comparison]) -> None:
    if not comparisons:
        raise ValueError("comparisons (none) must be at least one; give one for each task")
    tasks = [c.task for c in comparisons]
    twice = sorted({task for task in tasks if tasks.count(task) > 1})
    if twice:
        raise ValueError(
            f"comparisons must be of one task each, but {', '.join(twice)} has several; leave out the rest"
        )
    for what, given in (
        ("reference", {c.reference for c in comparisons}),
        ("baseline", {c.baseline for c in comparisons}),
    ):
        if len(given) > 1:
            raise ValueError(f"comparisons must have the same {what}, not {' and '.join(sorted(given))}")


def _groups(comparisons: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    """Tasks of a benchmark together, where the first of them stands; any other task alone, without a name."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in comparisons:
        benchmark = next((name for name in GROUPS if c.task.startswith(f"{name}-")), "")
        groups.setdefault((benchmark, "" if benchmark else c.task), []).append(c)
    return [(benchmark, group) for (benchmark, _), group in groups.items()]


def _average_part(
    benchmark: str,
    group: Sequence[Comparison],
    by_task: Mapping[str, Mapping[str, Variant]],
    names: Sequence[str],
) -> tuple[list[_Part], list[str]]:
    tasks = {c.task.removeprefix(f"{benchmark}-"): c for c in group}
    specs = BENCHMARKS[benchmark].tasks if benchmark in BENCHMARKS else {}
    tasks = {task: c for task, c in tasks.items() if task not in specs or specs[task].averaged}
    if not benchmark or len(tasks) < 2:
        return [], []
    complete = bool(specs) and tasks.keys() == {task for task, spec in specs.items() if spec.averaged}

    def mean(shown: Mapping[str, float]) -> float:
        return benchmark_average(benchmark, shown) if complete else math.fsum(shown.values()) / len(shown)

    def average(name: str) -> Estimate | None:
        own = {task: by_task[c.task][name].scores for task, c in tasks.items() if name in by_task[c.task]}
        if len(own) < len(tasks):
            return None
        return _optional_estimate(
            [
                mean({task: c.metric.unit * own[task][seed] for task, c in tasks.items()})
                for seed in common_seeds(*own.values())
            ]
        )

    title = f"{GROUPS[benchmark]} average" + ("" if complete else f" of {len(tasks)}")
    field = f"{benchmark}_average" + ("" if complete else f"_of_{len(tasks)}")
    column = _estimate_column(title, field, "mean of the shown scores")
    notes = []
    if complete:
        # a task's official score is the mean of its metrics, and MNLI's that of its two parts
        other = [
            c.task
            for task, c in tasks.items()
            if c.metric.name != "score" and ((c.metric.name,) != specs[task].metrics or specs[task].part_files)
        ]
        if other:
            notes = [f"The {title} is of the metrics shown, which are not the official scores of {', '.join(other)}."]
    return [_Part(column, [_estimate(average(name), 2) for name in names])], notes


BySeed = Mapping[int, float | None]


def _retentions(c: Comparison) -> dict[str, BySeed]:
    """PRR by variant and seed; of no variant without the reference."""
    own = {variant.name: variant for variant in c.variants}
    if c.reference not in own:
        return {}
    others = own[c.reference].scores
    return {
        name: {
            seed: retention(variant.scores[seed], others[seed], c.metric)
            for seed in common_seeds(variant.scores, others)
        }
        for name, variant in own.items()
    }


def _elasticities(c: Comparison) -> dict[str, BySeed]:
    """PEoP by variant and seed; not of variants with as many parameters as the baseline; of none without it."""
    own = {variant.name: variant for variant in c.variants}
    if c.baseline not in own:
        return {}
    baseline = own[c.baseline]
    return {
        name: {
            seed: elasticity(
                variant.scores[seed],
                baseline.scores[seed],
                variant.attention_parameters,
                baseline.attention_parameters,
                c.metric,
            )
            for seed in common_seeds(variant.scores, baseline.scores)
        }
        for name, variant in own.items()
        if variant.attention_parameters != baseline.attention_parameters
    }


def _over_tasks(
    measure: str, comparisons: Sequence[Comparison], measured: Sequence[Mapping[str, BySeed]], names: Sequence[str]
) -> tuple[dict[str, Estimate | None], list[str]]:
    """Of each variant the mean over tasks for each seed, then over seeds."""
    used, left_out = [], []
    for c, by_variant in zip(comparisons, measured, strict=True):
        if by_variant and all(value is not None for own in by_variant.values() for value in own.values()):
            used.append(by_variant)
        else:
            left_out.append(c.task)

    def mean(name: str) -> Estimate | None:
        tasks = [by_variant[name] for by_variant in used if name in by_variant]
        lacks = any(name not in {variant.name for variant in c.variants} for c in comparisons)
        if lacks or not tasks or len(tasks) < len(used):
            return None
        known = [{seed: value for seed, value in own.items() if value is not None} for own in tasks]
        return _optional_estimate([math.fsum(own[seed] for own in known) / len(known) for seed in common_seeds(*known)])

    notes = []
    if left_out and used:
        notes = [f"{measure} leaves out {', '.join(left_out)}, where it is not defined for every variant."]
    elif left_out:
        notes = [f"{measure} is not defined for every variant in any task."]
    return {name: mean(name) for name in names}, notes


def _optional_estimate(values: Sequence[float]) -> Estimate | None:
    return estimate(values) if values else None


# Renderings


def _text(table: Table) -> str:
    lines = [[_line(cell) for cell in row] for row in (_titles(table), *table.rows)]
    widths = [max(map(_width, cells)) for cells in zip(*lines, strict=True)]

    def padded(cells: Sequence[str]) -> str:
        out = []
        for cell, width, column in zip(cells, widths, table.columns, strict=True):
            space = " " * (width - _width(cell))
            out.append(space + cell if column.align == "right" else cell + space)
        return "  ".join(out).rstrip()

    head, *rows = [padded(cells) for cells in lines]
    rule = "  ".join("-" * width for width in widths)
    notes = ["", *map(_line, table.notes)] if table.notes else []
    return "\n".join([_line(table.caption), "", head, rule, *rows, *notes]) + "\n"


def _markdown(table: Table) -> str:
    def cell(text: str) -> str:
        return re.sub(r"[\\|*`]|<(?=[A-Za-z/!?])", r"\\\g<0>", _line(text))

    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = row("--:" if column.align == "right" else ":--" for column in table.columns)
    rows = [row(map(cell, cells)) for cells in table.rows]
    notes = ["", *(f"- {cell(note)}" for note in table.notes)] if table.notes else []
    return "\n".join([cell(table.caption), "", row(map(cell, _titles(table))), rule, *rows, *notes]) + "\n"


def _csv(table: Table) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    if table.values or not table.rows:
        writer.writerow([name for column in table.columns for name in column.names])
        writer.writerows(table.values)
    else:
        writer.writerow(_titles(table))
        writer.writerows(table.rows)
    return out.getvalue()


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    '"': "''",
    "–": "--",
    "—": "---",
    **{sign: f"\\{sign}" for sign in "%_&#${}"},
}


def _latex(table: Table) -> str:
    def cell(text: str) -> str:
        line = "".join(LATEX.get(sign, sign) for sign in _line(text))
        return re.sub(r"(?<![\w-])-(?=\d)", "$-$", line)

    def row(cells: Iterable[str]) -> str:
        return " & ".join(map(cell, cells)) + r" \\"

    align = "".join("r" if column.align == "right" else "l" for column in table.columns)
    notes = ["", r"\footnotesize", " ".join(map(cell, table.notes))] if table.notes else []
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{cell(table.caption)}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        row(_titles(table)),
        r"\midrule",
        *map(row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _html(table: Table) -> str:
    classes = [' class="num"' if column.align == "right" else "" for column in table.columns]

    def head(column: Column, kind: str) -> str:
        title = f' title="{escape(column.description)}"' if column.description else ""
        return f'<th scope="col"{kind}{title}>{escape(column.title)}</th>'

    def row(cells: Sequence[str]) -> str:
        first, *others = map(escape, cells)
        data = (f"<td{kind}>{text}</td>" for text, kind in zip(others, classes[1:], strict=True))
        return f'<tr><th scope="row"{classes[0]}>{first}</th>{"".join(data)}</tr>'

    heads = "".join(head(column, kind) for column, kind in zip(table.columns, classes, strict=True))
    notes = [f'<tr><td colspan="{len(table.columns)}">{escape(note)}</td></tr>' for note in table.notes]
    lines = [
        "<table>",
        f"<caption>{escape(table.caption)}</caption>",
        "<thead>",
        f"<tr>{heads}</tr>",
        "</thead>",
        "<tbody>",
        *map(row, table.rows),
        "</tbody>",
        *(["<tfoot>", *notes, "</tfoot>"] if notes else []),
        "</table>",
    ]
    return "\n".join(lines) + "\n"


RENDERERS: dict[str, Callable[[Table], str]] = {
    "text": _text,
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "html": _html,
}


def _titles(table: Table) -> list[str]:
    return [column.title for column in table.columns]


def _line(text: str) -> str:
    return " ".join(text.split())


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )
