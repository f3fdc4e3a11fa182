"""Names beside the points of a figure, placed where they hide nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mhe_lightning.comparison.style import NORMAL, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

NEAR = 8
"""How many places are so near to the point that no line needs to tie the name to it."""


def place_labels(figure: Figure, axes: Axes, names: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
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
                plain(name), (x, y), xytext=(dx, dy), textcoords="offset points", ha=side, va=height, fontsize=NORMAL,
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
