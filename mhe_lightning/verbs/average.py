"""`average`: the GLUE or SuperGLUE score of finished runs."""

from __future__ import annotations

from pathlib import Path

from mhe_lightning.benchmarks import BENCHMARKS, benchmark_average, scores_of
from mhe_lightning.callbacks.run_record import VERB_OF
from mhe_lightning.errors import UserError
from mhe_lightning.parsing import Parser


def main(verb: str, args: list[str]) -> None:
    parser = Parser(
        prog="train.py average",
        description="The average of GLUE or SuperGLUE: a task's score is the mean of its metrics (and of MNLI's two "
        "parts), the average is the mean over all tasks but the diagnostics.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="Run directories, one per task.")
    parser.add_argument("--split", type=str, choices=list(VERB_OF), default="val", help="Whose scores.")
    options = parser.parse_args(args)
    found = [scores_of(Path(run), options.split) for run in options.runs]
    benchmark, *others = sorted({benchmark for benchmark, _, _ in found})
    if others:
        raise UserError(f"the runs are of {benchmark} and {others[0]}, which have an average each")
    scores: dict[str, float] = {}
    for (_, task, metrics), run in zip(found, options.runs, strict=True):
        if task in scores:
            raise UserError(f"{run} is a second run of {task}; give one per task")
        scores[task] = metrics["score"]
        shown = ", ".join(f"{k} {100 * v:.1f}" for k, v in metrics.items() if k not in ("score", "loss"))
        print(f"{task:8} {100 * metrics['score']:6.1f}   {shown}")
    missing = [name for name, spec in BENCHMARKS[benchmark].tasks.items() if spec.averaged and name not in scores]
    if missing:
        print(f"no average of {benchmark}: {', '.join(missing)} missing")
    else:
        print(f"{'average':8} {100 * benchmark_average(benchmark, scores):6.1f}")
