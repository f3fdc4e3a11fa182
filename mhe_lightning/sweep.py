"""Variants × seeds × a grid of one experiment: which runs these are, and training and scoring them one by one.

1. `make_runs` lists the runs, each with the arguments of its `fit`.
2. `Sweep.claim` makes the root's ``sweep.json``, or refuses a root that holds another sweep.
3. `train` trains the runs that are not finished, each in a process of its own, going on from its newest checkpoint.
4. `choose` takes each attention's best point of the grid, by validation.
5. `score` tests these.

Every step looks at what is on disk, so the same call goes on with a sweep that was killed.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, get_args

import yaml

from mhe_lightning import run as run_directory
from mhe_lightning.callbacks.run_record import CONFIG, RESULTS
from mhe_lightning.checkpoint import checkpoints_in, complete_checkpoints, step_of
from mhe_lightning.files import write_text
from mhe_lightning.sizing import Mode, Spend, match
from mhe_lightning.tasks import Task
from mhe_lightning.verbs import UserError
from mhe_lightning.verbs.experiment import Experiments

MANIFEST = "sweep.json"
FORMAT_VERSION = 1
CHECKPOINTS = {"last": "auto", "best": "best", "averaged": "averaged"}
"""What `test` can score → its ``--ckpt_path``."""

LOCK_PATIENCE = 10.0
"""Seconds for a killed process to let go of its run."""

Config = dict[str, Any]
Launch = Callable[[Sequence[str], Path], int]
"""Runs the command line with these arguments, appends what it prints to a file, and returns its exit code."""

_OWN = {
    "name": "runs are named by attention, grid point and seed",
    "seed_everything": "give the seeds with --seeds",
    "ckpt_path": "runs go on from their newest checkpoints by themselves",
    "trainer.default_root_dir": "give the folder of all runs with --root",
    "model.net.attention": "give the attentions with --attentions",
    "model.net.attention.class_path": "give the attentions with --attentions",
}
"""Options of `fit` that a sweep sets → what to do instead."""


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        name: of its folder in the sweep's root.
        attention: name of the overlay.
        seed: of everything that is drawn.
        settings: the point of the grid: option → value.
        sizes: what the comparison's mode changes in the net: option → value.
        arguments: of `fit`, all but ``--ckpt_path``.
    """

    name: str
    attention: str
    seed: int
    settings: Mapping[str, str]
    sizes: Mapping[str, int]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What is compared, and how.

    Args:
        root: the folder of all runs.
        arguments: options of `fit` for every run, in which ``{attention}`` and ``{seed}`` are replaced.
        attentions: name → YAML file of the attention.
        seeds: of the runs.
        grid: option → values; `parse_grid` makes it.
        mode: one of `mhe_lightning.sizing.Mode`.
        spend: where parameters or FLOPs that a variant saves go; for the modes that need it.
        reference: the attention whose parameters or FLOPs the others match; for the modes that need it.
        score: the checkpoint that is tested: "last", "best" or "averaged"; "none" tests nothing.
        split: whose scores are compared: "test"; or "val", as they were at the end of training.

    Raises:
        ValueError: an argument is out of range, or two of them set the same option.
    """

    root: Path
    arguments: tuple[str, ...]
    attentions: Mapping[str, Path]
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mode: Mode = "equal_architecture"
    spend: Spend = "feed_forward"
    reference: Path | None = None
    score: str = "last"
    split: str = "test"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", get_args(Mode)),
            ("spend", get_args(Spend)),
            ("score", (*CHECKPOINTS, "none")),
            ("split", ("test", "val")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(allowed)}")
        if not self.attentions or not self.seeds:
            raise ValueError("a sweep needs at least one attention and one seed")
        for seed in self.seeds:
            if self.seeds.count(seed) > 1:
                raise ValueError(f"seed {seed} is given twice; give each once")
        if self.split == "val" and self.score in ("best", "averaged"):
            raise ValueError(
                f"score ({self.score}) is tested on the test split, but split is 'val', whose scores are those of the "
                "end of training; choose score 'last', or split 'test'"
            )
        if self.mode != "equal_architecture" and self.reference is None:
            raise ValueError(f"mode {self.mode} needs a reference to match")
        passed = passed_options(self.arguments)
        for option in passed:
            if option in _OWN:
                raise ValueError(f"--{option} is set by the sweep: {_OWN[option]}")
        for key in self.grid:
            if canonical(key) in passed:
                raise ValueError(f"{key} is in the grid and given as --{key} too; leave one of them out")

    # What the root holds

    def claim(self, experiments: Experiments, runs: Sequence[Run]) -> dict[str, Any]:
        """The manifest of the root with this sweep in it, to be written.

        Args:
            experiments: reads configs.
            runs: of this sweep.

        Returns:
            The manifest: ``format_version``, what the sweep was given, the experiment's resolved ``config``, ``runs``
            by name, and the grid point that was ``chosen`` for each attention, once it is known.

        Raises:
            ValueError: the root holds a sweep that differs in more than attentions, seeds and what is scored.
        """
        old = read_manifest(self.root)
        new = self._manifest(experiments, runs, old)
        if old is not None:
            _refuse_other(self.root, old, new)
            new["attentions"] = {**old["attentions"], **new["attentions"]}
            new["runs"] = {**old["runs"], **new["runs"]}
            new["chosen"] = old["chosen"]
            for key in ("score", "split"):
                if new[key] != old[key]:
                    print(f"{key}: was {old[key]}, now {new[key]}", flush=True)
        return new

    def _manifest(self, experiments: Experiments, runs: Sequence[Run], old: Mapping[str, Any] | None) -> dict[str, Any]:
        sized = self.mode != "equal_architecture"
        seeds = self.all_seeds(old)
        # the same substitutes as in the first call: what has grown since comes after
        attention = next(iter(old["attentions"] if old else self.attentions))
        return {
            "format_version": FORMAT_VERSION,
            "mode": self.mode,
            "spend": self.spend if sized else None,
            "reference": self.reference.stem if sized and self.reference else None,
            "grid": {key: list(values) for key, values in self.grid.items()},
            "score": self.score,
            "split": self.split,
            "attentions": {name: _overlay(path) for name, path in self.attentions.items()},
            "seeds": seeds,
            "arguments": list(self.arguments),
            "config": resolve(experiments, substituted(self.arguments, attention, seeds[0])),
            "runs": {
                run.name: {
                    "attention": run.attention,
                    "seed": run.seed,
                    "settings": {key: _typed(value) for key, value in run.settings.items()},
                    "sizes": dict(run.sizes),
                }
                for run in runs
            },
            "chosen": {},
        }

    def all_seeds(self, manifest: Mapping[str, Any] | None) -> list[int]:
        """The seeds in a manifest, followed by those of this sweep that are new."""
        return list(dict.fromkeys([*(manifest["seeds"] if manifest else ()), *self.seeds]))


# Which runs


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Options and their values from texts such as ``model.lr=1e-3,2e-3``; commas within brackets separate nothing.

    Raises:
        ValueError: a text is no option with values, a value is empty or given twice, or an option is given twice or is
            set by the sweep.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().removeprefix("--")
        if not (key and equals):
            raise ValueError(f"grid {text!r} must be an option and its values; try model.lr=1e-3,2e-3")
        if canonical(key) in _OWN:
            raise ValueError(f"grid {key} is set by the sweep: {_OWN[canonical(key)]}")
        if canonical(key) in map(canonical, grid):
            raise ValueError(f"grid {key} is given twice; give all its values at once, with commas")
        found = [_normal(value) for value in re.split(r",(?![^\[{]*[\]}])", values)]
        if not all(found):
            raise ValueError(f"grid {text!r} has an empty value; try {key}=1e-3,2e-3")
        for value in found:
            if found.count(value) > 1:
                raise ValueError(f"grid {key} has the value {value} twice; give each once")
        grid[key] = tuple(found)
    return grid


def _normal(value: str) -> str:
    """A number in one form, whichever way it was written: it becomes part of names."""
    typed = _typed(value.strip())
    return repr(typed) if isinstance(typed, (int, float)) and not isinstance(typed, bool) else value.strip()


def _typed(value: str) -> Any:
    """What a value means: YAML takes 1e-3 for text."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def canonical(key: str) -> str:
    """An option's name without the ``init_args`` that may be left out."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def passed_options(arguments: Sequence[str]) -> set[str]:
    """The options in a command line, without dashes, values and ``init_args``."""
    keys = (a.partition("=")[0].removeprefix("--").removesuffix("+") for a in arguments if a.startswith("--"))
    return {canonical(key) for key in keys}


def substituted(arguments: Sequence[str], attention: str, seed: int) -> tuple[str, ...]:
    """The arguments of `fit` for an attention and a seed."""
    return tuple(a.replace("{attention}", attention).replace("{seed}", str(seed)) for a in arguments)


def make_runs(sweep: Sweep, experiments: Experiments, seeds: Sequence[int] | None = None) -> list[Run]:
    """The runs of a sweep, one seed after another, so that one that is killed leaves whole comparisons.

    Args:
        sweep: what is compared.
        experiments: reads configs, to find the sizes of nets that match in parameters or FLOPs.
        seeds: of the runs; None takes the sweep's.

    Raises:
        ValueError: no sizes match, the grid sets a size that the mode does, or two runs have one name.
        UserError: an option is unknown or its value refused.
    """
    points = [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    sizes: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, int]] = {}
    runs: dict[str, Run] = {}
    for seed, settings, attention in product(seeds or sweep.seeds, points, sweep.attentions):
        shape = tuple((k, v) for k, v in settings.items() if canonical(k).startswith(("model.net.", "data.")))
        if (attention, shape) not in sizes:
            sizes[attention, shape] = _sizes(sweep, experiments, attention, dict(shape))
        run = _make_run(sweep, attention, seed, settings, sizes[attention, shape])
        if run.name in runs:
            raise ValueError(f"two points of the grid give runs the name {run.name}; sweep over them in two roots")
        runs[run.name] = run
    return list(runs.values())


def _make_run(sweep: Sweep, attention: str, seed: int, settings: Mapping[str, str], sizes: Mapping[str, int]) -> Run:
    point = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([attention, *point, f"seed{seed}"]))
    arguments = (
        *substituted(sweep.arguments, attention, seed),
        f"--name={name}",
        f"--trainer.default_root_dir={sweep.root}",
        f"--seed_everything={seed}",
        f"--model.net.attention={sweep.attentions[attention]}",
        *(f"--{key}={value}" for key, value in sizes.items()),
        *(f"--{key}={value}" for key, value in settings.items()),
    )
    return Run(name, attention, seed, settings, sizes, arguments)


def _sizes(sweep: Sweep, experiments: Experiments, attention: str, settings: Mapping[str, str]) -> dict[str, int]:
    if sweep.mode == "equal_architecture":
        return {}
    assert sweep.reference is not None
    arguments = [
        *substituted(sweep.arguments, attention, sweep.seeds[0]),
        *(f"--{key}={value}" for key, value in settings.items()),
    ]
    overlay = sweep.attentions[attention]
    sizes = match(experiments, arguments, overlay, reference=sweep.reference, mode=sweep.mode, spend=sweep.spend)
    for key in sweep.grid:
        if canonical(key) in map(canonical, sizes):
            raise ValueError(f"grid {key} is what mode {sweep.mode} adjusts; choose another --spend, or leave it out")
    return sizes


# Configs


def resolve(experiments: Experiments, arguments: Sequence[str]) -> Config:
    """The whole config of what `fit` would run with these arguments.

    Raises:
        UserError: an option is unknown or its value refused.
    """
    config: Config = yaml.safe_load(experiments.text(experiments.parse(arguments)))
    return config


def check_config(config: Config, sweep: Sweep) -> None:
    """Refuse a training whose end a sweep could not recognise, or could not repeat to the digit.

    Raises:
        ValueError: it has no number of steps, a limit of time, no validation at its end, or no such checkpoint as the
            sweep tests.
    """
    trainer = config["trainer"]
    if trainer["max_steps"] < 1:
        raise ValueError(f"trainer.max_steps ({trainer['max_steps']}) must be the number of steps that all runs get")
    if trainer["max_time"] is not None:
        raise ValueError("trainer.max_time gives variants different numbers of steps; end runs with trainer.max_steps")
    batches, interval = trainer["max_steps"] * trainer["accumulate_grad_batches"], trainer["val_check_interval"]
    # with an integer, validation counts micro-batches; with none within training there is one at its end
    if isinstance(interval, int) and interval <= batches and batches % interval:
        raise ValueError(
            f"trainer.val_check_interval ({interval}) must divide the {batches} micro-batches of the run, so that the "
            "last validation is of the trained model"
        )
    if sweep.score == "averaged" and config["averaging"]["last"] < 1:
        raise ValueError("score 'averaged' needs runs that average their checkpoints; set --averaging.last, such as 5")
    if sweep.score == "best" and config["checkpoints"]["monitor"] is None:
        raise ValueError("score 'best' needs runs that keep their best checkpoint; set --checkpoints.monitor")


def check_beginning(config: Config) -> None:
    """Refuse a training that begins from a run which is not there.

    Raises:
        ValueError: ``init_from`` is neither a checkpoint file nor a run with checkpoints.
    """
    given = config["init_from"]
    if given is not None and not Path(given).is_file() and not checkpoints_in(Path(given) / "checkpoints"):
        raise ValueError(f"init_from ({given}) is neither a checkpoint file nor a run with checkpoints; train it first")


def task_of(config: Config) -> type[Task]:
    """The task's class in a config; it says what the score is."""
    module, _, name = config["model"]["class_path"].rpartition(".")
    task: type[Task] = getattr(import_module(module), name)
    return task


def config_differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Where two configs mean different trainings, as (dotted key, old, new): names and places do not matter."""
    return run_directory.differences(_training_part(old, new), _training_part(new, old))


def _training_part(config: Config, other: Config) -> Config:
    config = {k: v for k, v in config.items() if k not in ("name", "ckpt_path", "weights_only", "config", "verbose")}
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    return {**config, "data": _data_part(config["data"], other["data"])}


def _data_part(data: Config, other: Config) -> Config:
    ignored = {"cache_dir"}
    if None in (data.get("init_args", {}).get("tokenizer", ""), other.get("init_args", {}).get("tokenizer", "")):
        ignored.add("tokenizer")  # taken from the run that a model begins with
    return {**data, "init_args": {k: v for k, v in data.get("init_args", {}).items() if k not in ignored}}


def refuse_other_run(folder: Path, config: Config) -> None:
    """Refuse a folder that holds a run of another config.

    Raises:
        ValueError: it does; it is told where they differ.
    """
    if not (folder / CONFIG).is_file():
        return
    found = config_differences(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), config)
    if found:
        raise ValueError(f"{folder} holds another run: {_told(found)}; choose another --root, or move it away")


# The manifest


def read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a sweep; None if ``root`` holds none.

    Raises:
        ValueError: it cannot be read.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another --root, or restore the file") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this version of mhe_lightning reads {FORMAT_VERSION}")
    return manifest


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a sweep, completely or not at all, unless it is there already."""
    if manifest != read_manifest(root):
        write_text(root / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def record_choice(root: Path, chosen: Mapping[str, Mapping[str, str]]) -> None:
    """Put each attention's grid point into the manifest of a sweep."""
    manifest = read_manifest(root)
    assert manifest is not None, "a sweep claims its root before it runs"
    values = {name: {key: _typed(value) for key, value in point.items()} for name, point in chosen.items()}
    write_manifest(root, {**manifest, "chosen": {**manifest["chosen"], **values}})


def _refuse_other(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    found = []
    for key in ("mode", "spend", "reference", "grid"):
        found += run_directory.differences(old[key], new[key], key)
    for key in ("attentions", "runs"):
        common = [name for name in new[key] if name in old[key]]
        for name in common:
            found += run_directory.differences(old[key][name], new[key][name], f"{key}.{name}")
    found += config_differences(old["config"], new["config"])
    # what depends on the attention or the seed is not in a config of one of each
    was, now = ([a for a in m["arguments"] if "{attention}" in a or "{seed}" in a] for m in (old, new))
    found += run_directory.differences(was, now, "arguments")
    if found:
        raise ValueError(
            f"{root} holds another sweep: {_told(found)}; choose another --root (attentions and seeds may be added)"
        )


def _told(differences: Sequence[tuple[str, Any, Any]]) -> str:
    told = "; ".join(f"{key} was {old}, now {new}" for key, old, new in differences[:3])
    return told + (f" (and {len(differences) - 3} more)" if len(differences) > 3 else "")


def _overlay(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


# What a run's folder says


def results_of(folder: Path) -> dict[str, Any]:
    """A run's ``results.json``; empty if there is none that can be read."""
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results


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
    if run_directory.differences(_data_part(old, new), _data_part(new, old)):
        return None
    return float(score)


# Choosing


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


# Running


class Stopped(Exception):
    """A signal has ended the sweep.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Children:
    """Runs command lines, one at a time, each in a process that ends with this one."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped: int | None = None

    @contextmanager
    def passing_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C reach the child as SIGTERM, at which it saves its last step; a second one kills it."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        earlier = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        """Run ``python -m mhe_lightning`` with ``arguments``, what it prints being appended to ``log``.

        Raises:
            Stopped: by a signal, when the child has ended.
        """
        if self._stopped is not None:
            raise Stopped(self._stopped)
        command = [sys.executable, "-m", "mhe_lightning", *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which passes it on once
                preexec_fn=lambda: _end_with(parent),
            )
        if self._stopped is not None:  # while the child was being made
            self._child.terminate()
        code = self._child.wait()
        self._child = None
        if self._stopped is not None:
            raise Stopped(self._stopped)
        return code

    def _on_signal(self, number: int, _: Any) -> None:
        again, self._stopped = self._stopped is not None, number
        if self._child is not None and again:
            self._child.kill()
        elif self._child is not None:
            print("\nstopping: the run saves its last step; once more to stop at once", file=sys.stderr, flush=True)
            self._child.terminate()


def _end_with(parent: int) -> None:
    """Make the kernel kill this process when its parent dies, even of SIGKILL; on Linux."""
    if _LIBC is None:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


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
        UserError: a run's config was refused, or another process is writing to a run.
    """
    failed = []
    seconds: list[float] = []
    waiting = [n.run.name for n in runs if not is_finished(sweep.root / n.run.name, configs[n.run.name])]
    for number in runs:
        run, folder, config = number.run, sweep.root / number.run.name, configs[number.run.name]
        if is_finished(folder, config):
            print(f"{number.place} {run.name}  {_validation_told(folder, config)}finished earlier", flush=True)
            continue
        _wait_for_lock(folder)
        step = run_directory.last_step(folder)
        print(f"{number.place} {run.name}  {f'going on from step {step:,}' if step > 0 else 'begins'}", flush=True)
        begun = time.monotonic()
        code = launch(["fit", *run.arguments, f"--ckpt_path={begin_from(folder, config)}"], log_of(sweep, run))
        seconds.append(time.monotonic() - begun)
        waiting.remove(run.name)
        if code == 0 and is_finished(folder, config):
            left = math.fsum(seconds) / len(seconds) * len(waiting)
            more = f", about {duration(left)} of training left" if waiting else ""
            told = f"{_validation_told(folder, config)}{duration(seconds[-1])}{more}"
            print(f"{number.place} {run.name}  {told}", flush=True)
        else:
            _tell_failure(sweep, run, "fit", code)
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
        UserError: a run's config was refused, or the test split has no labels.
    """
    failed = []
    checkpoint = CHECKPOINTS[sweep.score]
    for number in runs:
        run, folder, config = number.run, sweep.root / number.run.name, configs[number.run.name]
        task = task_of(config)
        begun = time.monotonic()
        found, told = tested_score(folder, config, checkpoint, task), "tested earlier"
        if found is None:
            code = launch(["test", *run.arguments, f"--ckpt_path={checkpoint}"], log_of(sweep, run))
            if code != 0:
                _tell_failure(sweep, run, "test", code)
                failed.append(run.name)
                continue
            found, told = tested_score(folder, config, checkpoint, task), duration(time.monotonic() - begun)
        if found is None:
            raise UserError(
                f"`test` of {folder} gave no test/{task.score}: the data have no labels there; compare on the "
                "validation split instead, with --split val"
            )
        print(f"{number.place} {run.name}  test/{task.score} {found * task.score_unit:.2f}  {told}", flush=True)
    return failed


def log_of(sweep: Sweep, run: Run) -> Path:
    """The file that has all that a run's processes have printed."""
    return sweep.root / f"{run.name}.log"


def state_of(folder: Path, config: Config) -> str:
    """How far a run is, in words."""
    if is_finished(folder, config):
        return "finished"
    step = run_directory.last_step(folder)
    return f"at step {step:,}" if step > 0 else "not begun"


def duration(seconds: float) -> str:
    """Seconds in the largest two units that fit, such as "2 min 10 s"."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _validation_told(folder: Path, config: Config) -> str:
    task = task_of(config)
    value = results_of(folder).get("metrics", {}).get(f"val/{task.score}")
    return "" if value is None else f"val/{task.score} {value * task.score_unit:.2f}  "


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


def _tell_failure(sweep: Sweep, run: Run, verb: str, code: int) -> None:
    """Say how a child failed.

    Raises:
        UserError: its config was refused, as those of all others would be.
    """
    log = log_of(sweep, run)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
    if code == 2:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(f"`{verb}` of {run.name}: {errors[-1] if errors else 'refused'} (all it printed: {log})")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    if code == 0:
        how = "ended before its last step"
    print(f"{run.name} failed: `{verb}`, {how}; the end of {log}:", file=sys.stderr)
    print("\n".join(f"    {line}" for line in lines[-15:]), file=sys.stderr, flush=True)


# As a SLURM array


def slurm_script(arguments: Sequence[str], *, root: Path, n_runs: int, folder: Path) -> str:
    """A shell script that submits a sweep: an array of one task per run, and a job that scores when all have ended.

    Args:
        arguments: of `sweep`, without ``--slurm``.
        root: the folder of all runs.
        n_runs: how many there are.
        folder: the working directory of the jobs.
    """
    sweep = shlex.join([sys.executable, "-m", "mhe_lightning", "sweep", *arguments])
    logs = (folder / root).resolve()
    name = re.sub(r"[^\w.-]+", "_", root.name) or "sweep"
    return f"""\
#!/bin/bash
# Submits the sweep: {n_runs} runs, a task each, and a job that scores them. Run it with bash.
# Submitted again after a failure, it goes on where the runs are.
set -euo pipefail
cd {shlex.quote(str(folder))}
mkdir -p {shlex.quote(str(logs))}

# What each task gets. Change it to fit, such as with --gres=gpu:1 or --partition=...
resources=(--nodes=1 --ntasks=1 --cpus-per-task=4 --mem=16G --time=24:00:00)

# The signal comes before the time is over, so that the last step is saved.
fits=$(sbatch --parsable "${{resources[@]}}" --job-name={name} --array=1-{n_runs} \\
    --requeue --signal=B:TERM@120 --output={shlex.quote(str(logs / "slurm-%A_%a.out"))} <<'END'
#!/bin/bash
exec {sweep} --task "$SLURM_ARRAY_TASK_ID"
END
)

sbatch "${{resources[@]}}" --job-name={name}-score --dependency="afterok:${{fits%%;*}}" --kill-on-invalid-dep=yes \\
    --requeue --signal=B:TERM@120 --output={shlex.quote(str(logs / "slurm-%j.out"))} <<'END'
#!/bin/bash
exec {sweep}
END
"""
