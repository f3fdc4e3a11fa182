"""Pictures of what attention heads attend to, and of how different they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mhe_lightning.comparison.results import AttentionMaps, LayerDiversity
from mhe_lightning.comparison.style import line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_COLORS = "Greys"
CELL = 1.7
"""Side of one map, in inches."""


def plot_diversity(diversity_by_variant: Mapping[str, Sequence[LayerDiversity]]) -> Figure:
    """Divergence and similarity of the heads against the layer: a line per variant, a column of panels per place.

    Args:
        diversity_by_variant: name → what `measure_heads` gave; those without any are left out.

    Raises:
        ValueError: nothing was measured.
        UserError: matplotlib is not installed.
    """
    variants = {name: found for name, found in diversity_by_variant.items() if found}
    if not variants:
        raise ValueError("no variant has measured heads; give at least one")
    places = list(dict.fromkeys(entry.place for found in variants.values() for entry in found))
    figure = new_figure(1.2 + 3.4 * max(len(places), 1.4), 5.6)
    axes = figure.subplots(2, len(places), squeeze=False, sharex="col", sharey="row")
    for column, place in enumerate(places):
        above, below = axes[0, column], axes[1, column]
        for i, (name, found) in enumerate(variants.items()):
            here = sorted((entry for entry in found if entry.place == place), key=lambda entry: entry.layer)
            layers = [entry.layer for entry in here]
            above.plot(layers, [entry.jensen_shannon for entry in here], label=name, **line_style(i))
            below.plot(layers, [entry.cosine for entry in here], label=name, **line_style(i))
        above.set_title("self-attention" if place == "self" else place)
        below.set_xlabel("layer")
        below.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("Jensen–Shannon divergence\nof two heads (bits)")
    axes[1, 0].set_ylabel("cosine similarity\nof two heads")
    highest = max(1e-3, *(entry.jensen_shannon for found in variants.values() for entry in found))
    axes[0, 0].set_ylim(-0.04 * highest, 1.06 * highest)  # markers at 0 are whole
    axes[1, 0].set_ylim(top=1.03)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    return figure


def plot_maps(
    maps_by_variant: Mapping[str, AttentionMaps], layer: int, place: str = "self", max_heads: int = 12
) -> Figure:
    """The attention distributions of one layer: a row of maps per variant, a column per head.

    Darker is more, on one scale from 0 to 1. Queries are rows of a map, keys its columns.

    Args:
        maps_by_variant: name → maps.
        layer: number of the layer, from 0.
        place: "self", or "encoder", "decoder" or "cross".
        max_heads: heads that are shown, the first ones.

    Raises:
        ValueError: there are no variants, or one has no such layer.
        UserError: matplotlib is not installed.
    """
    if not maps_by_variant:
        raise ValueError("no variant has attention maps; give at least one")
    if max_heads < 1:
        raise ValueError(f"max_heads ({max_heads}) must be at least 1")
    for name, maps in maps_by_variant.items():
        if (place, layer) not in maps.layers:
            known = ", ".join(f"{known_place} {number}" for known_place, number in maps.layers)
            raise ValueError(f"{name} has no layer {layer} of {place} attention; it has {known}")
    heads = {name: maps.layers[place, layer][:max_heads] for name, maps in maps_by_variant.items()}
    columns = max(map(len, heads.values()))
    # variants with tokenizers of their own need labels of their own
    shared = len({tuple(sides(maps, place)[1]) for maps in maps_by_variant.values()}) == 1
    figure = new_figure(2.0 + CELL * columns, 1.2 + (CELL if shared else CELL + 0.6) * len(heads))
    axes = figure.subplots(len(heads), columns, squeeze=False)
    image = None
    for row, (name, maps) in enumerate(maps_by_variant.items()):
        queries, keys = sides(maps, place)
        for column in range(columns):
            panel: Axes = axes[row, column]
            if column >= len(heads[name]):
                panel.set_axis_off()
                continue
            image = panel.imshow(heads[name][column], cmap=MAP_COLORS, vmin=0, vmax=1, aspect="auto")
            if row == 0:
                panel.set_title(f"head {column}", fontsize=8)
            _label(panel, keys if row == len(heads) - 1 or not shared else None, queries if column == 0 else None)
        axes[row, 0].set_ylabel(name, fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    figure.suptitle(f"{'self-attention' if place == 'self' else place + ' attention'}, layer {layer}", fontsize=10)
    return figure


def sides(maps: AttentionMaps, place: str) -> tuple[Sequence[str], Sequence[str]]:
    """The tokens of the queries and of the keys of an attention."""
    queries = maps.tokens if place == "encoder" else maps.queries
    keys = maps.queries if place == "decoder" else maps.tokens
    return queries, keys


def _label(panel: Axes, keys: Sequence[str] | None, queries: Sequence[str] | None) -> None:
    panel.tick_params(length=1.5, labelsize=5)
    # a dollar sign in a text begins no formula
    if keys is None:
        panel.set_xticks([])
    else:
        panel.set_xticks(range(len(keys)), keys, rotation=90, parse_math=False)
    if queries is None:
        panel.set_yticks([])
    else:
        panel.set_yticks(range(len(queries)), queries, parse_math=False)
