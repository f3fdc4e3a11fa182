"""Training and testing the runs one by one, and what is printed of it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mhe_lightning import run as run_directory
from mhe_lightning.errors import UserError
from mhe_lightning.sweep.configs import Config, task_of
from mhe_lightning.sweep.outcomes import begin_from, is_finished, results_of, tested_score
from mhe_lightning.sweep.runs import CHECKPOINTS, Run, Sweep
from mhe_lightning.tasks import Task

LOCK_PATIENCE = 10.0
"""Seconds for a killed process to let go of its run."""

_Variant = tuple[str, tuple[tuple[str, str], ...]]
"""An attention and a point of the grid."""

Launch = Callable[[Sequence[str], Path], int]
"""Runs the command line with these arguments, appends what it prints to a file, and returns its exit code."""


@dataclass(frozen=True)
class Numbered:
    """A run, and where it stands in a list.

    Args:
        run: the run.
        place: such as "[3/24]".
    """

    run: Run
    place: str


def numbered(runs: Sequence[Run]) -> list[Numbered]:
    """Runs with their places, from 1."""
    return [Numbered(run, f"[{i}/{len(runs)}]") for i, run in enumerate(runs, 1)]


def train(sweep: Sweep, runs: Sequence[Numbered], configs: Mapping[str, Config], launch: Launch) -> list[str]:
    """Train the runs that are not finished, one after another.

    Args:
        sweep: what is compared.
        runs: with their places, for the lines that are printed.
        configs: of the runs, by name.
        launch: runs `fit`.

    Returns:
        The names of those that failed.

    Raises:
        UserError: every config was refused, or two of them for one reason; or another process is writing to a run.
    """
    failed = []
    refusals = _Refusals(sweep, runs)
    seconds: list[float] = []
    waiting = [n.run.name for n in runs if not is_finished(sweep.root / n.run.name, configs[n.run.name])]
    for number in runs:
        run, folder, config = number.run, sweep.root / number.run.name, configs[number.run.name]
        if is_finished(folder, config):
            print(f"{number.place} {run.name}  {_validation_told(folder, task_of(config))}finished earlier", flush=True)
            continue
        if refusals.of_alike(run):
            failed.append(run.name)
            continue
        _wait_for_lock(folder)
        step = run_directory.last_step(folder)
        print(f"{number.place} {run.name}  {f'going on from step {step:,}' if step > 0 else 'begins'}", flush=True)
        code, taken = _timed(launch, "fit", sweep, run, begin_from(folder, config))
        seconds.append(taken)
        waiting.remove(run.name)
        if code == 0 and is_finished(folder, config):
            left = math.fsum(seconds) / len(seconds) * len(waiting)
            more = f", about {duration(left)} of training left" if waiting else ""
            told = f"{_validation_told(folder, task_of(config))}{duration(taken)}{more}"
            print(f"{number.place} {run.name}  {told}", flush=True)
        else:
            refusals.tell_failure(run, "fit", code)
            failed.append(run.name)
    return failed


def score(sweep: Sweep, runs: Sequence[Numbered], configs: Mapping[str, Config], launch: Launch) -> list[str]:
    """Test the finished ones of ``runs`` that were not tested yet.

    Args:
        sweep: what is compared; it says which checkpoint is tested.
        runs: with their places, for the lines that are printed.
        configs: of the runs, by name.
        launch: runs `test`.

    Returns:
        The names of those that failed.

    Raises:
        UserError: every config was refused, or two of them for one reason; or the test split has no labels.
    """
    failed = []
    refusals = _Refusals(sweep, runs)
    checkpoint = CHECKPOINTS[sweep.score]
    for number in runs:
        run, folder, config = number.run, sweep.root / number.run.name, configs[number.run.name]
        task = task_of(config)
        found, told = tested_score(folder, config, checkpoint, task), "tested earlier"
        if found is None:
            if refusals.of_alike(run):
                failed.append(run.name)
                continue
            code, taken = _timed(launch, "test", sweep, run, checkpoint)
            if code != 0:
                refusals.tell_failure(run, "test", code)
                failed.append(run.name)
                continue
            found, told = tested_score(folder, config, checkpoint, task), duration(taken)
        if found is None:
            raise UserError(
                f"`test` of {folder} gave no test/{task.score}: the data have no labels there; compare on the "
                "validation split instead, with --split val"
            )
        print(f"{number.place} {run.name}  {_score_told(task, 'test', found)}{told}", flush=True)
    return failed


def log_of(sweep: Sweep, run: Run) -> Path:
    """The file that has all that a run's processes have printed."""
    return sweep.root / f"{run.name}.log"


def duration(seconds: float) -> str:
    """Seconds in the largest two units that fit, such as "2 min 10 s"."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _timed(launch: Launch, verb: str, sweep: Sweep, run: Run, checkpoint: str) -> tuple[int, float]:
    """The exit code of a verb on a run, and the seconds that it took."""
    begun = time.monotonic()
    code = launch([verb, *run.arguments, f"--ckpt_path={checkpoint}"], log_of(sweep, run))
    return code, time.monotonic() - begun


def _validation_told(folder: Path, task: type[Task]) -> str:
    value = results_of(folder).get("metrics", {}).get(f"val/{task.score}")
    return "" if value is None else _score_told(task, "val", value)


def _score_told(task: type[Task], split: str, value: float) -> str:
    return f"{split}/{task.score} {value * task.score_unit:.2f}  "


def _wait_for_lock(folder: Path) -> None:
    """A process that was killed a moment ago may still hold its run."""
    end = time.monotonic() + LOCK_PATIENCE
    while (folder / run_directory.LOCK).exists():
        try:
            run_directory.lock(folder).close()
            return
        except ValueError as error:
            if time.monotonic() > end:
                raise UserError(f"{error}; is this sweep running already?") from error
            time.sleep(0.2)


class _Refusals:
    """Tells how children fail. A config that was refused once is not tried with other seeds.

    Args:
        sweep: what is compared.
        runs: all that are tried.
    """

    def __init__(self, sweep: Sweep, runs: Sequence[Numbered]) -> None:
        self.sweep = sweep
        self.variants = {_variant(number.run) for number in runs}
        self.reasons: dict[_Variant, str] = {}

    def of_alike(self, run: Run) -> bool:
        """Whether the config of this run was refused with another seed."""
        return _variant(run) in self.reasons

    def tell_failure(self, run: Run, verb: str, code: int) -> None:
        """Say how a child failed.

        Raises:
            UserError: its config was refused, and so were those of all others, or one other for the same reason.
        """
        log = log_of(self.sweep, run)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        lines = [line for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
        if code == 2:
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            reason = errors[-1] if errors else "refused"
            message = f"`{verb}` of {run.name}: {reason} (all it printed: {log})"
            again = reason in self.reasons.values()
            self.reasons[_variant(run)] = reason
            if again or self.variants == self.reasons.keys():
                raise UserError(message)
            print(f"{message}; going on without it", file=sys.stderr, flush=True)
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == 0:
            how = "ended before its last step"
        print(f"{run.name} failed: `{verb}`, {how}; the end of {log}:", file=sys.stderr)
        print("\n".join(f"    {line}" for line in lines[-15:]), file=sys.stderr, flush=True)


def _variant(run: Run) -> _Variant:
    """What the runs of all seeds have in common."""
    return run.attention, tuple(run.settings.items())
