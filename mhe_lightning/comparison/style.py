"""How the figures of a comparison look: colour-blind-safe, and readable when printed in grey."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from mhe_lightning.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), darkest first; without their yellow, which vanishes on white.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LINES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1.2)),
    (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    (0, (10, 3)),
    (0, (1, 2.5)),
    (0, (3, 1.5, 1, 1.5)),
    (0, (8, 1.5, 3, 1.5)),
)
HATCHES = ("", "///", "..", "\\\\\\", "xx", "--", "||", "oo", "++", "//..")
FACES = ("#4d4d4d", "#c6dbef", "#fdd0a2", "#c7e9c0", "#f2d5e4", "#e3f1fa", "#fbe3b3", "#d9d9d9", "#ffffff", "#f0f0f0")

SMALL, NORMAL = 8.5, 9.5  # points

Format = Literal["svg", "png"]


def require_matplotlib() -> None:
    """Finds out before a long computation whether figures can be drawn.

    Raises:
        ValueError: matplotlib cannot be imported.
    """
    require("matplotlib.figure", "compare", "draw figures")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure that keeps its labels apart from each other; it belongs to no window.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ValueError: matplotlib cannot be imported.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def line_style(i: int) -> dict[str, Any]:
    """Keyword arguments of ``Axes.plot`` for the i-th variant; ten markers and ten line patterns before any repeats."""
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
    }


def bar_style(i: int) -> dict[str, Any]:
    """Keyword arguments of ``Axes.bar`` for the i-th variant; ten hatches before any repeats."""
    return {
        "facecolor": FACES[i % len(FACES)],
        "edgecolor": "black",
        "hatch": HATCHES[i % len(HATCHES)],
        "linewidth": 0.8,
    }


def plain(text: str) -> str:
    """A text in which matplotlib finds no mathematics."""
    return text.replace("$", r"\$")


def figure_bytes(figure: Figure, kind: Format) -> bytes:
    """The figure as a file's content, the same bytes for the same figure; letters are drawn as paths.

    Args:
        figure: what to draw.
        kind: "svg", or "png" with 200 dots per inch.
    """
    from matplotlib import rc_context

    buffer = BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    # ids in an SVG are random without a salt
    with rc_context({"svg.hashsalt": "mhe", "svg.fonttype": "path", "hatch.linewidth": 0.6}):
        figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return buffer.getvalue()
