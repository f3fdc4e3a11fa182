"""The table of several tasks: a row per attention, a column per task, and averages over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mhe_lightning.benchmarks import BENCHMARKS, benchmark_average
from mhe_lightning.comparison.columns import (
    Part,
    assemble,
    attention_parameters_part,
    efficiency_part,
    estimate_cell,
    estimate_column,
    field_of,
    name_part,
    retained_part,
    score_part,
    seeds_note,
    title_of,
    whole,
)
from mhe_lightning.comparison.results import Comparison, Estimate, Variant
from mhe_lightning.comparison.statistics import common_seeds, elasticity, estimate, retention
from mhe_lightning.comparison.tables import Table

GROUPS = {"glue": "GLUE", "superglue": "SuperGLUE", "squad": "SQuAD"}
"""Tasks that have an average, by what their names begin with."""

BySeed = Mapping[int, float | None]


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
    parts, notes = [name_part(names)], []
    splits = {c.split for c in comparisons}
    for benchmark, group in _groups(comparisons):
        for c in group:
            title = f"{c.task} {title_of(c.metric)}" + (f" ({c.split})" if len(splits) > 1 else "")
            scores = [by_task[c.task][name].score if name in by_task[c.task] else None for name in names]
            parts.append(score_part(c, title, f"{c.task}_{field_of(c.metric)}", scores))
        part, note = _average_part(benchmark, group, by_task, names)
        parts += part
        notes += note

    # of different kinds of models they differ
    parameters = {name: {own[name].attention_parameters for own in found if name in own} for name in names}
    if all(len(counts) == 1 for counts in parameters.values()):
        alike = {name: min(counts) for name, counts in parameters.items()}
        parts.append(attention_parameters_part(list(alike.values()), alike.get(reference)))

    ratios, note = _over_tasks("PRR", comparisons, [_retentions(c) for c in comparisons], names)
    notes += note
    gains, note = _over_tasks("PEoP", comparisons, [_elasticities(c) for c in comparisons], names)
    notes += note
    parts.append(retained_part([whole(e) if name == reference else e for name, e in ratios.items()], reference))
    parts.append(efficiency_part(list(gains.values()), baseline))
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
    return assemble(caption, parts, [seeds_note(scores_of_all), *notes], theirs)


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
) -> tuple[list[Part], list[str]]:
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
    column = estimate_column(title, field, "mean of the shown scores")
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
    return [Part(column, [estimate_cell(average(name), 2) for name in names])], notes


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
