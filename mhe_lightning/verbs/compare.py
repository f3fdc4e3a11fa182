"""`compare`: what finished runs say about their attentions."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from mhe_lightning.comparison.compare import Options, compare_runs
from mhe_lightning.comparison.html import headline, write_report
from mhe_lightning.comparison.overview import multi_task_table
from mhe_lightning.comparison.results import Comparison
from mhe_lightning.comparison.runs import CATEGORIES, FinishedRun, find_runs
from mhe_lightning.comparison.statistics import require_scipy
from mhe_lightning.comparison.style import require_matplotlib
from mhe_lightning.comparison.tables import Table, render
from mhe_lightning.comparison.task_table import comparison_table
from mhe_lightning.errors import UserError
from mhe_lightning.files import write_text
from mhe_lightning.loading import lines_of_file
from mhe_lightning.parsing import Parser, as_user_error

EXTENSIONS = {"markdown": "md", "csv": "csv", "latex": "tex"}

RECORDED = (
    "seed",
    "steps",
    "tokens_seen",
    "training_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "parameters",
    "metrics",
    "evaluations",
    "data",
    "versions",
    "git_commit",
    "machine",
)


def main(verb: str, args: list[str]) -> None:
    options = _parser().parse_args(args)
    if unknown := sorted(set(options.allow) - set(CATEGORIES)):
        raise UserError(f"--allow {unknown[0]} is none of {', '.join(CATEGORIES)}")
    try:
        require_scipy()
        if options.out is not None:
            require_matplotlib()
        runs, left_out = find_runs([Path(path) for path in options.runs])
        if not runs:
            raise UserError(f"none of the runs is finished: {' '.join(left_out)}")
        comparisons = compare_runs(
            runs,
            Options(
                split=options.split,
                reference=options.reference,
                baseline=options.baseline,
                allowed=options.allow,
                latency=options.latency,
                text=None if options.text is None else lines_of_file(options.text),
                max_tokens=options.max_tokens,
            ),
        )
    except ValueError as error:
        raise as_user_error(error) or error from error
    overview = multi_task_table(comparisons) if len(comparisons) > 1 else None
    tables = [comparison_table(comparison) for comparison in comparisons]
    # before anything is printed: whoever reads only the first lines, as `head` does, has the report all the same
    written = (
        [] if options.out is None else _write(Path(options.out), options, comparisons, tables, overview, runs, args)
    )
    for table in [*([overview] if overview else []), *tables]:
        print(render(table, "text"))
    for comparison in comparisons:
        for variant in comparison.variants:
            if variant.name != comparison.reference:
                print(headline(comparison, variant))
    for sentence in left_out:
        print(f"note: {sentence}")
    for line in written:
        print(line)


def _write(
    folder: Path,
    options: Namespace,
    comparisons: Sequence[Comparison],
    tables: Sequence[Table],
    overview: Table | None,
    runs: Sequence[FinishedRun],
    args: Sequence[str],
) -> list[str]:
    """Write the report and what goes with it; gives the lines that say where."""
    report, *_ = write_report(
        folder,
        comparisons,
        [render(table, "html") for table in tables],
        title=options.title,
        command=shlex.join(["python", "train.py", "compare", *args]),
        overview="" if overview is None else render(overview, "html"),
    )
    named = [(comparison.task, table) for comparison, table in zip(comparisons, tables, strict=True)]
    if overview is not None:
        named.append(("all", overview))
    for name, table in named:
        for kind, extension in EXTENSIONS.items():
            write_text(folder / f"{name.replace('/', '-')}.{extension}", render(table, kind))
    write_text(
        folder / "comparison.json", json.dumps(_finite(_record(comparisons, runs)), indent=1, allow_nan=False) + "\n"
    )
    return [
        f"report: {report}",
        f"tables: {folder}/*.md, *.csv, *.tex; plots: {folder}/plots; numbers: {folder}/comparison.json",
    ]


def _record(comparisons: Sequence[Comparison], runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """The comparisons and the runs that they rest on, without curves and maps, which are long."""
    found = []
    for comparison in comparisons:
        entry = asdict(comparison)
        for variant in entry["variants"]:
            del variant["curves"], variant["maps"]
        found.append(entry)
    return {
        "comparisons": found,
        "runs": [
            {
                "task": run.task,
                "attention": run.attention,
                "mode": run.mode,
                "sizes": dict(run.sizes),
                "settings": dict(run.settings),
                **{key: run.results.get(key) for key in RECORDED},
            }
            for run in runs
        ],
    }


def _finite(value: Any) -> Any:
    """``value`` as JSON can hold it: what is no number is null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> Parser:
    parser = Parser(
        prog="train.py compare",
        description="Compare finished runs: a row per attention with its mean score over seeds and the 95 % interval, "
        "what is kept of the reference (PRR), the score's elasticity of parameters (PEoP), a paired test over seeds, "
        "and what it costs. Runs of several tasks give a table of all tasks, too. Runs must have all but attention and "
        "seed in common.",
    )
    parser.add_argument(
        "runs", type=str, nargs="+", help="Roots of sweeps, run directories, or folders of run directories."
    )
    parser.add_argument(
        "--out",
        type=str,
        help="Write a report into this folder: report.html, tables as Markdown, CSV and LaTeX, plots as PNG and SVG.",
    )
    parser.add_argument("--title", type=str, default="Attentions compared", help="Of the report.")
    parser.add_argument(
        "--split", type=str, choices=["test", "val"], help="Whose scores (default: test, if all runs have them)."
    )
    parser.add_argument("--reference", type=str, default="mha", help="The attention that others are measured against.")
    parser.add_argument("--baseline", type=str, default="sha", help="The one that efficiency (PEoP) is measured from.")
    parser.add_argument(
        "--allow", type=str, nargs="+", default=[], help=f"Compare runs that differ in these: {', '.join(CATEGORIES)}."
    )
    parser.add_argument(
        "--latency", action="store_true", help="Measure the time for a token, here and now; load nothing beside it."
    )
    parser.add_argument("--text", type=str, help="A text file: measure on it how differently the heads attend.")
    parser.add_argument("--max_tokens", type=int, default=4096, help="Tokens of that text, at most.")
    return parser
