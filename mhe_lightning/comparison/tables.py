"""Tables and their renderings: for a terminal, Markdown, CSV, LaTeX and HTML.

A column is described once, by its title, the cells that are shown, and the numbers behind them; every rendering is
made of that.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Value = float | int | str | None


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
