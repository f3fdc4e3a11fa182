"""The resolved configs of runs: which a sweep accepts, and where two of them mean different trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mhe_lightning import run as run_directory
from mhe_lightning.callbacks.run_record import CONFIG
from mhe_lightning.checkpoint import checkpoints_in
from mhe_lightning.experiment import Experiments, class_of
from mhe_lightning.sweep.runs import Sweep
from mhe_lightning.tasks import Task

Config = dict[str, Any]


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
    task: type[Task] = class_of(config["model"]["class_path"])
    return task


def config_differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Where two configs mean different trainings, as (dotted key, old, new): names and places do not matter."""
    return run_directory.differences(_training_part(old, new), _training_part(new, old))


def _training_part(config: Config, other: Config) -> Config:
    ignored = ("name", "ckpt_path", "weights_only", "config", "verbose", *run_directory.OBSERVING)
    config = {k: v for k, v in config.items() if k not in ignored}
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k != "default_root_dir"}
    return {**config, "data": data_part(config["data"], other["data"])}


def data_part(data: Config, other: Config) -> Config:
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
        raise ValueError(f"{folder} holds another run: {told(found)}; choose another --root, or move it away")


def told(differences: Sequence[tuple[str, Any, Any]]) -> str:
    """The first of them in words."""
    first = "; ".join(f"{key} was {old}, now {new}" for key, old, new in differences[:3])
    return first + (f" (and {len(differences) - 3} more)" if len(differences) > 3 else "")
