"""What an experiment will cost, before anything is trained: no data, no GPU, no memory for the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from tokenizers import Tokenizer, models

from mhe_lightning import run
from mhe_lightning.accounting import CacheSize, Count, cache_size, count_parameters
from mhe_lightning.checkpoint import run_of
from mhe_lightning.communication import (
    Collective,
    Exchanged,
    Layout,
    can_split,
    collectives,
    padded,
    parameter_groups,
    split_shapes,
)
from mhe_lightning.data import ExactDataModule
from mhe_lightning.data.tokenizer import load_tokenizer, vocabulary_size
from mhe_lightning.experiment import LINKED, attribute, class_of
from mhe_lightning.parsing import Parser, data_module
from mhe_lightning.scaling import Cluster, StepTime, step_time
from mhe_lightning.tasks import Task
from mhe_lightning.tracing import Counts, Flops, Step, StepMemory, of_depth, tokens_in

SHARDED = ("fsdp", "model_parallel", "modelparallel", "sharded")
"""Parts of the names of strategies that shard weights, gradients and optimizer."""

FLOPS_DEPTHS = (2, 3)
"""Layers of the nets from which a deeper one's operations follow; the last block may do less than the others."""

MEMORY_DEPTHS = (5, 6)
"""Likewise for memory: deep enough that the ends of the backward pass lie in different halves of it."""

ADAMW_STATES = 2
"""Numbers that the optimizer keeps of each parameter: the means of its gradient and of its square."""


@dataclass(frozen=True)
class Precision:
    """What numbers are stored in.

    Args:
        weights: dtype of weights, gradients and the optimizer's state.
        autocast: dtype of most operations in mixed precision; None for none.
    """

    weights: torch.dtype
    autocast: torch.dtype | None

    @property
    def computing(self) -> torch.dtype:
        """What most operations are in, and what a sharded model is gathered in."""
        return self.autocast or self.weights


PRECISIONS = {
    "32-true": Precision(torch.float32, None),
    "bf16-mixed": Precision(torch.float32, torch.bfloat16),
    "bf16-true": Precision(torch.bfloat16, None),
    "64-true": Precision(torch.float64, None),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""What a KV cache may be stored in."""

ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs at its height, on one rank.

    Args:
        weights: this rank's.
        gradients: this rank's.
        optimizer: this rank's.
        activations: what is kept for the backward pass, and what is needed for a moment.
        communication: buckets of distributed data parallelism, or the gathered blocks of a sharded model.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication


@dataclass(frozen=True)
class Share:
    """What one of the processes of a layout has of an optimizer step.

    Args:
        layout: how the processes are arranged.
        memory: at its height.
        flops: of a micro-batch.
        needed_flops: a fair share of a micro-batch's, where nothing is computed twice.
        collectives: of the whole step.
        tokens: of a micro-batch.
        micro_batches: of the step.
    """

    layout: Layout
    memory: Memory
    flops: Flops
    needed_flops: float
    collectives: Sequence[Collective]
    tokens: int
    micro_batches: int

    @property
    def sent(self) -> float:
        """Bytes that the process sends, and receives as many."""
        return sum(collective.sent(self.layout) for collective in self.collectives)

    def time(self, cluster: Cluster, rate: float) -> StepTime:
        """How long the step takes on a cluster, at a rate of matrix operations per second and process."""
        return step_time(
            cluster,
            self.layout,
            self.collectives,
            rate=rate,
            forward_flops=self.flops.forward,
            training_flops=self.flops.training,
            needed_flops=self.needed_flops,
            tokens=self.tokens,
            micro_batches=self.micro_batches,
        )


@dataclass(frozen=True)
class Cost:
    """What one variant costs.

    Args:
        name: of the attention.
        sizes: what was changed to make variants equal, option → value.
        counts: parameters by part.
        cache: numbers in the KV caches; None for an encoder.
        tokens_per_step: of a micro-batch of one rank, padding and the source's side included.
        flops: of a micro-batch of one rank, or of the ranks that share it; None if they were not asked for.
        share: what one rank has of a step; likewise.
        scaled: what it would have in other layouts, by their names; None where the net cannot be laid out so.
    """

    name: str
    sizes: Mapping[str, int]
    counts: Mapping[str, Count]
    cache: CacheSize | None
    tokens_per_step: int
    flops: Flops | None
    share: Share | None
    scaled: Mapping[str, Share | None] = field(default_factory=dict)

    @property
    def memory(self) -> Memory | None:
        """Of one rank."""
        return None if self.share is None else self.share.memory

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(count.total for count in self.counts.values())

    @property
    def without_embeddings(self) -> int:
        """All parameters but the embeddings'."""
        return self.total - self.counts["embeddings"].total

    @property
    def attention_weights(self) -> int:
        """Of all attention sublayers with their output projections, without biases."""
        return self.counts["attention_qkv"].weights + self.counts["attention_output"].weights

    @property
    def attention_biases(self) -> int:
        return self.counts["attention_qkv"].biases + self.counts["attention_output"].biases

    @property
    def forward_flops(self) -> float | None:
        """Per token."""
        return None if self.flops is None else self.flops.forward / self.tokens_per_step

    @property
    def training_flops(self) -> float | None:
        """Per token."""
        return None if self.flops is None else self.flops.training / self.tokens_per_step


@dataclass(frozen=True)
class Schedule:
    """What all variants of an experiment have in common.

    Args:
        length: tokens of a row.
        steps: optimizer steps.
        tokens: over the whole training and all ranks, where every batch is full.
        vocab_size: tokens of the vocabulary.
        world_size: processes.
        strategy: of the trainer.
        precision: of the trainer.
        cache_dtype: of keys and values in decoding, which this library does in the weights' dtype.
        checkpointing: whether blocks are computed again in the backward pass.
        translates: whether there is a source beside the target.
        on_gpu: whether attention dropout is part of the attention kernel.
        layout: how the processes are arranged.
    """

    length: int
    steps: int
    tokens: int
    vocab_size: int
    world_size: int
    strategy: str
    precision: str
    cache_dtype: torch.dtype
    checkpointing: bool
    translates: bool
    on_gpu: bool
    layout: Layout

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **vars(self),
            "cache_dtype": str(self.cache_dtype).removeprefix("torch."),
            "layout": vars(self.layout),
        }


class Experiment:
    """A parsed experiment, ready to be counted.

    Args:
        config: what `Experiments.parse` gave.
        vocab_size: tokens of the vocabulary; that which the config states if not given.
        world_size: number of processes; the config's devices × nodes if not given.

    Raises:
        ValueError: the vocabulary's size is not known, or a setting is refused.
    """

    def __init__(self, config: Namespace, vocab_size: int | None = None, world_size: int | None = None) -> None:
        self.config = config
        data = data_module(config.data)
        if not isinstance(data, ExactDataModule):
            raise ValueError(f"{type(data).__name__} is not one of this library's data modules, which can be planned")
        self.data = data
        self.vocab_size = vocab_size or self._known_vocab_size()
        self.precision = precision_of(config.trainer.precision)
        self.world_size = world_size or processes_of(config.trainer)
        self.strategy = _strategy_name(config.trainer.strategy)
        self.layout = layout_of(config.trainer.strategy, self.world_size)
        self._bucket_view = bool(_settings(config.trainer.strategy).get("gradient_as_bucket_view"))
        spec = config.model.clone()
        spec.init_args.net.init_args.vocab_size = self.vocab_size
        spec.init_args.max_steps = max(1, config.trainer.max_steps)
        known: dict[str, Any] = {"tokenizer": Tokenizer(models.BPE()), "end_token": 0}
        takes = inspect.signature(class_of(spec.class_path)).parameters
        for name in LINKED:
            if name in takes:
                spec.init_args[name] = known[name] if name in known else attribute(data, name)
        self._spec = spec
        self._parser = Parser()
        self._parser.add_subclass_arguments(Task, "model")

    def make_task(self, n_layers: int | None = None) -> Task:
        """The experiment's task, with another number of layers if one is given."""
        spec = self._spec.clone()
        if n_layers is not None:
            spec.init_args.net.init_args.n_layers = n_layers
        task: Task = self._parser.instantiate(Namespace(model=spec)).model
        return task

    def _known_vocab_size(self) -> int:
        size = self.data.expected_vocab_size
        begins_with = self.config.get("init_from")
        if size is None and begins_with:
            tokenizer = run_of(Path(begins_with))[0] / run.TOKENIZER
            size = vocabulary_size(load_tokenizer(tokenizer))
        if size is None:
            raise ValueError(
                "the size of the vocabulary is not known, since data.tokenizer is not set; give --vocab_size, such as "
                "30522, or the pretrained model, --init_from"
            )
        return size

    @property
    def on_gpu(self) -> bool:
        """Whether training is meant for a GPU: configs for a CPU say so."""
        return str(self.config.trainer.accelerator) != "cpu"

    @property
    def net_settings(self) -> Namespace:
        """The net's arguments, which may be changed."""
        settings: Namespace = self._spec.init_args.net.init_args
        return settings

    def net_parameters(self) -> int:
        """Parameters of the net, without the task's head."""
        return sum(parameter.numel() for parameter in self.empty_task().net.parameters())

    def empty_task(self) -> Task:
        """The task without memory for its weights."""
        with torch.device("meta"):
            return self.make_task()

    def flops(self) -> Flops:
        """Operations of a micro-batch of one rank."""
        return self._of_depth(self._step(), FLOPS_DEPTHS, Step.flops)

    def schedule(self) -> Schedule:
        """What holds whatever the attention."""
        trainer = self.config.trainer
        batch = self._step().batch
        tokens = (
            tokens_in(batch) * self.layout.data_parallel * trainer.accumulate_grad_batches * max(0, trainer.max_steps)
        )
        return Schedule(
            length=batch["tokens"].shape[1],
            steps=trainer.max_steps,
            tokens=tokens,
            vocab_size=self.vocab_size,
            world_size=self.world_size,
            strategy=self.strategy,
            precision=ALIASES.get(str(trainer.precision), str(trainer.precision)),
            cache_dtype=self.precision.weights,
            checkpointing=bool(self._spec.init_args.get("activation_checkpointing")),
            translates="target_tokens" in batch,
            on_gpu=self.on_gpu,
            layout=self.layout,
        )

    def cost(
        self, name: str, sizes: Mapping[str, int], *, trace: bool = True, layouts: Mapping[str, Layout] | None = None
    ) -> Cost:
        """Count everything; with ``trace`` also operations, memory and what is sent, which takes a second or more.

        Args:
            name: of the attention.
            sizes: what was changed for it, to record.
            trace: whether to follow a step.
            layouts: further ones to count for, by names; each rank has the micro-batch that it has in the config's, and
                gradients are views of their buckets, as in configs/strategy/ddp.yaml.

        Raises:
            ValueError: the net cannot be laid out as the config says.
        """
        task = self.empty_task()
        counts = count_parameters(task)
        tokens = tokens_in(self._step().batch)
        cached = cache_size(task.net)
        if not trace:
            return Cost(name, sizes, counts, cached, tokens, None, None)
        followed = _Followed(self)
        share = self._share(task, self.layout, followed)
        scaled = {
            key: self._share(task, layout, followed) if can_split(task, layout.parts) else None
            for key, layout in (layouts or {}).items()
        }
        return Cost(name, sizes, counts, cached, tokens, followed.flops(1), share, scaled)

    def _share(self, task: Task, layout: Layout, followed: _Followed) -> Share:
        micro_batches = self.config.trainer.accumulate_grad_batches
        found = collectives(
            task,
            layout,
            gathered=self.precision.computing,
            reduced=self.precision.weights,
            micro_batches=micro_batches,
            exchanged=followed.exchanged() if layout.parts > 1 else None,
        )
        memory = self._memory(task, layout, followed)
        tokens = tokens_in(self._step().batch)
        needed = followed.flops(1).training / layout.parts
        return Share(layout, memory, followed.flops(layout.parts), needed, found, tokens, micro_batches)

    def _step(self) -> Step:
        return Step(
            self.make_task,
            self.data.largest_batch(self.layout.data_parallel),
            dtype=self.precision.weights,
            autocast=self.precision.autocast,
            as_on_gpu=self.on_gpu,
        )

    def _of_depth(self, step: Step, depths: tuple[int, int], count: Callable[[Step], Counts]) -> Counts:
        """Count a step, of a deep net from two shallow ones."""
        net = self.net_settings
        if net.get("n_layers") is None or net.get("n_decoder_layers") is not None:
            return count(step)
        return of_depth(
            net.n_layers, depths, lambda depth: count(replace(step, make_task=partial(self.make_task, depth)))
        )

    def _memory(self, task: Task, layout: Layout, followed: _Followed) -> Memory:
        size = self.precision.weights.itemsize
        shapes = split_shapes(task, layout.parts)
        weights = padded(task.parameters(), layout, shapes) // layout.shards * size
        gradients = padded((p for p in task.parameters() if p.requires_grad), layout, shapes) // layout.shards * size
        # gradients are counted apart from what a micro-batch needs, if they are sharded or kept from the one before
        accumulating = layout.sharded or self.config.trainer.accumulate_grad_batches > 1
        step = followed.memory(layout.parts, layout.sharded, accumulating)
        activations = step.peak
        if not accumulating:
            # Lightning drops the last step's gradients after the forward pass; those of this one come in the backward
            activations = max(step.forward, step.early - gradients, step.late - gradients)
        communication = 0
        if layout.shards > 1:
            *sizes, root = (padded(group, layout, shapes) for group in parameter_groups(task))
            gathered = self.precision.computing.itemsize
            # embeddings and heads, for the whole step; the block that is computed and the next one, which is fetched
            # meanwhile; and the largest gradient
            communication = (root + 2 * max(sizes, default=0)) * gathered + max(root, *sizes) * size
        elif layout.replicas > 1 and layout is self.layout and not self._bucket_view:
            communication = gradients  # the buckets are a copy of them
        return Memory(weights, gradients, ADAMW_STATES * gradients, activations, communication)


class _Followed:
    """Steps of an experiment that have been followed, each once.

    Args:
        experiment: whose steps; its net is not changed meanwhile.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._step = experiment._step()
        self._of_gathered = replace(self._step, dtype=experiment.precision.computing)
        self._of_depth = experiment._of_depth
        self.flops = cache(self._flops)
        self.memory = cache(self._memory)
        self.exchanged = cache(self._exchanged)

    def _flops(self, parts: int) -> Flops:
        return self._of_depth(replace(self._step, parts=parts), FLOPS_DEPTHS, Step.flops)

    def _memory(self, parts: int, sharded: bool, accumulating: bool) -> StepMemory:
        step = replace(self._of_gathered if sharded else self._step, parts=parts, accumulating=accumulating)
        return self._of_depth(step, MEMORY_DEPTHS, Step.memory)

    def _exchanged(self) -> Exchanged:
        return self._of_depth(self._of_gathered, FLOPS_DEPTHS, Step.exchanged)


def precision_of(precision: object) -> Precision:
    """What ``trainer.precision`` stores numbers in.

    Raises:
        ValueError: it is not one that is trained in here.
    """
    name = ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision ({precision}) must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def processes_of(trainer: Namespace) -> int:
    """Processes that a trainer's config asks for; one where it leaves that to the machine."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices) * int(trainer.num_nodes)
    return 1


def layout_of(strategy: Any, world_size: int) -> Layout:
    """How a trainer's strategy arranges ``world_size`` processes; those that shard have ``sharded`` set.

    Raises:
        ValueError: they cannot be arranged as the strategy asks.
    """
    if world_size == 1 or not any(name in _strategy_name(strategy) for name in SHARDED):
        return Layout(world_size)
    settings = _settings(strategy)
    parts = settings.get("tensor_parallel", settings.get("tensor_parallel_size"))
    return Layout.of_shards(world_size, settings.get("shard"), parts if isinstance(parts, int) else 1)


def _settings(strategy: Any) -> Namespace:
    """Arguments of a strategy, those that a config gives."""
    return (strategy.get("init_args") if isinstance(strategy, Namespace) else None) or Namespace()


def _strategy_name(strategy: Any) -> str:
    return str(strategy.class_path if isinstance(strategy, Namespace) else strategy).lower()
