"""How another library's tensors become a task's: a table of names, shapes and re-arrangements, applied in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhe_lightning.attention.base import check_divides

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Name of an activation there → the same function's name here."""

LARGEST = 2**31 - 1
MOST_LAYERS = 1000
"""What no model has; a larger number is an error in the file."""

SHOWN = 3
"""How many of several wrong names a message gives."""


class Options:
    """The options of a config.json, with the defaults of its model's class; what does not fit is refused.

    Args:
        given: what config.json says.
        defaults: of the options that are asked for, those of the class.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._options = {**defaults, **given}

    def get(self, name: str) -> Any:
        """An option that may be missing: None then."""
        return self._options.get(name)

    def __getitem__(self, name: str) -> Any:
        return self._options[name]

    def size(self, name: str, most: int = LARGEST) -> int:
        """An option that is a number of things, ``most`` at most."""
        value = self._options[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(
                f"config.json: {name} ({value!r}) must be a whole number from 1 to {most}; the file is damaged"
            )
        return value

    def layers(self, name: str) -> int:
        """An option that is a number of layers, for each of which tensors will be looked for."""
        return self.size(name, MOST_LAYERS)

    def flag(self, name: str) -> bool:
        """An option that is true or false."""
        value = self._options[name]
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} ({value!r}) must be true or false; the file is damaged")
        return value

    def number(self, name: str) -> float:
        """An option that is a positive number or 0."""
        value = self._options[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"config.json: {name} ({value!r}) must be a number from 0; the file is damaged")
        return float(value)

    def dropout(self, name: str) -> float:
        """An option that is a probability of dropping a number."""
        value = self.number(name)
        if value >= 1:
            raise ValueError(f"config.json: {name} ({value}) must be in [0, 1); the file is damaged")
        return value

    def heads(self, name: str, width: str) -> int:
        """An option that is a number of heads, which must divide the option ``width``."""
        check_divides(f"config.json: {name}", self.size(name), width, self.size(width))
        return self.size(name)

    def activation(self, name: str) -> str:
        """An option that names an activation, by its name here."""
        value = self._options[name]
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(
                f"config.json: {name} ({value!r}) has no counterpart here; those of {', '.join(ACTIVATIONS)} have one"
            )
        return ACTIVATIONS[value]

    def require(self, name: str, *accepted: Any, why: str) -> None:
        """Refuse an option of any other value than ``accepted``; ``why`` says what the model here does."""
        value = self._options.get(name, accepted[0])
        if value not in accepted:
            raise ValueError(f"config.json: {name} ({value!r}) cannot be imported: {why}")


class Row(NamedTuple):
    """A tensor there, and what is made of it here.

    Args:
        source: its name, without the prefix of the net.
        shape: which it must have.
        targets: names here; several for one tensor that is tied, or split.
        rearrange: gives a tensor for all targets, or one for each, without computing anything.
        optional: whether a checkpoint may lack it.
    """

    source: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    rearrange: Callable[[Tensor], Tensor | Sequence[Tensor]] = lambda tensor: tensor
    optional: bool = False


@dataclass(frozen=True)
class Plan:
    """What a checkpoint of one architecture becomes.

    Args:
        architecture: the class there.
        task: name of the task here.
        settings: of the task, besides its net.
        net: name of the net's class here.
        arguments: of the net, without its vocabulary and attention; defaults may be left out.
        attention_dropout: of its attention.
        prefix: of the net's tensors, which a checkpoint of the net alone lacks.
        rows: what is taken.
        left: patterns of tensors that a checkpoint may have besides and that are left out, → why.
        copies: tensors that a checkpoint may have besides, or instead, and that equal another, → its name.
        renamed: pattern → replacement, of names that older versions wrote.
        notes: what else the user should know.
    """

    architecture: str
    task: str
    net: str
    arguments: Mapping[str, Any]
    attention_dropout: float
    prefix: str
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def linear_rows(there: str, here: str, inputs: int, outputs: int) -> list[Row]:
    """Weight and bias of a linear layer that is stored as here."""
    return [
        Row(f"{there}.weight", (outputs, inputs), (f"{here}.weight",)),
        Row(f"{there}.bias", (outputs,), (f"{here}.bias",)),
    ]


def norm_rows(there: str, here: str, width: int) -> list[Row]:
    """Weight and bias of a layer norm."""
    return [Row(f"{there}.{kind}", (width,), (f"{here}.{kind}",)) for kind in ("weight", "bias")]


def rearranged(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of the task here, in float32, from the tensors of a checkpoint.

    float32, bfloat16 and float16 become float32 without a change of any number.

    Returns:
        The state, in which tied parameters share memory; the names that were left out, → why.

    Raises:
        ValueError: a tensor is missing, not expected, of another shape or no floating-point numbers.
    """
    names = _canonical(plan, tensors)
    _check_names(plan, names)
    state: dict[str, Tensor] = {}
    for row in plan.rows:
        if row.optional and row.source not in names:
            continue
        tensor = tensors[names[row.source]]
        if tuple(tensor.shape) != row.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{names[row.source]} is {tuple(tensor.shape)} of {_dtype(tensor)}; config.json makes it {row.shape} "
                "of floating-point numbers: they are not of one checkpoint"
            )
        pieces = row.rearrange(tensor.to(torch.float32))
        if isinstance(pieces, Tensor):
            # of its own memory, once: what is tied here is one parameter
            state.update(dict.fromkeys(row.targets, _own(pieces)))
        else:
            state.update(zip(row.targets, map(_own, pieces), strict=True))
    for copy, original in plan.copies.items():
        if copy in names and not torch.equal(tensors[names[copy]], tensors[names[original]]):
            raise ValueError(
                f"{names[copy]} differs from {names[original]}, but config.json makes them one parameter, as it is here"
            )
    left = {names[name]: why for name in sorted(names) for pattern, why in plan.left.items() if _is(name, pattern)}
    return state, left


def _canonical(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A tensor's name without prefix and as today's version writes it → its name in the checkpoint."""
    names: dict[str, str] = {}
    for given in tensors:
        name = given.removeprefix(plan.prefix)
        for pattern, replacement in plan.renamed.items():
            name = re.sub(pattern, replacement, name)
        if name in names:
            raise ValueError(f"the checkpoint has both {names[name]} and {given}, which are one tensor; remove one")
        names[name] = given
    for copy, original in plan.copies.items():
        if copy in names and original not in names:
            names[original] = names.pop(copy)
    return names


def _check_names(plan: Plan, names: Mapping[str, str]) -> None:
    wanted = {row.source for row in plan.rows}
    missing = [f"{row.source} {row.shape}" for row in plan.rows if row.source not in names and not row.optional]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {_some(missing)}, which config.json asks for; it is incomplete, or not of the class "
            f"{plan.architecture}"
        )
    known = (*plan.left, *map(re.escape, plan.copies))
    unexpected = [
        given
        for name, given in names.items()
        if name not in wanted and not any(_is(name, pattern) for pattern in known)
    ]
    if unexpected:
        raise ValueError(
            f"the checkpoint has {_some(unexpected)}, which {plan.architecture} of config.json has no place for; "
            "they are not of one checkpoint"
        )


def _is(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, name) is not None


def _own(tensor: Tensor) -> Tensor:
    """In memory of its own, without what it was cut from."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
