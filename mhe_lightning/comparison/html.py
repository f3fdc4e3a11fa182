"""The report of comparisons: one HTML page that needs nothing else, and its figures as files for papers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mhe_lightning.comparison.plots import figures, pareto_front
from mhe_lightning.comparison.results import Comparison, Estimate, Variant
from mhe_lightning.comparison.style import figure_bytes
from mhe_lightning.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 {
  font-size: 1.35rem; line-height: 1.25; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 2px solid #1a1a1a;
}
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h1, h2, h3, dt, dd, li, figcaption { overflow-wrap: anywhere; }
p, ul.notes { max-width: 46rem; }
ul.answer { max-width: 62rem; }
p { margin: .5rem 0; }
ul { margin: .5rem 0; padding-left: 1.25rem; }
li { margin: .15rem 0; }
a { color: #00518a; }
.scroll {
  overflow-x: auto; container-type: inline-size; margin: 1rem 0;
  /* a shadow where something is hidden: the white covers move with the content, the shadows stay */
  background:
    linear-gradient(to right, #fff 40%, #fff0) 0 0 / 3rem 100% no-repeat local,
    linear-gradient(to left, #fff 40%, #fff0) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(to right, #0003, #0000) 0 0 / .7rem 100% no-repeat scroll,
    linear-gradient(to left, #0003, #0000) 100% 0 / .7rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: .8rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
caption, tfoot { position: sticky; left: 0; max-width: 100cqw; text-align: left; color: #454545; }
caption { padding-bottom: .4rem; }
th, td { padding: .3rem .42rem; text-align: left; vertical-align: bottom; white-space: nowrap; }
th { font-weight: 600; }
thead th { white-space: normal; border-bottom: 1.5px solid #1a1a1a; }
thead th[title] { cursor: help; }
tbody th, tbody td { border-bottom: 1px solid #ddd; }
tbody tr:hover > * { background: #f2f6fa; }
th:first-child { padding-left: 0; }
.num { text-align: right; }
/* notes below a table keep to the screen while the table is scrolled */
tfoot { display: table-caption; caption-side: bottom; padding-top: .4rem; }
tfoot tr, tfoot td { display: block; white-space: normal; padding: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1.75rem 2rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figure .scroll { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { max-width: 46rem; margin-top: .4rem; font-size: .9rem; color: #454545; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1.25rem; margin: .5rem 0; }
dt { color: #454545; }
dd { margin: 0; }
pre { overflow-x: auto; padding: .75rem 1rem; background: #f4f4f4; border: 1px solid #ddd; font-size: .85rem; }
@media (max-width: 32rem) {
  dl { display: block; }
  dd { margin: 0 0 .4rem; }
}
@media print {
  @page { margin: 15mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3 { break-after: avoid; }
  a { color: inherit; text-decoration: none; }
  .scroll { overflow: visible; container-type: normal; background: none; }
  .figures { display: block; }
  figure { margin: 12pt 0; }
  .scroll svg { min-width: 0 !important; }
  table { font-size: 6.2pt; }
  th, td { padding: 2pt 2.2pt; }
  tr { break-inside: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""


WIDE = 7.0  # inches; narrower figures stand in pairs where the screen has room


@dataclass(frozen=True)
class _Drawn:
    figure: Figure
    caption: str
    svg: bytes


@dataclass(frozen=True)
class _Section:
    """A comparison with its name in ids and file names, its table and its figures by their names."""

    slug: str
    comparison: Comparison
    table: str
    figures: Mapping[str, _Drawn]


def html_report(
    comparisons: Sequence[Comparison], tables: Sequence[str], *, title: str, command: str, overview: str = ""
) -> str:
    """One page with the answers, tables and figures of all comparisons; it opens offline and runs no script.

    Args:
        comparisons: a section each.
        tables: of each comparison its results, ``<table>…</table>``.
        title: of the page.
        command: what made it, shown at its end.
        overview: another such table, of all tasks, shown before the sections; none if empty.

    Raises:
        ValueError: there are more or fewer tables than comparisons.
        UserError: matplotlib cannot be imported.
    """
    return _page(_sections(comparisons, tables), title=title, command=command, overview=overview)


def write_report(
    folder: Path,
    comparisons: Sequence[Comparison],
    tables: Sequence[str],
    *,
    title: str,
    command: str,
    overview: str = "",
) -> list[Path]:
    """Writes ``report.html`` and ``plots/<task>-<figure>.png`` and ``.svg``, each complete or not at all.

    Args:
        folder: where to; it is made if need be.
        comparisons: as in `html_report`, with the other arguments.

    Returns:
        The files, the report first.

    Raises:
        ValueError: there are more or fewer tables than comparisons.
        UserError: matplotlib cannot be imported.
    """
    sections = _sections(comparisons, tables)
    report = folder / "report.html"
    written = [report]
    for section in sections:
        for stem, drawn in section.figures.items():
            for kind, content in (("png", figure_bytes(drawn.figure, "png")), ("svg", drawn.svg)):
                path = folder / "plots" / f"{section.slug}-{stem}.{kind}"
                write_bytes(path, content)
                written.append(path)
    # last: who sees the report finds its figures
    write_text(report, _page(sections, title=title, command=command, overview=overview))
    return written


def headline(comparison: Comparison, variant: Variant) -> str:
    """A sentence on what a variant scores and keeps of the reference, and at which cost."""
    reference = next((v for v in comparison.variants if v.name == comparison.reference), None)
    metric = comparison.metric
    score = f"{_estimate(variant.score, metric.unit, 2)}{' %' if metric.unit == 100 else ''}"
    if variant.name == comparison.reference:
        return f"{variant.name}, the reference, has {metric.name} {score}."
    if reference is None:
        return (
            f"{variant.name} has {metric.name} {score}; there is no run of {comparison.reference} to compare it with."
        )
    costs = [f"{_share(variant.attention_parameters, reference.attention_parameters)} of its attention parameters"]
    if variant.cache_bytes_per_token is not None and reference.cache_bytes_per_token:
        costs.append(f"{_share(variant.cache_bytes_per_token, reference.cache_bytes_per_token)} of its cache")
    if variant.retained is None or not math.isfinite(variant.retained.mean):
        return f"{variant.name} has {metric.name} {score} with {' and '.join(costs)} (retention is not defined)."
    kept = f"{_estimate(variant.retained, 100, 1)} %"
    return f"{variant.name} keeps {kept} of {reference.name}’s {metric.name} with {' and '.join(costs)}."


def _sections(comparisons: Sequence[Comparison], tables: Sequence[str]) -> list[_Section]:
    if len(comparisons) != len(tables):
        raise ValueError(
            f"tables ({len(tables)}) must be as many as comparisons ({len(comparisons)}); give one for each"
        )
    slugs: list[str] = []
    for comparison in comparisons:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", comparison.task).strip("-") or "task"
        same = sum(slug == name or slug.startswith(f"{name}--") for slug in slugs)
        slugs.append(f"{name}--{same + 1}" if same else name)
    return [
        _Section(
            slug,
            comparison,
            table,
            {
                stem: _Drawn(figure, caption, figure_bytes(figure, "svg"))
                for stem, (figure, caption) in figures(comparison).items()
            },
        )
        for slug, comparison, table in zip(slugs, comparisons, tables, strict=True)
    ]


def _page(sections: Sequence[_Section], *, title: str, command: str, overview: str) -> str:
    several = len(sections) > 1
    contents = ""
    if several:
        links = "".join(f'<li><a href="#task-{s.slug}">{_title(s.comparison)}</a></li>' for s in sections)
        contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{contents}
</header>
<main>
{_table(overview, "Results of all tasks") if overview else ""}
{"".join(_section(section) for section in sections)}
</main>
<footer>
<h2 id="definitions">How to read it</h2>
{_definitions([section.comparison for section in sections])}
<h2 id="command">How it was made</h2>
<pre><code>{escape(command)}</code></pre>
</footer>
</body>
</html>
"""


def _section(section: _Section) -> str:
    c, slug = section.comparison, section.slug
    answers = "".join(f"<li>{_answer(c, v)}</li>" for v in c.variants)
    drawn = "".join(_figure(f"{slug}-{stem}", drawn) for stem, drawn in section.figures.items())
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _facts(c).items())
    # the table may have said them already
    notes = "".join(f"<li>{escape(note)}</li>" for note in c.notes if escape(note) not in section.table)
    return f"""<section id="task-{slug}" aria-labelledby="title-{slug}">
<h2 id="title-{slug}">{_title(c)}</h2>
<ul class="answer">{answers}</ul>
<p>{escape(_front(c))}</p>
{_table(section.table, f"Results of {c.task}")}
{f'<h3>Figures</h3><div class="figures">{drawn}</div>' if drawn else ""}
<h3>What was compared</h3>
<dl>{facts}</dl>
{f'<h3>Notes</h3><ul class="notes">{notes}</ul>' if notes else ""}
</section>
"""


def _answer(c: Comparison, variant: Variant) -> str:
    text = headline(c, variant).removeprefix(variant.name)
    # a number and its unit stay on one line
    kept = escape(text).replace(" %", "&nbsp;%").replace(" ± ", "&nbsp;±&nbsp;")
    return f"<strong>{escape(variant.name)}</strong>{kept}"


def _title(c: Comparison) -> str:
    return f"{escape(c.task)}: {escape(c.metric.name)} ({escape(c.split)})"


def _front(c: Comparison) -> str:
    """Which variants are worth their parameters."""
    scored = [v for v in c.variants if math.isfinite(v.score.mean)]
    points = [(float(v.attention_parameters), v.score.mean) for v in scored]
    names = [scored[i].name for i in pareto_front(points, c.metric.higher_is_better)]
    better = "higher" if c.metric.higher_is_better else "lower"
    if not names:
        return "No variant has a finite score."
    return (
        f"A {better} {c.metric.name} is better. By their means, no variant has both fewer attention parameters and a "
        f"better score than {_listed(names)}."
    )


def _facts(c: Comparison) -> dict[str, str]:
    ns = sorted({v.score.n for v in c.variants})
    seeds = "" if not ns else str(ns[0]) if ns[0] == ns[-1] else f"{ns[0]} to {ns[-1]}"
    return {
        "variants": ", ".join(v.name for v in c.variants),
        "seeds of each": seeds,
        "made equal": c.mode.removeprefix("equal_").replace("_", " "),
        "reference of PRR": c.reference,
        "reference of PEoP": c.baseline,
        **({"longest sequence": f"{c.max_context:,} tokens"} if c.max_context else {}),
        **c.facts,
    }


def _definitions(comparisons: Sequence[Comparison]) -> str:
    references = _listed(sorted({c.reference for c in comparisons})) or "the reference"
    baselines = _listed(sorted({c.baseline for c in comparisons})) or "the baseline"
    texts = [
        f"PRR, the performance retention ratio, is a variant’s score divided by that of {references}; where lower is "
        f"better, it is 1 minus the relative increase. PEoP, the performance elasticity of parameters, is the relative "
        f"gain in score over {baselines} divided by the relative growth in attention parameters, which count output "
        "projections and leave out biases. Both are computed for each seed and averaged, and are not defined (–) where "
        "the score that they are measured against is not positive.",
        "± and whiskers are 95 % confidence intervals of the mean over seeds, by Student’s t distribution: they tell "
        "how much results vary between seeds, not between data sets. With one seed there is none.",
        f"p is that of the two-sided paired t test against {references}, paired by seed. A large p with few seeds does "
        "not show that two variants are equal.",
    ]
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _table(table: str, name: str) -> str:
    # focusable, so that it can be scrolled with the keyboard
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">{table}</div>'


def _figure(name: str, drawn: _Drawn) -> str:
    wide = ' class="wide"' if drawn.figure.get_figwidth() > WIDE else ""
    return f"""<figure id="fig-{name}"{wide}>
<div class="scroll">{_inline_svg(drawn, f"fig-{name}")}</div>
<figcaption>{escape(drawn.caption)}</figcaption>
</figure>
"""


def _inline_svg(drawn: _Drawn, name: str) -> str:
    """The figure as an element of a page: its ids and its style sheet are its own, and it follows the page's width."""
    svg = drawn.svg.decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = (
        svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-').replace("xlink:href", "href")
    )
    svg = svg.replace('<style type="text/css">*{', f"<style>#{name} svg *{{")
    # in HTML the elements' namespace is known
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    width = 96 * drawn.figure.get_figwidth()  # pixels
    opening = (
        f'<svg {box[0]} role="img" aria-label="{escape(drawn.caption)}" '
        f'style="max-width:{width:.0f}px;min-width:{0.72 * width:.0f}px">'
    )
    return opening + svg[svg.index(">") + 1 :]


def _estimate(estimate: Estimate, unit: float, digits: int) -> str:
    mean = f"{unit * estimate.mean:.{digits}f}"
    # a reference's own retention has no spread
    if not estimate.half_width:
        return mean
    return f"{mean} ± {unit * estimate.half_width:.{digits}f}"


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole if whole else math.nan
    return f"{percent:.0f} %" if percent >= 9.95 or percent == 0 else f"{percent:.1f} %"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
