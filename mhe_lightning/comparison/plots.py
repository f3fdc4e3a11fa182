"""The figures of a comparison. Each function draws one from plain data and writes no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from mhe_lightning.comparison.results import Comparison, Metric, Variant
from mhe_lightning.comparison.style import bar_style, line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

MIB = 2**20
SMALL, NORMAL = 8.5, 9.5  # points
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
    _place_labels(figure, axes, [v.name for _, v in shown], xs, ys)
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
    axes.set_yticks(range(len(variants)), [_plain(v.name) for v in variants], fontsize=NORMAL)
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.set_xlim(start, end + room)
    begins = "" if start == 0 else f"   (axis begins at {start:g} %)"
    axes.set_xlabel(
        f"retained of {_plain(comparison.reference)}’s {_plain(comparison.metric.name)}, %{begins}", fontsize=NORMAL
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
                        markevery=(i * every // max(len(comparison.variants), 1), every), label=_plain(variant.name),
                    )  # fmt: skip
        cut = _limit_to_late_values(axes, seen)
        axes.set_title(_plain(name) + ("   (the first steps lie outside)" if cut else ""), fontsize=NORMAL, loc="left")
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
            axes.plot(xs, ys, linewidth=1.3, markersize=5, label=_plain(variant.name), **line_style(i))
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
            label=_plain(_wrapped([name for _, name in members])), **line_style(members[0][0]),
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


def _place_labels(figure: Figure, axes: Axes, names: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Writes each name beside its point, at the first place where it meets no point, whisker, line or other name."""
    figure.draw_without_rendering()  # settles where the axes lie
    points = [(float(x), float(y)) for x, y in axes.transData.transform(list(zip(xs, ys, strict=True)))] if xs else []
    taken = [_box(x - r, y - r, x + r, y + r) for x, y in points for r in (5 * figure.dpi / 72,)]
    for container in axes.containers:
        for line in getattr(container, "lines", ((), (), ()))[2]:
            for path in line.get_paths():
                (x, low), (_, high) = axes.transData.transform(path.vertices)[[0, -1]]
                taken.append(_box(x - 3, min(low, high), x + 3, max(low, high)))
    taken += [text.get_window_extent() for text in axes.texts]
    steps = _segments(axes)
    inside = axes.get_window_extent()
    for number, (name, x, y) in enumerate(zip(names, xs, ys, strict=True)):
        best: tuple[float, Annotation, Bbox] | None = None
        for rank, (dx, dy, side, height) in enumerate(_label_places()):
            tie = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": 4} if rank >= NEAR else None
            text = axes.annotate(
                _plain(name), (x, y), xytext=(dx, dy), textcoords="offset points", ha=side, va=height, fontsize=NORMAL,
                arrowprops=tie, zorder=4,
            )  # fmt: skip
            text.set_in_layout(False)
            box = _text_box(text)
            hits = sum(box.overlaps(other) for other in taken) + sum(0.5 for other in steps if box.overlaps(other))
            distances = [_distance(box, point) for point in points]
            # a name that is nearer to another point seems to be that one's
            cost = hits + 2 * (not _contains(inside, box)) + (min(distances) < distances[number])
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        if best is not None:
            taken.append(best[2])


NEAR = 8


def _label_places() -> Sequence[tuple[float, float, str, str]]:
    """Offsets in points with alignments: eight beside the point, then farther ones."""
    near = [
        (8, 0, "left", "center"), (-8, 0, "right", "center"), (6, 6, "left", "bottom"), (6, -6, "left", "top"),
        (-6, 6, "right", "bottom"), (-6, -6, "right", "top"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    ]  # fmt: skip
    far = [
        (sx * dx, sy * dy, "left" if sx > 0 else "right", "center")
        for dx in (22, 75)
        for dy in (14, 28, 42, 56, 70)
        for sx in (1, -1)
        for sy in (1, -1)
    ]
    return near + far


def _box(left: float, bottom: float, right: float, top: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox([[left, bottom], [right, top]])


def _text_box(text: Annotation) -> Bbox:
    """Where the letters are, without the line that ties them to their point."""
    from matplotlib.text import Text

    text.get_window_extent()  # moves the letters to their place
    return Text.get_window_extent(text)


def _distance(box: Bbox, point: tuple[float, float]) -> float:
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _contains(outer: Bbox, inner: Bbox) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def _segments(axes: Axes) -> list[Bbox]:
    """Thin boxes around the parts of the step line."""
    boxes: list[Bbox] = []
    for line in axes.lines:
        if line.get_gid() == "front":
            corners = axes.transData.transform(line.get_xydata())  # type: ignore[arg-type]
            for (x0, y0), (x1, y1) in pairwise(corners):
                boxes.append(_box(x0, y0 - 1, x1, y0 + 1))
                boxes.append(_box(x1 - 1, min(y0, y1), x1 + 1, max(y0, y1)))
    return boxes


def _remark(axes: Axes, text: str) -> None:
    axes.set_title(_plain(text), fontsize=SMALL, loc="left", color="#404040")


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
    return f"{_plain(comparison.split)} {_plain(comparison.metric.name)}{_per_cent(comparison.metric)}   ({direction})"


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


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no mathematics in names


def _finite(value: float) -> bool:
    return math.isfinite(value)
