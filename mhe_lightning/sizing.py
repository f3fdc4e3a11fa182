"""Sizes at which variants cost the same: what a lean attention saves goes to width, feed-forward layers or depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from jsonargparse import Namespace

from mhe_lightning.experiment import Experiments
from mhe_lightning.planning import Experiment

Mode = Literal["equal_architecture", "equal_parameters", "equal_flops"]
Spend = Literal["feed_forward", "width", "depth"]

TOLERANCE = 0.005
"""By how much a variant may differ from the reference, as a share."""

OPTION = "model.net"


def match(
    experiments: Experiments,
    arguments: Sequence[str],
    overlay: Path,
    *,
    reference: Path,
    mode: Mode,
    spend: Spend = "feed_forward",
    vocab_size: int | None = None,
) -> dict[str, int]:
    """The sizes at which a variant equals the reference.

    Args:
        experiments: reads configs.
        arguments: the experiment's, as `fit` takes them.
        overlay: the variant's attention, a YAML file.
        reference: that of the variant to be equal to.
        mode: "equal_architecture" changes nothing. "equal_parameters": parameters of the whole net, embeddings
            included. "equal_flops": operations of a training step, hence, at one token budget, of the whole training.
        spend: what grows. "width" and "depth" take whole units, the number of heads or a layer, as many as do not
            exceed the reference; the feed-forward layers take the rest.
        vocab_size: tokens of the vocabulary, if not as the config says.

    Returns:
        Option → value, such as ``{"model.net.ff_width": 560}``; empty if nothing changes.

    Raises:
        ValueError: an unknown mode, a net without these sizes, or no sizes within 0.5 % of the reference.
    """
    for name, value, known in (("mode", mode, get_args(Mode)), ("spend", spend, get_args(Spend))):
        if value not in known:
            raise ValueError(f"{name} ({value!r}) must be one of {', '.join(known)}")
    if mode == "equal_architecture" or overlay == reference:
        return {}

    def experiment(path: Path) -> Experiment:
        config = experiments.parse([*arguments, f"--{OPTION}.attention={path}"])
        return Experiment(config, vocab_size, world_size=1)

    measure: Callable[[Experiment], int] = Experiment.net_parameters if mode == "equal_parameters" else _training_flops
    target = measure(experiment(reference))
    variant = experiment(overlay)
    net = variant.net_settings
    if "ff_width" not in net or "width" not in net:
        raise ValueError(f"{variant.config.model.init_args.net.class_path} has no width and ff_width to spend on")
    sizes = _Sizes(variant, measure)
    if spend == "width":
        sizes.grow("width", net.n_heads, target)
    elif spend == "depth":
        sizes.grow("n_layers", 1, target)
    reached = sizes.fill(target)
    if abs(reached / target - 1) > TOLERANCE:
        raise ValueError(
            f"{overlay.stem}: no {spend} comes within {TOLERANCE:.1%} of the {target:,} of {reference.stem}; the "
            f"nearest is {reached:,}; spend on another part"
        )
    return {f"{OPTION}.{name}": value for name, value in sizes.changed.items()}


class _Sizes:
    """Changes the sizes of an experiment's net.

    Args:
        experiment: whose net it is; changed in place.
        measure: what is to be equal, in whole numbers.
    """

    def __init__(self, experiment: Experiment, measure: Callable[[Experiment], int]) -> None:
        self.experiment = experiment
        self.net: Namespace = experiment.net_settings
        self.measure = measure
        self.changed: dict[str, int] = {}

    def grow(self, name: str, unit: int, target: int) -> None:
        """Add as many units as the target allows."""
        base = self.net[name]
        fits, units = 0, 1
        while self._with(name, base + units * unit) <= target:  # doubling, then halving the gap
            fits, units = units, 2 * units
        while units - fits > 1:
            middle = (fits + units) // 2
            if self._with(name, base + middle * unit) <= target:
                fits = middle
            else:
                units = middle
        self._with(name, base + fits * unit)
        if fits:
            self.changed[name] = base + fits * unit

    def fill(self, target: int) -> int:
        """Set the feed-forward width, in which everything grows linearly, as near to the target as it comes."""
        base = self.net.ff_width or 4 * self.net.width
        first = self._with("ff_width", base)
        slope = self._with("ff_width", base + 1) - first
        width = max(1, base + round((target - first) / slope))
        if width != base:
            self.changed["ff_width"] = width
        return self._with("ff_width", width)

    def _with(self, name: str, value: int) -> int:
        self.net[name] = value
        return self.measure(self.experiment)


def _training_flops(experiment: Experiment) -> int:
    return experiment.flops().training
