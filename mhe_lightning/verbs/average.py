"""`average`: the GLUE or SuperGLUE score of finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mhe_lightning.callbacks.run_record import RESULTS, VERB_OF, read_results
from mhe_lightning.data.classification import ClassificationData
from mhe_lightning.data.glue import GlueData
from mhe_lightning.data.superglue import SuperGlueData
from mhe_lightning.verbs import UserError
from mhe_lightning.verbs.parsing import Parser

BENCHMARKS: dict[str, type[ClassificationData]] = {data.benchmark: data for data in (GlueData, SuperGlueData)}


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


def benchmark_average(benchmark: str, scores: Mapping[str, float]) -> float:
    """The mean score of a benchmark's tasks, its diagnostics left out.

    Source: Wang et al. 2018 (GLUE) and 2019 (SuperGLUE).

    Args:
        benchmark: "glue" or "superglue".
        scores: of every task.

    Raises:
        KeyError: a task has no score.
    """
    tasks = [name for name, spec in BENCHMARKS[benchmark].tasks.items() if spec.averaged]
    return math.fsum(scores[name] for name in tasks) / len(tasks)


def scores_of(run: Path, split: str) -> tuple[str, str, dict[str, float]]:
    """Benchmark, task and metrics of a run: those of its last `validate` or `test`, else of the end of its training."""
    try:
        results = read_results(run)
    except (OSError, ValueError) as error:
        raise UserError(f"{run} is not a finished run: its {RESULTS} cannot be read ({error})") from error
    benchmark, _, task = str(results.get("data", {}).get("label", "")).partition("-")
    if benchmark not in BENCHMARKS:
        raise UserError(f"{run} is not a run of GLUE or SuperGLUE")
    evaluation = results.get("evaluations", {}).get(VERB_OF[split], {})
    other = evaluation.get("data", {}).get("init_args", {}).get("task", task)
    if other != task:  # diagnostics, by the model of another task
        verb = VERB_OF[split]
        raise UserError(f"the last `{verb}` of {run}, a run of {task}, was on {other}; run `{verb}` on {task} again")
    metrics = evaluation.get("metrics") or results.get("metrics", {})
    own = {key.removeprefix(f"{split}/"): value for key, value in metrics.items() if key.startswith(f"{split}/")}
    if "score" not in own:
        raise UserError(f"{run} has no {split}/score; run `{VERB_OF[split]}` on it first")
    return benchmark, task, own
