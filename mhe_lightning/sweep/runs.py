"""The runs of a sweep: attentions × points of the grid × seeds, each with the arguments of its `fit`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

from mhe_lightning.experiment import Experiments
from mhe_lightning.sizing import Mode, Spend, match
from mhe_lightning.sweep.options import OWN, canonical, passed_options, substituted

CHECKPOINTS = {"last": "auto", "best": "best", "averaged": "averaged"}
"""What `test` can score → its ``--ckpt_path``."""


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
            if option in OWN:
                raise ValueError(f"--{option} is set by the sweep: {OWN[option]}")
        for key in self.grid:
            if canonical(key) in passed:
                raise ValueError(f"{key} is in the grid and given as --{key} too; leave one of them out")

    def all_seeds(self, manifest: Mapping[str, Any] | None) -> list[int]:
        """The seeds in a manifest, followed by those of this sweep that are new."""
        return list(dict.fromkeys([*(manifest["seeds"] if manifest else ()), *self.seeds]))


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
