"""Models that are built without memory and filled later, part by part, with the numbers that they would have had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
DRAWS = (aten.normal_.default, aten.uniform_.default, aten.randn.default, aten.rand.default, aten.normal.float_float)
"""Operators of random numbers that initialisations use; any other one is refused."""

OVERWRITES = (aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar)
"""Operators after which nothing of a tensor is left of what it was."""


class _Step(NamedTuple):
    """An operator that made or changed memory, and the state of the generator before it if it draws."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    generator: Tensor | None
    inputs: dict[int, int]
    """How often each other memory that it reads had been changed."""


class Deferred:
    """What building a model on the meta device would have done to each of its tensors.

    Each of them can be made afterwards, alone: the generator is set to the state that it had. It is also moved on as
    building the model would have, so that what is drawn next is the same too.
    """

    def __init__(self) -> None:
        self._steps: dict[int, list[_Step]] = {}  # of each memory, by the identity of its storage
        self._changes: Counter[int] = Counter()
        self._recorder = _Recorder(self._record)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is done to tensors on the meta device, such as those made under ``torch.device("meta")``."""
        with self._recorder:
            yield

    def materialize(self, module: nn.Module) -> None:
        """Give ``module`` and all within it their numbers on the CPU, in place, where they are on the meta device.

        Parameters that are one stay one, within ``module``. The generator is left as it is.
        """
        state = torch.get_rng_state()
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_meta:
                    if id(parameter) not in made:
                        value = self._value(parameter)
                        made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    part._parameters[name] = made[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = self._value(buffer)
        torch.set_rng_state(state)

    def _record(self, step: _Step) -> None:
        storage = _storage(step.output)
        for other in _others(step):
            step.inputs[other] = self._changes[other]
        self._changes[storage] += 1
        if step.function in OVERWRITES and step.output.numel() * step.output.element_size() == _bytes(step.output):
            self._steps[storage] = self._steps.get(storage, [])[:1]  # what made it
        self._steps.setdefault(storage, []).append(step)

    def _value(self, tensor: Tensor) -> Tensor:
        """What a tensor on the meta device would hold."""
        memories: dict[int, Tensor] = {}
        self._replay(_storage(tensor), memories)
        return _view(memories[_storage(tensor)], tensor).detach().clone()

    def _replay(self, storage: int, memories: dict[int, Tensor]) -> None:
        if storage in memories:
            return
        for step in self._steps[storage]:
            for other, changes in step.inputs.items():
                if self._changes[other] != changes:
                    raise NotImplementedError(f"{step.function} reads a tensor that is changed afterwards; copy it")
                self._replay(other, memories)

            def real(t: Tensor) -> Tensor:
                return _view(memories[_storage(t)], t) if t.is_meta else t

            args, kwargs = tree_map_only(Tensor, real, (step.args, _on_cpu(step.kwargs)))
            if step.generator is not None:
                torch.set_rng_state(step.generator)
            output = step.function(*args, **kwargs)
            if storage not in memories:
                memories[storage] = output


class _Recorder(TorchDispatchMode):
    def __init__(self, record: Callable[[_Step], None]) -> None:
        super().__init__()
        self._record = record
        self._kept: list[Tensor] = []  # else another tensor might get the identity of one that is gone

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if not isinstance(output, Tensor) or not output.is_meta:
            return output
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_meta]
        changes = function._schema.is_mutable
        if not changes and any(_storage(t) == _storage(output) for t in inputs):
            return output  # a view
        generator = None
        if torch.Tag.nondeterministic_seeded in function.tags:
            if function not in DRAWS:
                raise NotImplementedError(f"{function} draws random numbers, which cannot be deferred; add it to DRAWS")
            generator = torch.get_rng_state()
            with torch.device("cpu"):
                drawn = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), args)
                function(*drawn, **_on_cpu(kwargs))  # moves the generator on
        self._kept.append(output)
        self._record(_Step(function, args, kwargs, output, generator, {}))
        return output


def _others(step: _Step) -> set[int]:
    """The memories that a step reads, but for its own."""
    inputs = [t for t in tree_flatten((step.args, step.kwargs))[0] if isinstance(t, Tensor) and t.is_meta]
    return {_storage(t) for t in inputs} - {_storage(step.output)}


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """The part of a memory that ``like`` is of its own."""
    flat = memory.detach().as_strided((_bytes(memory) // memory.element_size(),), (1,), 0)
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())
