"""What the figures of a comparison show, read from their axes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from comparison_fixtures import classification, language_modeling
from mhe_lightning.comparison import style
from mhe_lightning.comparison.plots import (
    figures,
    pareto_front,
    plot_context,
    plot_curves,
    plot_pareto,
    plot_retention,
)
from mhe_lightning.comparison.results import AttentionMaps, Comparison, Estimate, LayerDiversity
from mhe_lightning.comparison.style import bar_style, figure_bytes, line_style, new_figure, require_matplotlib

few = st.integers(0, 4).map(float)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return language_modeling()


def with_variant(comparison: Comparison, index: int, **changes: object) -> Comparison:
    variants = list(comparison.variants)
    variants[index] = replace(variants[index], **changes)  # type: ignore[arg-type]
    return replace(comparison, variants=variants)


def intervals(axes: Axes) -> list[tuple[float, float]]:
    """Ends of all whiskers, in the direction in which they reach."""
    found = []
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            for line in container.lines[2]:
                (a, b) = line.get_segments()[0]
                found.append((a[0], b[0]) if a[1] == b[1] else (a[1], b[1]))
    return found


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# Pareto


@given(points=st.lists(st.tuples(few, few), max_size=8), higher_is_better=st.booleans())
def test_the_pareto_front_is_that_of_brute_force(points: list[tuple[float, float]], higher_is_better: bool) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        score = a[1] >= b[1] if higher_is_better else a[1] <= b[1]
        return a[0] <= b[0] and score and a != b

    front = pareto_front(points, higher_is_better)
    assert sorted(front) == [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_pareto_shows_each_variant_with_its_name_and_interval(comparison: Comparison) -> None:
    axes = plot_pareto(comparison).axes[0]
    points = [c.lines[0].get_xydata()[0] for c in axes.containers if isinstance(c, ErrorbarContainer)]
    assert [(x, y) for x, y in points] == [
        (pytest.approx(v.attention_parameters / 1e6), pytest.approx(v.score.mean)) for v in comparison.variants
    ]
    for (low, high), variant in zip(intervals(axes), comparison.variants, strict=True):
        assert (high - low) / 2 == pytest.approx(variant.score.half_width)
    assert sorted(texts(axes)) == sorted(v.name for v in comparison.variants)


def test_pareto_draws_the_front_as_steps_through_its_members(comparison: Comparison) -> None:
    axes = plot_pareto(comparison).axes[0]
    (front,) = [line for line in axes.lines if line.get_gid() == "front"]
    assert front.get_drawstyle() == "steps-post"
    members = pareto_front([(v.attention_parameters, v.score.mean) for v in comparison.variants], False)
    assert list(front.get_xdata())[:-1] == [comparison.variants[i].attention_parameters / 1e6 for i in members]


@pytest.mark.parametrize(
    ("make", "direction"), [(language_modeling, "← lower is better"), (classification, "higher is better →")]
)
def test_pareto_says_which_direction_is_better(make: Callable[[], Comparison], direction: str) -> None:
    axes = plot_pareto(make()).axes[0]
    assert direction in axes.get_ylabel()
    assert "fewer is better" in axes.get_xlabel()


def test_pareto_shows_shares_in_per_cent() -> None:
    axes = plot_pareto(classification()).axes[0]
    low, high = axes.get_ylim()
    assert low > 80
    assert high < 100
    assert "%" in axes.get_ylabel()


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    # of the letters alone, without the lines that tie them to their points
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in figure.axes[0].texts]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]


def test_names_of_points_do_not_overlap(comparison: Comparison) -> None:
    assert overlaps(plot_pareto(comparison)) == []


def test_names_of_points_in_one_place_do_not_overlap(comparison: Comparison) -> None:
    same = [replace(v, score=Estimate(24.0, 0.1, 3), attention_parameters=9_000_000) for v in comparison.variants]
    assert overlaps(plot_pareto(replace(comparison, variants=same))) == []


def test_a_variant_that_diverged_is_named_but_not_drawn(comparison: Comparison) -> None:
    broken = with_variant(comparison, 3, score=Estimate(math.nan, None, 3))
    axes = plot_pareto(broken).axes[0]
    assert len(axes.containers) == len(comparison.variants) - 1
    assert "mqa" in axes.get_title(loc="left")
    figure_bytes(plot_pareto(broken), "svg")


def test_widely_spread_parameters_get_a_logarithmic_axis(comparison: Comparison) -> None:
    assert plot_pareto(comparison).axes[0].get_xscale() == "linear"
    spread = with_variant(comparison, 0, attention_parameters=900_000_000)
    assert plot_pareto(spread).axes[0].get_xscale() == "log"


# Retention


def test_retention_draws_bars_in_per_cent_with_their_intervals(comparison: Comparison) -> None:
    axes = plot_retention(comparison).axes[0]
    bars = [container.patches[0] for container in axes.containers if isinstance(container, BarContainer)]
    expected = [v.retained for v in comparison.variants if v.retained is not None]
    assert [bar.get_width() for bar in bars] == [pytest.approx(100 * e.mean) for e in expected]
    spread = [e for e in expected if e.half_width]
    for (low, high), e in zip(intervals(axes), spread, strict=True):
        assert (low + high) / 2 == pytest.approx(100 * e.mean)
        assert (high - low) / 2 == pytest.approx(100 * (e.half_width or 0))


def test_retention_marks_100_per_cent_with_a_dashed_line(comparison: Comparison) -> None:
    axes = plot_retention(comparison).axes[0]
    (line,) = [line for line in axes.lines if set(line.get_xdata()) == {100}]
    assert line.is_dashed()


def test_retention_says_where_a_cut_axis_begins(comparison: Comparison) -> None:
    axes = plot_retention(comparison).axes[0]
    assert axes.get_xlim()[0] == 90
    assert "axis begins at 90 %" in axes.get_xlabel()


@pytest.mark.parametrize(("mean", "begins"), [(0.999, 99.0), (0.95, 90.0), (0.62, 50.0), (0.3, 0.0), (-0.42, -60.0)])
def test_the_axis_of_retention_begins_below_the_worst(mean: float, begins: float, comparison: Comparison) -> None:
    variants = [replace(v, retained=Estimate(mean, 0.0001, 3)) for v in comparison.variants]
    axes = plot_retention(replace(comparison, variants=variants)).axes[0]
    assert axes.get_xlim()[0] == begins
    assert ("axis begins" in axes.get_xlabel()) == (begins != 0)


def test_a_variant_without_retention_is_a_dash() -> None:
    axes = plot_retention(classification()).axes[0]
    assert len([c for c in axes.containers if isinstance(c, BarContainer)]) == 2
    assert texts(axes).count("–") == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mha", "mhe_add", "sha"]


# Curves


def test_curves_have_a_panel_for_each_quantity_and_a_line_for_each_variant(comparison: Comparison) -> None:
    figure = plot_curves(comparison)
    assert [axes.get_title(loc="left").split("   ")[0] for axes in figure.axes] == ["train/loss", "val/ppl"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == [v.name for v in comparison.variants]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [v.name for v in comparison.variants]


def test_curves_say_that_the_first_steps_lie_outside(comparison: Comparison) -> None:
    axes = plot_curves(comparison).axes[0]
    assert "first steps lie outside" in axes.get_title(loc="left")
    assert axes.get_ylim()[1] < max(axes.lines[0].get_ydata())


def test_curves_leave_out_what_is_not_finite(comparison: Comparison) -> None:
    curve = comparison.variants[0].curves[1]
    broken = replace(curve, values=[*curve.values[:-1], math.inf])
    axes = plot_curves(with_variant(comparison, 0, curves=[broken])).axes[0]
    assert len(axes.lines[0].get_xdata()) == len(curve.steps) - 1
    assert all(map(math.isfinite, axes.get_ylim()))


# Context


def test_the_cache_grows_as_the_variants_say(comparison: Comparison) -> None:
    figure = plot_context(comparison)
    assert figure is not None
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    by_label = {str(line.get_label()): line for line in axes.lines}
    contexts = list(by_label["mha"].get_xdata())
    assert contexts == [2**k for k in range(6, 13)]
    assert list(by_label["mha"].get_ydata()) == [73_728 * t / 2**20 for t in contexts]


def test_variants_with_equal_caches_share_a_line(comparison: Comparison) -> None:
    figure = plot_context(comparison)
    assert figure is not None
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert labels == ["mha", "skv, el_att", "gqa_4", "mqa, mhe_add, mhe_mul, sha"]


def test_contexts_reach_eight_times_the_longest_in_training(comparison: Comparison) -> None:
    figure = plot_context(replace(comparison, max_context=2048))
    assert figure is not None
    assert max(figure.axes[0].lines[0].get_xdata()) == 16_384


def test_latency_is_shown_in_milliseconds(comparison: Comparison) -> None:
    figure = plot_context(comparison)
    assert figure is not None
    for line, variant in zip(figure.axes[1].lines, comparison.variants, strict=True):
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == {
            t: pytest.approx(1000 * s) for t, s in variant.latency.items()
        }


def test_without_latency_there_is_one_panel() -> None:
    figure = plot_context(language_modeling(latency=False))
    assert figure is not None
    assert len(figure.axes) == 1


def test_encoders_have_no_figure_of_context() -> None:
    assert plot_context(classification()) is None


# All of them


def test_figures_are_those_that_have_data(comparison: Comparison) -> None:
    assert list(figures(comparison)) == ["pareto", "retention", "curves", "context"]
    assert list(figures(classification())) == ["pareto", "retention"]


def test_figures_of_heads_are_among_them() -> None:
    maps = AttentionMaps(("a", "b"), ("a", "b"), {("self", k): [[[1.0, 0.0], [0.5, 0.5]]] * 2 for k in range(3)})
    diversity = [LayerDiversity("self", layer, 0.4, 0.6) for layer in range(3)]
    found = figures(with_variant(classification(), 0, diversity=diversity, maps=maps))
    assert list(found) == ["pareto", "retention", "diversity", "maps-self-0", "maps-self-2"]


def test_every_caption_is_a_sentence(comparison: Comparison) -> None:
    for _, caption in figures(comparison).values():
        assert caption[0].isupper()
        assert caption.endswith(".")


def test_names_with_dollars_are_no_formulas() -> None:
    odd = with_variant(classification(), 1, name="$x^2$")
    for figure, _ in figures(odd).values():
        figure_bytes(figure, "svg")
    assert r"\$x^2\$" in texts(plot_pareto(odd).axes[0])


# Style


def luminance(color: object) -> float:
    """Relative luminance of WCAG, what is left of a colour in grey."""

    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = map(linear, to_rgb(color))  # type: ignore[arg-type]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_ten_variants_differ_in_grey_by_marker_and_by_line() -> None:
    styles = [line_style(i) for i in range(10)]
    for a, b in combinations(styles, 2):
        assert a["marker"] != b["marker"]
        assert a["linestyle"] != b["linestyle"]


def test_lines_stand_out_from_white_and_begin_with_the_darkest() -> None:
    grey = [luminance(color) for color in style.COLORS]
    assert max(grey) < 0.5
    assert grey[0] == min(grey) == 0


def test_ten_bars_differ_in_grey_by_their_hatch_or_by_half_the_scale() -> None:
    for a, b in combinations([bar_style(i) for i in range(10)], 2):
        assert a["hatch"] != b["hatch"] or abs(luminance(a["facecolor"]) - luminance(b["facecolor"])) > 0.5


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_figure_is_the_same_bytes_each_time(kind: style.Format) -> None:
    one, other = (figure_bytes(plot_retention(classification()), kind) for _ in range(2))
    assert one == other


def test_letters_are_paths() -> None:
    assert b"<text" not in figure_bytes(plot_retention(classification()), "svg")


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'mhe-lightning\[compare\]'"):
        require_matplotlib()
    with pytest.raises(ValueError, match="matplotlib must be installed"):
        new_figure(1, 1)
