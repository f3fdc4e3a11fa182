"""What a training step needs, found by going through it without numbers: tensors have shapes but no memory.

The step is the task's own, so an attention, a net or a task of a user's own is counted as well as any of ours.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from mhe_lightning.attention import Attention
from mhe_lightning.communication import (
    Exchanged,
    has_one_head,
    shared_projections,
    split_projections,
    split_shapes,
    splits_context,
)
from mhe_lightning.models.layers import FeedForward
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.tasks import Task

Batch = dict[str, Any]


class Flops(NamedTuple):
    """Floating-point operations of the matrix products, two for each multiply–add (`count_flops`)."""

    forward: int
    """Of a forward pass with its logits."""

    training: int
    """Of a whole step: forward, recomputation, backward."""


class StepMemory(NamedTuple):
    """Bytes of a step, without weights and the optimizer's state."""

    kept: int
    """What the forward pass leaves for the backward pass."""

    forward: int
    """The highest sum in the forward pass of what is kept and what is needed for a moment."""

    early: int
    """The highest in the first half of the backward pass's operations, gradients included: near the last block."""

    late: int
    """The highest in the second half: near the first block, when most gradients are there."""

    @property
    def peak(self) -> int:
        """The highest of all."""
        return max(self.forward, self.early, self.late)


@dataclass(frozen=True)
class Step:
    """A micro-batch's forward and backward pass on one rank.

    Args:
        make_task: builds the task; it is built without memory.
        batch: a training batch of the shape to plan for. Where its ``targets`` are -100 nothing is predicted.
        dtype: of the weights.
        autocast: dtype of mixed precision, such as ``torch.bfloat16``; None for none.
        as_on_gpu: take attention dropout for part of the attention kernel (a CPU's has none, so that torch keeps all
            attention weights there), and compute norms in float32 in mixed precision.
        accumulating: there are gradients from an earlier micro-batch, to which this one's are added; they are not
            counted then.
        parts: processes that share the heads and feed-forward layers; one of them is followed.
    """

    make_task: Callable[[], Task]
    batch: Batch
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    as_on_gpu: bool = False
    accumulating: bool = False
    parts: int = 1

    def flops(self) -> Flops:
        """Count operations.

        Raises:
            ValueError: the step cannot be followed, since what it does depends on numbers.
        """
        with self._traceable() as (task, loss, n_targets), _Answers(n_targets):
            with count_flops() as forward, torch.no_grad():
                loss()
            task._window.clear()
            with count_flops() as training:
                loss().backward()  # type: ignore[no-untyped-call]
        return Flops(forward.get_total_flops(), training.get_total_flops())

    def forward_flops(self) -> int:
        """Count the operations of a forward pass alone, in a fraction of the time; errors as in `flops`."""
        with self._traceable() as (_, loss, n_targets), _Answers(n_targets), count_flops() as forward, torch.no_grad():
            loss()
        return forward.get_total_flops()

    def memory(self) -> StepMemory:
        """Add up memory; errors as in `flops`."""
        with self._traceable() as (task, loss, n_targets):
            for parameter in task.parameters():
                if self.accumulating and parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            with _Memory(n_targets) as memory:
                result = loss()
                task._window.clear()
                kept, forward = memory.live, memory.take_heights()
                result.backward()  # type: ignore[no-untyped-call]
                backward = memory.take_heights()
        half = len(backward) // 2
        return StepMemory(kept, max(forward), max(backward[:half]), max(backward[half:]))

    def exchanged(self) -> Exchanged:
        """What tensor parallelism would sum; errors as in `flops`."""
        with self._traceable() as (task, loss, n_targets), _Answers(n_targets):
            sums = _PartialSums(task)
            result = loss()
            task._window.clear()
            sums.recomputing = True
            result.backward()  # type: ignore[no-untyped-call]
        return sums.exchanged

    @contextmanager
    def _traceable(self) -> Iterator[tuple[Task, Callable[[], Tensor], int | None]]:
        """The task without memory, a function that makes its loss, and how many targets the batch has."""
        n_targets = int((self.batch["targets"] != IGNORE).sum()) if "targets" in self.batch else None
        with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(self.dtype):
            task = self.make_task().train()
            task.configure_model()
            if self.parts > 1:
                _keep_part(task, self.parts)
            if self.as_on_gpu:
                for module in task.modules():
                    if isinstance(module, Attention):
                        module.compute_as_on_gpu()
                    elif isinstance(module, nn.LayerNorm) and self.autocast is not None:
                        module.register_forward_hook(lambda module, inputs, output: output.float())
            batch = {k: torch.empty_like(v) if isinstance(v, Tensor) else v for k, v in self.batch.items()}

            def loss() -> Tensor:
                with nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast):
                    return task.training_step(batch, 0)  # type: ignore[return-value]

            try:
                yield task, loss, n_targets
            except (RuntimeError, NotImplementedError, TypeError) as error:
                raise ValueError(
                    f"a step of {type(task).__name__} cannot be followed without data: {str(error).splitlines()[0]}; "
                    "its parameters and caches can still be planned (--no_trace)"
                ) from error


def forward_flops_per_token(task: Task, batch: Batch) -> float:
    """Matrix operations of a forward pass with its loss, per token that the net reads; ``task`` stays as it is.

    Args:
        task: before it is laid out for training; it may have no memory.
        batch: one row of the shape to count is enough.

    Raises:
        ValueError: the step cannot be followed, since what it does depends on numbers.
    """
    return Step(partial(_empty_copy, task), batch).forward_flops() / tokens_in(batch)


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Tokens that the net reads, on both sides of a translation."""
    return sum(batch[key].numel() for key in ("tokens", "target_tokens") if key in batch)


def _empty_copy(task: Task) -> Task:
    """A copy whose parameters and buffers are new ones without numbers; in a `FakeTensorMode` without memory, too."""
    empty: dict[int, Any] = {}
    for tensor in (*task.parameters(), *task.buffers()):
        new = torch.empty_like(tensor, device="cpu")
        empty[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    copied: Task = copy.deepcopy(task, empty)
    copied.compile_blocks = False  # what is compiled is the same
    return copied


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


Counts = TypeVar("Counts", Flops, StepMemory, Exchanged)


def of_depth(layers: int, depths: tuple[int, int], count: Callable[[int], Counts]) -> Counts:
    """What is counted of a net with ``layers`` blocks, from two shallow ones: blocks are alike, so each adds the same.

    Args:
        layers: blocks of the net; one that is no deeper than the deeper of ``depths`` is counted itself.
        depths: of the shallow nets.
        count: counts a net of a depth.
    """
    if layers <= depths[1]:
        return count(layers)
    shallow, deep = (count(depth) for depth in depths)
    steps = (layers - depths[1]) / (depths[1] - depths[0])
    return type(deep)(*(round(d + steps * (d - s)) for s, d in zip(shallow, deep, strict=True)))


def count_flops() -> FlopCounterMode:
    """torch's counter of the matrix products' operations, which also counts the CPU's attention kernel.

    By itself it leaves that kernel out. As in the kernels that it counts, a causal mask saves nothing, and the backward
    pass, which computes the scores again, has five products to the forward pass's two.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(
        display=False,
        custom_mapping={
            kernel: lambda q, k, *rest, **more: 2 * _attention_product(q, k),
            backward: lambda grad, q, k, *rest, **more: 5 * _attention_product(q, k),
        },
    )


def _attention_product(q: torch.Size, k: torch.Size) -> int:
    """Operations of Q Kᵀ, and of all products of that size; q (B, n, T, d), k (B, g, S, d)."""
    return 2 * q.numel() * k[2]


class _Answers(TorchDispatchMode):
    """Answers what depends on numbers as a full batch would."""

    def __init__(self, n_targets: int | None) -> None:
        super().__init__()
        self.n_targets = n_targets

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # such as "are all of these targets predicted?"
        if func is torch.ops.aten.nonzero.default and self.n_targets is not None:
            return args[0].new_empty((self.n_targets, args[0].ndim), dtype=torch.long)
        return func(*args, **(kwargs or {}))


class _Memory(_Answers):
    """Adds up the bytes of the tensors that are alive, each storage once."""

    def __init__(self, n_targets: int | None) -> None:
        super().__init__(n_targets)
        self.live = 0
        self._height = 0
        self._heights: list[int] = []
        self._seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument in tree_leaves((args, kwargs)):
            self._know(argument)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        self._heights.append(self._height)
        self._height = self.live
        return found

    def take_heights(self) -> list[int]:
        """The most bytes that were alive at each operation since this was asked last."""
        taken, self._heights = self._heights, []
        return taken

    def _know(self, argument: Any) -> None:
        """What is there before an operation and was made by none: weights and the batch."""
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True

    def _change(self, nbytes: int) -> None:
        self.live += nbytes
        self._height = max(self._height, self.live)


class _PartialSums:
    """Counts what tensor parallelism sums, at the inputs and outputs of the layers that it splits.

    Args:
        task: it is watched from now on.
    """

    def __init__(self, task: Task) -> None:
        self.recomputing = False
        self._sums_again = getattr(task.net, "checkpoint_activations", False) is True  # "selective" keeps sums
        self._found: Counter[str] = Counter()
        for module in task.modules():
            if isinstance(module, FeedForward):
                module.register_forward_pre_hook(lambda module, inputs: self._watch(inputs[0]))
                module.w_2.register_forward_hook(self._output)
            elif isinstance(module, Attention) and not has_one_head(module):
                module.register_forward_pre_hook(self._attention_inputs, with_kwargs=True)
                for projection in shared_projections(module):
                    projection.register_forward_hook(lambda module, inputs, output: self._watch(output))
                module.w_o.register_forward_hook(self._output)

    @property
    def exchanged(self) -> Exchanged:
        return Exchanged(*(self._found[name] for name in Exchanged._fields))

    def _attention_inputs(self, attention: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        x, context = inputs[0], options.get("context")
        if context is None:
            context = x
        parts = [x] if split_projections(attention) else []
        if splits_context(attention) and not any(context is part for part in parts):
            parts.append(context)
        for part in parts:
            self._watch(part)

    def _output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not self.recomputing:
            self._count("forward", output)
        elif self._sums_again:
            self._count("recomputed", output)

    def _watch(self, tensor: Tensor) -> None:
        """Count the gradient of ``tensor``, of which each process has a part; a recomputed one has none."""
        if tensor.requires_grad and not self.recomputing:
            tensor.register_hook(lambda gradient: self._count("backward", gradient))

    def _count(self, name: str, tensor: Tensor) -> None:
        self._found[name] += tensor.nbytes
        self._found[f"{name}_calls"] += 1


def _keep_part(task: Task, parts: int) -> None:
    """Leave of the heads and feed-forward layers what one of ``parts`` tensor-parallel processes computes, in place."""
    shapes = split_shapes(task, parts)
    for module in list(task.modules()):
        if isinstance(module, Attention) and not has_one_head(module):
            _keep_heads(module, module.n_heads // parts)
    for module in task.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shapes:
                own = nn.Parameter(parameter.new_empty(shapes[id(parameter)]), requires_grad=parameter.requires_grad)
                setattr(module, name, own)


def _keep_heads(attention: Attention, n_heads: int) -> None:
    """Store no more heads of keys and values than there are queries; projections that are split have no others."""
    key_value = attention.key_value
    attention.key_value = lambda context: tuple(s[:, :n_heads] for s in key_value(context))  # type: ignore[method-assign]
