"""The figures of a comparison. Each function draws one from plain data and writes no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mhe_lightning.comparison.labels import place_labels
from mhe_lightning.comparison.results import Comparison, Metric, Variant
from mhe_lightning.comparison.style import NORMAL, SMALL, bar_style, line_style, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
# A curve's beginning is far from its end; what is seen after this share of the steps sets the picture's range.
WARM_UP = 0.2
BAR_STARTS = (99.0, 98.0, 95.0, 90.0, 80.0, 70.0, 60.0, 50.0, 0.0)  # per cent


def figures(comparison: Comparison) -> dict[str, tuple[Figure, str]]:
    """Every figure that the data allow.

    Returns:
        Name of the file without its ending → the figure and its caption, a sentence.
    """
    drawn: dict[str, tuple[Figure, str]] = {}
    metric, reference = comparison.metric, comparison.reference
    if any(_finite(v.score.mean) for v in comparison.variants):
        drawn["pareto"] = (
            plot_pareto(comparison),
            f"Score against attention parameters: {_sentence_about_scores(comparison)}; the line is the Pareto front, "
            "the best score that a number of parameters buys.",
        )
    if any(_retained(v) is not None for v in comparison.variants):
        drawn["retention"] = (
            plot_retention(comparison),
            f"Performance retention ratio: the share of {reference}'s {metric.name} that each variant keeps, with 95 % "
            "intervals over paired seeds; “–” where it is not defined.",
        )
    if any(curve.steps for v in comparison.variants for curve in v.curves):
        drawn["curves"] = (plot_curves(comparison), "Training curves: means over seeds against optimizer steps.")
    context = plot_context(comparison)
    if context is not None:
        drawn["context"] = (context, _sentence_about_context(comparison))
    drawn.update(_figures_of_heads(comparison))
    return drawn


def pareto_front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Which points no other beats: none costs at most as much and scores at least as well, better in one of both.

    Args:
        points: (cost, score) of each; a lower cost is better.
        higher_is_better: which way scores are better.

    Returns:
        Indices, by rising cost. Equal points are all in it or all out.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1]))
    front: list[int] = []
    for i in order:
        better = not front or sign * points[i][1] > sign * points[front[-1]][1]
        if better or points[i] == points[front[-1]]:
            front.append(i)
    return front


def plot_pareto(comparison: Comparison) -> Figure:
    """Scores with 95 % intervals against attention parameters, and the Pareto front as a step line."""
    metric = comparison.metric
    shown = [(i, v) for i, v in enumerate(comparison.variants) if _finite(v.score.mean)]
    scale, unit = _scale(max((v.attention_parameters for _, v in shown), default=1))
    xs = [v.attention_parameters / scale for _, v in shown]
    ys = [v.score.mean * metric.unit for _, v in shown]

    figure = new_figure(6.6, 4.4)
    axes = _axes(figure)
    if shown and max(xs) > 8 * min(xs) > 0:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    for (i, variant), x, y in zip(shown, xs, ys, strict=True):
        half = _half_width(variant.score.half_width) * metric.unit
        style = line_style(i)
        axes.errorbar(
            [x], [y], yerr=[half] if half else None, fmt=style["marker"], color=style["color"], markersize=7,
            markeredgecolor="white", markeredgewidth=0.4, elinewidth=1.3, capsize=3.5, zorder=3, label="_nolegend_",
        )  # fmt: skip
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel(f"attention parameters{unit}   (← fewer is better)", fontsize=NORMAL)
    axes.set_ylabel(_score_label(comparison), fontsize=NORMAL)

    front = pareto_front(list(zip(xs, ys, strict=True)), metric.higher_is_better)
    if front:
        left, right = axes.get_xlim()
        steps_x, steps_y = [*(xs[k] for k in front), right], [*(ys[k] for k in front), ys[front[-1]]]
        axes.plot(
            steps_x, steps_y, drawstyle="steps-post", color="#767676", linewidth=1.2, linestyle=(0, (5, 2)), zorder=1,
            gid="front", label="Pareto front",
        )  # fmt: skip
        axes.set_xlim(left, right)
        # the front leaves this corner free
        corner: Literal["lower right", "upper right"] = "lower right" if metric.higher_is_better else "upper right"
        axes.legend(loc=corner, fontsize=SMALL, frameon=False)
    missing = [v.name for v in comparison.variants if not _finite(v.score.mean)]
    if missing:
        _remark(axes, f"not shown, without a finite score: {', '.join(missing)}")
    place_labels(figure, axes, [v.name for _, v in shown], xs, ys)
    return figure


def plot_retention(comparison: Comparison) -> Figure:
    """Performance retention ratios in per cent as bars with 95 % intervals, and a dashed line at 100 %."""
    variants = comparison.variants
    ratios = [_retained(v) for v in variants]
    known = [ratio for ratio in ratios if ratio is not None]
    start = _bar_start([100 * (mean - half) for mean, half in known], [100 * mean for mean, _ in known])
    end = max([100.0, *(100 * (mean + half) for mean, half in known)])
    room = (end - start) * 0.16

    figure = new_figure(6.6, 0.9 + 0.36 * max(len(variants), 2))
    axes = _axes(figure, grid="x")
    for i, ratio in enumerate(ratios):
        if ratio is None:
            axes.text(start + room / 12, i, "–", va="center", fontsize=NORMAL)
            continue
        mean, half = 100 * ratio[0], 100 * ratio[1]
        axes.barh(i, mean - min(start, 0), left=min(start, 0), height=0.66, zorder=2, **bar_style(i))
        if half:
            axes.errorbar(
                [mean], [i], xerr=[half], fmt="none", ecolor="black", elinewidth=1.4, capsize=4, capthick=1.4, zorder=4
            )
            # a white band below the whisker keeps it visible on dark or hatched bars
            axes.plot([mean - half, mean + half], [i, i], color="white", linewidth=3.6, zorder=3, solid_capstyle="butt")
        axes.annotate(
            _ratio_text(mean, half), (max(mean + half, 100.0), i), xytext=(6, 0), textcoords="offset points",
            va="center_baseline", fontsize=SMALL, zorder=5,
        )  # fmt: skip
    axes.axvline(100, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=3.5)
    axes.set_yticks(range(len(variants)), [plain(v.name) for v in variants], fontsize=NORMAL)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_xlim(start, end + room)
    begins = "" if start == 0 else f"   (axis begins at {start:g} %)"
    axes.set_xlabel(
        f"retained of {plain(comparison.reference)}’s {plain(comparison.metric.name)}, %{begins}", fontsize=NORMAL
    )
    return figure


def plot_curves(comparison: Comparison) -> Figure:
    """A panel for each logged quantity, a line for each variant."""
    names = sorted({c.name for v in comparison.variants for c in v.curves if c.steps}, key=_train_first)
    columns = min(len(names), 2) or 1
    rows = math.ceil(len(names) / columns) or 1
    figure = new_figure(4.0 * columns + 0.8 * (columns == 1), 3.1 * rows + 0.6)
    for place, name in enumerate(names):
        axes = _axes(figure, (rows, columns, place + 1))
        seen: list[tuple[float, float]] = []
        for i, variant in enumerate(comparison.variants):
            for curve in variant.curves:
                points = [(float(s), y) for s, y in zip(curve.steps, curve.values, strict=True) if _finite(y)]
                if curve.name == name and points:
                    seen += points
                    every = max(1, len(points) // 6)
                    axes.plot(
                        [s for s, _ in points], [y for _, y in points], linewidth=1.3, markersize=4.5, **line_style(i),
                        # staggered, so that markers of lines that lie close do not hide each other
                        markevery=(i * every // max(len(comparison.variants), 1), every), label=plain(variant.name),
                    )  # fmt: skip
        cut = _limit_to_late_values(axes, seen)
        axes.set_title(plain(name) + ("   (the first steps lie outside)" if cut else ""), fontsize=NORMAL, loc="left")
        axes.set_xlabel("optimizer steps", fontsize=NORMAL)
        axes.xaxis.set_major_formatter(_thousands)
    _legend_below(figure)
    return figure


def plot_context(comparison: Comparison) -> Figure | None:
    """What generation costs as the context grows: memory of the KV caches, and measured time for a token.

    Returns:
        One panel or two; None if the data of both are missing, as they are for encoders.
    """
    # what has no cache has nothing on a logarithmic axis
    cached = [(i, v) for i, v in enumerate(comparison.variants) if v.cache_bytes_per_token]
    timed = [(i, v) for i, v in enumerate(comparison.variants) if any(map(_finite, v.latency.values()))]
    panels = bool(cached) + bool(timed)
    if not panels:
        return None
    figure = new_figure(4.2 * panels + 0.8 * (panels == 1), 4.0)
    if cached:
        axes = _axes(figure, (1, panels, 1))
        _draw_cache(axes, cached, comparison)
    if timed:
        axes = _axes(figure, (1, panels, panels))
        for i, variant in timed:
            points = sorted((t, 1000 * s) for t, s in variant.latency.items() if _finite(s))
            xs, ys = [t for t, _ in points], [ms for _, ms in points]
            axes.plot(xs, ys, linewidth=1.3, markersize=5, label=plain(variant.name), **line_style(i))
        axes.set_title("time for the next token, ms", fontsize=NORMAL, loc="left")
        axes.set_ylim(bottom=0)
        _context_axis(axes, {t for _, v in timed for t in v.latency})
        _legend_below(figure, axes)
    return figure


def _draw_cache(axes: Axes, cached: Sequence[tuple[int, Variant]], comparison: Comparison) -> None:
    last = max(4096, 8 * (comparison.max_context or 0))
    contexts = [2**k for k in range(6, last.bit_length()) if 2**k <= last]
    # lines that would hide each other are one line with several names
    alike: dict[int, list[tuple[int, str]]] = {}
    for i, variant in cached:
        alike.setdefault(variant.cache_bytes_per_token or 0, []).append((i, variant.name))
    for size, members in sorted(alike.items(), reverse=True):
        axes.plot(
            contexts, [size * t / MIB for t in contexts], linewidth=1.3, markersize=5,
            label=plain(_wrapped([name for _, name in members])), **line_style(members[0][0]),
        )  # fmt: skip
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    _context_axis(axes, set(contexts))
    dtypes = {v.cache_dtype_bytes for _, v in cached}
    width = f" ({dtypes.pop()} bytes a number)" if len(dtypes) == 1 else ""
    axes.set_title(f"KV caches of a sequence, MiB{width}", fontsize=NORMAL, loc="left")
    # the lines rise from the lower left to the upper right; the names need the corner that they leave
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.07 * sum(text.count("\n") + 1 for text in _labels(axes))))
    axes.legend(loc="upper left", fontsize=SMALL, frameon=False, handlelength=3.6)
    if comparison.max_context:
        top = max(alike) * comparison.max_context / MIB  # no higher: the names are above
        axes.vlines(comparison.max_context, low, top, color="#767676", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"longest in\ntraining: {comparison.max_context:,}", (comparison.max_context, 0), xytext=(4, 5),
            xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=SMALL, color="#404040",
        )  # fmt: skip


def _figures_of_heads(comparison: Comparison) -> dict[str, tuple[Figure, str]]:
    drawn: dict[str, tuple[Figure, str]] = {}
    diversity = {v.name: v.diversity for v in comparison.variants if v.diversity}
    maps = {v.name: v.maps for v in comparison.variants if v.maps is not None and v.maps.layers}
    if not diversity and not maps:
        return drawn
    from mhe_lightning.comparison.heads_plot import plot_diversity, plot_maps

    if diversity:
        drawn["diversity"] = (
            plot_diversity(diversity),
            "How different the heads of each layer attend: mean Jensen–Shannon divergence of two heads, 0 where all "
            "attend alike, and mean cosine similarity, 1 where all attend alike.",
        )
    for place, layer in _first_and_last({key for own in maps.values() for key in own.layers}):
        drawn[f"maps-{place}-{layer}"] = (
            plot_maps({name: own for name, own in maps.items() if (place, layer) in own.layers}, layer, place),
            f"Attention maps of layer {layer} ({place}) on one short text: how much each query (row of a map) attends "
            "to each key (column), a row of maps for each variant and a column for each head.",
        )
    return drawn


def _first_and_last(layers: set[tuple[str, int]]) -> list[tuple[str, int]]:
    """Of each place the first and the last of its layers, which differ most."""
    found: list[tuple[str, int]] = []
    for place in sorted({place for place, _ in layers}):
        numbers = [number for other, number in layers if other == place]
        found += [(place, number) for number in sorted({min(numbers), max(numbers)})]
    return found


def _axes(figure: Figure, place: tuple[int, int, int] = (1, 1, 1), grid: str = "both") -> Axes:
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    return axes


def _remark(axes: Axes, text: str) -> None:
    axes.set_title(plain(text), fontsize=SMALL, loc="left", color="#404040")


def _bar_start(lowest: Sequence[float], means: Sequence[float]) -> float:
    """Where an axis of per cents begins so that differences near 100 are seen; below 0 only where a mean is."""
    if means and min(means) < 0:
        return math.floor(min(means) / 10) * 10 - 10.0
    low = min(lowest, default=0.0)
    return next((start for start in BAR_STARTS if start <= low - 0.1 * (100 - start)), 0.0)


def _ratio_text(mean: float, half: float) -> str:
    return f"{mean:.1f} ± {half:.1f}" if half else f"{mean:.1f}"


def _retained(variant: Variant) -> tuple[float, float] | None:
    """Mean and half width; None where the ratio is not defined."""
    if variant.retained is None or not _finite(variant.retained.mean):
        return None
    return variant.retained.mean, _half_width(variant.retained.half_width)


def _half_width(value: float | None) -> float:
    return value if value is not None and _finite(value) else 0.0


def _limit_to_late_values(axes: Axes, points: Sequence[tuple[float, float]]) -> bool:
    """Sets the range by what comes after the warm-up, logarithmic where it is wide; True if something lies outside."""
    if not points:
        return False
    start = WARM_UP * max(x for x, _ in points)
    late = [y for x, y in points if x >= start]
    low, high = min(late), max(late)
    if low > 0 and high > 8 * low:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
        axes.set_ylim(low - room, high + room)
    bottom, top = axes.get_ylim()
    return any(not bottom <= y <= top for _, y in points)


def _context_axis(axes: Axes, contexts: set[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    ticks = sorted(contexts)
    # at most five numbers fit beside each other
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 5)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(_thousands)
    axes.set_xlabel("context, tokens", fontsize=NORMAL)


def _plain_numbers(axis: object) -> None:
    """Writes 0.5, 20 and 3,000 on a logarithmic axis in place of powers of ten."""
    from matplotlib.axis import Axis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    assert isinstance(axis, Axis)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_thousands))
    axis.set_minor_formatter(NullFormatter())


def _thousands(value: float, position: float | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _legend_below(figure: Figure, axes: Axes | None = None) -> None:
    """One legend for all panels, or for one, below them."""
    entries: dict[str, Artist] = {}
    for panel in [axes] if axes else figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    per_row = max(1, int(figure.get_figwidth() / 1.35))
    rows = -(-len(entries) // per_row)
    columns = -(-len(entries) // max(rows, 1))  # rows of nearly equal length
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=max(columns, 1), fontsize=SMALL,
        frameon=False, handlelength=3.6,
    )  # fmt: skip


def _labels(axes: Axes) -> list[str]:
    return [str(label) for label in axes.get_legend_handles_labels()[1]]


def _wrapped(names: Sequence[str], per_line: int = 4) -> str:
    return ",\n".join(", ".join(names[k : k + per_line]) for k in range(0, len(names), per_line))


def _scale(largest: float) -> tuple[float, str]:
    if largest >= 1e6:
        return 1e6, ", millions"
    return (1e3, ", thousands") if largest >= 1e4 else (1.0, "")


def _score_label(comparison: Comparison) -> str:
    direction = "higher is better →" if comparison.metric.higher_is_better else "← lower is better"
    return f"{plain(comparison.split)} {plain(comparison.metric.name)}{_per_cent(comparison.metric)}   ({direction})"


def _per_cent(metric: Metric) -> str:
    return ", %" if metric.unit == 100 else ""


def _sentence_about_scores(comparison: Comparison) -> str:
    if any(v.score.half_width is not None for v in comparison.variants):
        return "points are means over seeds, whiskers 95 % intervals"
    return "points are scores of single runs"


def _sentence_about_context(comparison: Comparison) -> str:
    cached = any(v.cache_bytes_per_token for v in comparison.variants)
    timed = any(v.latency for v in comparison.variants)
    memory = "memory of the KV caches of one sequence, computed from their shapes"
    time = "median time for the next token of one sequence, as measured"
    told = f"{memory}, and {time}" if cached and timed else memory if cached else time
    return f"Cost of generation against context length: {told}."


def _train_first(name: str) -> tuple[bool, str]:
    return (not name.startswith("train/"), name)


def _finite(value: float) -> bool:
    return math.isfinite(value)
