"""Pictures of heads: what they show, whatever the variants have."""

from __future__ import annotations

import pytest

from mhe_lightning.comparison.heads_plot import plot_diversity, plot_maps
from mhe_lightning.comparison.results import AttentionMaps, LayerDiversity
from mhe_lightning.comparison.style import figure_bytes


def diversity(places=("self",), layers=2, height=0.5):
    return [LayerDiversity(place, i, height, 1 - height) for place in places for i in range(layers)]


def maps_of(heads=2, tokens=("a", "␣$x$", "⏎"), queries=None, place="self"):
    queries = tokens if queries is None else queries
    T, S = {
        "encoder": (len(tokens),) * 2,
        "decoder": (len(queries),) * 2,
    }.get(place, (len(queries), len(tokens)))
    return AttentionMaps(tokens, queries, {(place, 0): [[[1 / S] * S] * T] * heads})


def texts(ticks):
    return [tick.get_text() for tick in ticks]


def test_diversity_has_a_panel_per_measure_and_place_and_a_line_per_variant():
    places = ("encoder", "decoder", "cross")
    figure = plot_diversity({"mha": diversity(places), "mhe_add": diversity(places, height=0.1), "none": []})
    assert len(figure.axes) == 6
    for panel in figure.axes:
        assert len(panel.lines) == 2
        assert len({(line.get_marker(), line.get_linestyle(), line.get_color()) for line in panel.lines}) == 2
    assert [panel.get_title() for panel in figure.axes[:3]] == list(places)
    assert texts(figure.legends[0].get_texts()) == ["mha", "mhe_add"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0.1, 0.1]
    assert figure.axes[3].lines[1].get_ydata().tolist() == [0.9, 0.9]
    assert figure_bytes(figure, "svg").startswith(b"<?xml")


def test_a_variant_without_a_place_has_no_points_there():
    figure = plot_diversity({"a": diversity(), "b": diversity(("cross",), layers=3)})
    assert [len(line.get_xdata()) for panel in figure.axes[:2] for line in panel.lines] == [2, 0, 0, 3]


def test_diversity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no variant has measured heads"):
        plot_diversity({"a": []})


def test_maps_have_a_row_per_variant_and_a_column_per_head_on_one_scale():
    figure = plot_maps({"mha": maps_of(), "sha": maps_of(heads=1)}, 0)
    panels = figure.axes[:4]
    assert [len(panel.images) for panel in panels] == [1, 1, 1, 0]
    assert all(panel.images[0].get_clim() == (0, 1) for panel in panels[:3])
    assert [panels[0].get_ylabel(), panels[2].get_ylabel()] == ["mha", "sha"]
    assert texts(panels[0].get_yticklabels()) == ["a", "␣$x$", "⏎"]
    assert texts(panels[0].get_xticklabels()) == []  # those of the last row stand for all
    assert texts(panels[2].get_xticklabels()) == ["a", "␣$x$", "⏎"]
    assert figure.axes[-1].get_ylabel() == "attention weight"
    assert figure_bytes(figure, "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [("encoder", "ab", "ab"), ("decoder", "xyz", "xyz"), ("cross", "xyz", "ab")],
)
def test_each_place_has_the_tokens_of_its_sides(place, rows, columns):
    figure = plot_maps({"mha": maps_of(tokens=tuple("ab"), queries=tuple("xyz"), place=place)}, 0, place)
    assert texts(figure.axes[0].get_yticklabels()) == list(rows)
    assert texts(figure.axes[0].get_xticklabels()) == list(columns)


def test_variants_with_other_tokens_have_labels_of_their_own():
    figure = plot_maps({"a": maps_of(), "b": maps_of(tokens=("c", "d"))}, 0)
    assert texts(figure.axes[0].get_xticklabels()) == ["a", "␣$x$", "⏎"]
    assert texts(figure.axes[2].get_xticklabels()) == ["c", "d"]


def test_heads_beyond_the_limit_are_not_shown():
    assert len(plot_maps({"a": maps_of(heads=9)}, 0, max_heads=3).axes) == 3 + 1


def test_maps_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no variant has attention maps"):
        plot_maps({}, 0)
    with pytest.raises(ValueError, match="a has no layer 3 of self attention; it has self 0"):
        plot_maps({"a": maps_of()}, 3)
    with pytest.raises(ValueError, match=r"max_heads \(0\)"):
        plot_maps({"a": maps_of()}, 0, max_heads=0)
