"""The table of one task: a row per attention, with its score and its costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mhe_lightning.comparison.columns import (
    UNDEFINED,
    Cell,
    Part,
    assemble,
    attention_parameters_part,
    direction,
    efficiency_part,
    estimate_cell,
    estimate_column,
    field_of,
    name_part,
    number,
    retained_part,
    score_part,
    seeds_note,
    title_of,
    whole,
)
from mhe_lightning.comparison.results import Comparison, Variant
from mhe_lightning.comparison.statistics import holm, retained
from mhe_lightning.comparison.tables import Column, Table

MIB = 2**20


def comparison_table(c: Comparison) -> Table:
    """A row per variant: its score, retention (PRR), elasticity (PEoP) and test against the reference, and its costs.

    Columns of which no variant has anything are left out. Time for a token is shown at the longest context that was
    measured with all variants that have any.
    """
    variants = c.variants
    reference = next((variant for variant in variants if variant.name == c.reference), None)
    p_values = {variant.name: None if variant is reference else variant.p_value for variant in variants}
    parts = [
        name_part([variant.name for variant in variants]),
        Part(Column("seeds", "right"), [_count(len(variant.scores)) for variant in variants]),
        score_part(c, title_of(c.metric), field_of(c.metric), [variant.score for variant in variants]),
        retained_part(
            [
                whole(retained(variant.scores, variant.scores, c.metric)) if variant is reference else variant.retained
                for variant in variants
            ],
            c.reference,
        ),
        efficiency_part(
            [None if variant.name == c.baseline else variant.efficiency for variant in variants], c.baseline
        ),
        _p_part("p", "p", f"two-sided paired t-test over seeds against {c.reference}", p_values),
        _p_part("p, Holm", "p_holm", "p corrected for the number of comparisons by Holm's method", holm(p_values)),
        attention_parameters_part(
            [variant.attention_parameters for variant in variants],
            reference.attention_parameters if reference else None,
        ),
        Part(
            Column("all parameters", "right", "of the whole model", ("parameters",)),
            [_count(variant.parameters) for variant in variants],
        ),
        Part(
            estimate_column("tokens/s", "tokens_per_second", "in training"),
            [estimate_cell(variant.tokens_per_second, 0) for variant in variants],
        ),
        Part(
            estimate_column("peak memory MiB", "peak_memory_mib", "of the training process"),
            [estimate_cell(variant.peak_memory_bytes, 0, 1 / MIB) for variant in variants],
        ),
        _latency_part(variants),
        _cache_part(variants, reference.cache_bytes_per_token if reference else None),
        _settings_part(variants),
    ]
    notes = [seeds_note([variant.scores for variant in variants])]
    tests = sum(p is not None for p in p_values.values())
    if tests:
        comparisons = "1 comparison" if tests == 1 else f"{tests} comparisons"
        notes.append(f"p is of the two-sided paired t-test over seeds against {c.reference}, for {comparisons}.")
    caption = f"{c.task} ({c.split}): {title_of(c.metric)}, {direction(c.metric)} is better; {c.mode.replace('_', ' ')}"
    return assemble(caption, parts, notes, c.notes)


def _p_part(title: str, field: str, description: str, p_values: Mapping[str, float | None]) -> Part:
    def cell(p: float | None) -> Cell:
        return Cell("< 0.001" if p is not None and p < 0.001 else number(p, 3), (p,))

    return Part(Column(title, "right", description, (field,)), [cell(p) for p in p_values.values()])


def _latency_part(variants: Sequence[Variant]) -> Part:
    measured = [set(variant.latency) for variant in variants if variant.latency]
    # lengths that all have, as others cannot be compared
    length = max(set.intersection(*measured) or set.union(*measured)) if measured else 0

    def cell(seconds: float | None) -> Cell:
        ms = None if seconds is None else 1000 * seconds
        return Cell(number(ms, 2), (ms,))

    description = f"median time for the next token of one sequence after {length:,} tokens"
    column = Column(f"ms/token at {length:,}", "right", description, (f"decode_ms_per_token_at_{length}",))
    return Part(column, [cell(variant.latency.get(length)) for variant in variants])


def _cache_part(variants: Sequence[Variant], reference: int | None) -> Part:
    def cell(size: int | None) -> Cell:
        if size is None:
            return Cell(UNDEFINED, (None, None))
        if not reference or not size:
            return Cell(f"{size:,}", (size, None))
        share = f"1/{reference / size:.4g}" if size <= reference else f"× {size / reference:.4g}"
        return Cell(f"{size:,} ({share})", (size, size / reference))

    description = "of the KV caches of all layers, for one sequence; as a share of the reference's"
    column = Column("cache bytes/token", "right", description, ("cache_bytes_per_token", "cache_share"))
    return Part(column, [cell(variant.cache_bytes_per_token) for variant in variants])


def _settings_part(variants: Sequence[Variant]) -> Part:
    keys = dict.fromkeys(key for variant in variants for key in variant.settings)
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}

    def cell(settings: Mapping[str, object]) -> Cell:
        if not settings:
            return Cell(UNDEFINED, (None,))
        shown = ", ".join(f"{short[key]}={value}" for key, value in settings.items())
        return Cell(shown, (json.dumps(dict(settings), default=str),))

    column = Column("settings", "left", "chosen for this variant", ("settings",))
    return Part(column, [cell(variant.settings) for variant in variants])


def _count(count: int) -> Cell:
    return Cell(f"{count:,}", (count,))
