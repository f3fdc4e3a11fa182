"""The averages of GLUE and SuperGLUE, from what runs recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mhe_lightning.callbacks.run_record import RESULTS, VERB_OF, read_results
from mhe_lightning.data.classification import ClassificationData
from mhe_lightning.data.glue import GlueData
from mhe_lightning.data.superglue import SuperGlueData
from mhe_lightning.errors import UserError

BENCHMARKS: dict[str, type[ClassificationData]] = {data.benchmark: data for data in (GlueData, SuperGlueData)}


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
