"""What the folders of runs say: which are finished, what they score, and which point of the grid is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mhe_lightning import run as run_directory
from mhe_lightning.callbacks.run_record import read_results
from mhe_lightning.checkpoint import complete_checkpoints, step_of
from mhe_lightning.sweep.configs import Config, data_part, task_of
from mhe_lightning.sweep.runs import Run, Sweep
from mhe_lightning.tasks import Task


def results_of(folder: Path) -> dict[str, Any]:
    """A run's ``results.json``; empty if there is none that can be read."""
    try:
        return read_results(folder)
    except (OSError, ValueError):
        return {}


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a run was trained to its end and validated."""
    results = results_of(folder)
    validated = any(key.startswith("val/") for key in results.get("metrics", {}))
    return validated and "finished" in results and results.get("steps") == config["trainer"]["max_steps"]


def begin_from(folder: Path, config: Config) -> str:
    """The ``--ckpt_path`` for a run that is not finished.

    A run that was killed between its last checkpoint and its results goes on from the checkpoint before: its last
    validation would otherwise be made anew, and that after training may decode with other settings.
    """
    found = complete_checkpoints(folder / "checkpoints")
    if step_of(next(found, Path())) == config["trainer"]["max_steps"]:
        earlier = next(found, None)
        if earlier is not None:
            return str(earlier)
    return "auto"


def validation_score(folder: Path, task: type[Task]) -> float:
    """A run's score on the validation split at the end of its training, as recorded.

    Raises:
        ValueError: it has none.
    """
    metrics = results_of(folder).get("metrics", {})
    key = f"val/{task.score}"
    if key not in metrics:
        found = ", ".join(name for name in metrics if name.startswith("val/"))
        raise ValueError(f"{folder} has no {key} at the end of its training, only {found}, so it cannot be compared")
    return float(metrics[key])


def tested_score(folder: Path, config: Config, checkpoint: str, task: type[Task]) -> float | None:
    """A run's score on the test split, if it is that of this checkpoint (its ``--ckpt_path``) and these data."""
    evaluation = results_of(folder).get("evaluations", {}).get("test", {})
    score = evaluation.get("metrics", {}).get(f"test/{task.score}")
    wanted = run_directory.resolve_checkpoint(checkpoint, folder)
    if score is None or wanted is None or Path(evaluation["checkpoint"]).name != Path(wanted).name:
        return None
    old, new = evaluation["data"], config["data"]
    if run_directory.differences(data_part(old, new), data_part(new, old)):
        return None
    return float(score)


def best_point(scores: Sequence[Sequence[float]], *, higher_is_better: bool) -> int:
    """Which point of a grid has the best mean over seeds; of equals the first. A point that diverged is the worst.

    Args:
        scores: of each point, those of all seeds.
        higher_is_better: False for losses and perplexities.
    """
    worst = -math.inf if higher_is_better else math.inf
    means = [math.fsum(point) / len(point) if all(map(math.isfinite, point)) else worst for point in scores]
    return means.index(max(means) if higher_is_better else min(means))


def choose(sweep: Sweep, runs: Sequence[Run], configs: Mapping[str, Config]) -> dict[str, dict[str, str]]:
    """Each attention's best point of the grid on the validation split; without one of which a run is not finished.

    Args:
        sweep: what is compared.
        runs: all of them.
        configs: of the runs, by name.
    """
    chosen = {}
    for attention in sweep.attentions:
        own = [run for run in runs if run.attention == attention]
        if not all(is_finished(sweep.root / run.name, configs[run.name]) for run in own):
            continue
        points: dict[tuple[tuple[str, str], ...], list[float]] = {}
        task = task_of(configs[own[0].name])
        if not sweep.grid:
            chosen[attention] = dict[str, str]()
            continue
        for run in own:
            score = validation_score(sweep.root / run.name, task)
            points.setdefault(tuple(run.settings.items()), []).append(score)
        best = best_point(list(points.values()), higher_is_better=task.higher_is_better)
        chosen[attention] = dict(list(points)[best])
    return chosen


def state_of(folder: Path, config: Config) -> str:
    """How far a run is, in words."""
    if is_finished(folder, config):
        return "finished"
    step = run_directory.last_step(folder)
    return f"at step {step:,}" if step > 0 else "not begun"
