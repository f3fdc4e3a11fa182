"""Options of `fit` as texts: which of them a sweep sets itself, and the grid of values that it goes through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

OWN = {
    "name": "runs are named by attention, grid point and seed",
    "seed_everything": "give the seeds with --seeds",
    "ckpt_path": "runs go on from their newest checkpoints by themselves",
    "trainer.default_root_dir": "give the folder of all runs with --root",
    "model.net.attention": "give the attentions with --attentions",
    "model.net.attention.class_path": "give the attentions with --attentions",
}
"""Options of `fit` that a sweep sets → what to do instead."""


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
        if canonical(key) in OWN:
            raise ValueError(f"grid {key} is set by the sweep: {OWN[canonical(key)]}")
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
    meant = parsed(value.strip())
    return repr(meant) if isinstance(meant, (int, float)) and not isinstance(meant, bool) else value.strip()


def parsed(value: str) -> Any:
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
