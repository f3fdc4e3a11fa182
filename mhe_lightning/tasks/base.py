"""What every task shares: the optimizer, its schedule, and losses normalised by the targets of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from mhe_lightning.deferred import Deferred
from mhe_lightning.distributed import (
    TENSOR_PARALLEL,
    ActivationCheckpointing,
    all_reduce_sum,
    gather,
    own_part,
    parallelize,
    release,
    total_norm,
)

Schedule = Literal["cosine", "linear", "inverse_sqrt", "constant"]

StepCheck = Callable[[Tensor, "Tensor | None"], None]
"""Takes a step's mean loss over all ranks and, where gradients are clipped by it, the norm they had: scalars."""


class Task(LightningModule):
    """An objective over a net, trained with AdamW.

    The gradient of an optimizer step is that of the loss summed over all targets of the global batch, divided by their
    number, whatever they are split into: k micro-batches of b rows, on any number of ranks, give what one of k·b gives.

    Weight decay falls on the weight matrices of linear layers only, never on biases, norms, embeddings (so neither on
    an output projection tied to one) or head embeddings, which decay would pull towards a single head.

    Args:
        net: the model.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        lr: peak learning rate.
        schedule: how the learning rate falls after the warm-up: "cosine" or "linear" to ``final_lr_ratio`` at
            ``max_steps``, "inverse_sqrt" (1/√step), or "constant".
        warmup_steps: steps over which the learning rate rises linearly from 0; a number below 1 is a share of
            ``max_steps``.
        final_lr_ratio: the last learning rate as a fraction of ``lr`` (cosine and linear).
        betas: AdamW's decay rates of the gradient's mean and square.
        eps: AdamW's ε.
        weight_decay: AdamW's decoupled weight decay.
        decay_also: patterns of further parameter names that decay, such as ``*.attention.e_*`` for head embeddings.
        compile: compile each block with torch.compile.
        activation_checkpointing: recompute each block's activations in the backward pass instead of keeping them;
            "selective" keeps those of matrix products and attention.
        offload: keep parameters, gradients and the optimizer's state in the CPU's memory (sharded strategies only).

    Raises:
        ValueError: an argument is out of range.
    """

    pretrains = False
    """Whether a head of this task's own is worth keeping when another training of the task begins from it."""

    signatures: Mapping[str, str] = {}
    """How scores were computed, by their name, where a score means little without; recorded beside them."""

    score: ClassVar[str] = "loss"
    """Name of the metric that models of this task are compared by, logged as ``val/<score>`` and ``test/<score>``."""

    higher_is_better: ClassVar[bool] = False
    """Whether the better of two models has the higher ``score``."""

    score_unit: ClassVar[float] = 1.0
    """Factor from the recorded ``score`` to the one that is shown: 100 for shares that are shown in per cent."""

    def __init__(
        self,
        net: nn.Module,
        max_steps: int,
        lr: float = 1e-3,
        schedule: Schedule = "cosine",
        warmup_steps: int | float = 0,
        final_lr_ratio: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_also: Sequence[str] = (),
        compile: bool = False,
        activation_checkpointing: ActivationCheckpointing = False,
        offload: bool = False,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr ({lr}) must be positive")
        if weight_decay < 0:
            raise ValueError(f"weight_decay ({weight_decay}) must not be negative; 0 switches it off")
        if schedule in ("cosine", "linear") and max_steps < 1:
            raise ValueError(
                f"schedule {schedule!r} needs to know its end: set --trainer.max_steps (now {max_steps}) to at least 1"
            )
        if 0 < warmup_steps < 1:
            warmup_steps = round(warmup_steps * max_steps)
        elif warmup_steps != int(warmup_steps):
            raise ValueError(f"warmup_steps ({warmup_steps}) must be a number of steps, or a share of them below 1")
        self.learning_rate = learning_rate_schedule(
            schedule, max_steps=max_steps, warmup_steps=int(warmup_steps), final_ratio=final_lr_ratio
        )
        self.net = net
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay_also = tuple(decay_also)
        self.compile_blocks = compile
        self.activation_checkpointing = activation_checkpointing
        self.offload = offload
        self.deferred: Deferred | None = None
        self._peers = 1  # ranks that see the same rows: those of tensor parallelism
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.long))
        self.tokens_seen: Tensor
        self._window: list[tuple[Tensor, Tensor, Tensor]] = []
        self.step_checks: list[StepCheck] = []
        """Called with every step's loss and gradient norm, after clipping and before the optimizer."""

    def configure_model(self) -> None:
        mesh = self.device_mesh  # None but for sharded strategies
        parallelize(
            self,
            mesh,
            compile=self.compile_blocks,
            activation_checkpointing=self.activation_checkpointing,
            param_dtype=torch.bfloat16 if mesh is not None and self.trainer.precision == "bf16-mixed" else None,
            offload=self.offload,
            deferred=self.deferred,
        )
        self.deferred = None
        self._peers = 1 if mesh is None else mesh[TENSOR_PARALLEL].size()

    # Optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed, others = self._parameter_groups()
        return LocalAdamW(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )

    def _parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        matrices = {id(m.weight) for m in self.modules() if isinstance(m, nn.Linear)} - embeddings
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            decays = id(parameter) in matrices or any(
                fnmatchcase(name.removeprefix("net."), p) for p in self.decay_also
            )
            (decayed if decays else others).append(parameter)
        return decayed, others

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for fused optimizers in mixed precision, for the sake of float16's gradient scaler
        norm = self._clip(gradient_clip_val, gradient_clip_algorithm) if gradient_clip_val else None
        for check in self.step_checks:
            check(self._step_loss, norm)

    def _clip(self, most: float, algorithm: str | None) -> Tensor | None:
        """Clip by "value", or by the norm, which is given back."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if algorithm == "value":
            for gradient in gradients:
                own_part(gradient).clamp_(-most, most)
            return None
        norm = total_norm(gradients)
        share = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        torch._foreach_mul_([own_part(gradient) for gradient in gradients], share.to(gradients[0].device))
        self.log("grad_norm", norm)
        return norm

    def on_train_start(self) -> None:
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                f"trainer.precision ({self.trainer.precision}) is not supported: a sum over targets overflows float16; "
                "use bf16-mixed"
            )
        # a resumed optimizer brings its old settings along; those of this run's config win
        for optimizer in self.trainer.optimizers:
            for group, decay in zip(optimizer.param_groups, (self.weight_decay, 0.0), strict=True):
                group.update(betas=self.betas, eps=self.eps, weight_decay=decay)

    # Training

    def accumulate(self, loss: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Take one micro-batch into the step's mean.

        Args:
            loss: the loss summed over the micro-batch's targets.
            targets: how many there are, an integer scalar.
            tokens: how many tokens the net has read, padding left out, for ``tokens_seen``; ``targets`` if not given.

        Returns:
            What ``training_step`` returns.
        """
        self._window.append((loss.detach(), targets, targets if tokens is None else tokens))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        window = torch.stack([torch.stack([value.double() for value in entry]) for entry in self._window])
        self._window = []
        # over all ranks, peers too, so that all have the same bits: what they decide by them must be the same
        totals = all_reduce_sum(window.sum(0)) / self._peers  # loss, targets, tokens
        # the gradient now is that of the sum over this rank's targets, over micro-batches and averaged over ranks
        # (Lightning divides by the former, data parallelism by the latter)
        scale = self.trainer.accumulate_grad_batches * _data_parallel_size(self) / totals[1].clamp_min(1)
        gradients = [own_part(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            # a scalar in float32 at least: gradients may have several dtypes, and keep theirs
            wide = torch.promote_types(torch.float32, gradients[0].dtype)
            torch._foreach_mul_(gradients, scale.to(gradients[0].device, wide))
        rate = self.lr * self.learning_rate(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.tokens_seen += totals[2].long()
        self._step_loss = totals[0] / totals[1].clamp_min(1)
        self.log("train/loss", self._step_loss, prog_bar=True)
        # tensors of the host: Lightning copies mere numbers to the device, and waits for it
        on_host = {"lr": torch.tensor(rate), "step": torch.tensor(self.global_step + 1.0)}
        self.log_dict({**on_host, "tokens_seen": self.tokens_seen.float()})

    def check_tokenizer(self, sha256: str) -> None:
        """Refuse data of another tokenizer than this task's own; most tasks take any.

        Args:
            sha256: of the data's tokenizer, as `mhe_lightning.data.tokenizer.tokenizer_hash` gives it.

        Raises:
            ValueError: it is another.
        """

    # Evaluation: each rank runs its net as often as its own rows need, so it must have all of it

    def on_validation_start(self) -> None:
        gather(self)

    def on_test_start(self) -> None:
        gather(self)

    def on_predict_start(self) -> None:
        gather(self)

    def on_validation_end(self) -> None:
        release(self)

    def on_test_end(self) -> None:
        release(self)

    def on_predict_end(self) -> None:
        release(self)

    def merge_predictions(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `predict` writes, from what ``predict_step`` gave for all rows of the set, in their order."""
        return rows

    def log_evaluation(self, split: str, results: Mapping[str, Tensor | float]) -> None:
        """Log the results of a whole evaluation set, equal on all ranks, as ``<split>/<name>``."""
        self.log_dict({f"{split}/{name}": value for name, value in results.items()}, prog_bar=True)
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.global_step))  # the loggers' axis


class LocalAdamW(torch.optim.AdamW):
    """AdamW on what each process has of parameters that are spread over several.

    It works number by number, so nothing else is needed; torch's fused one takes no parameters of several layouts.
    """

    def _init_group(self, group: dict[str, Any], *found: Any) -> bool:
        has_complex: bool = super()._init_group(group, *found)
        for tensors in found:
            if isinstance(tensors, list):
                tensors[:] = map(own_part, tensors)
        return has_complex


def results_of(metric: Metric) -> dict[str, Tensor]:
    """What a metric has found over a whole evaluation set; it begins anew."""
    results: dict[str, Tensor] = metric.compute()
    metric.reset()
    return results


def net_inputs(net: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a batch has besides tokens that the net takes: a decoder has no segments.

    ``real``, the places of the real tokens, is for nets that say that they ``unpads``.
    """
    names = ["documents", "padding"]
    if not net.causal:
        names.append("segments")
    if getattr(net, "unpads", False):
        names.append("real")
    return {name: batch[name] for name in names if name in batch}


def tokens_read(batch: Mapping[str, Any]) -> Tensor:
    """How many tokens of a batch are not padding, a scalar on the batch's device."""
    if "padding" in batch:
        return batch["padding"].sum()
    return number_on(batch["tokens"].device, batch["tokens"].numel())


def number_on(device: torch.device, number: int) -> Tensor:
    """An integer scalar on a device, filled in there: to copy it from the host would wait for the device."""
    return torch.full((), number, device=device)


def learning_rate_schedule(
    schedule: Schedule, *, max_steps: int, warmup_steps: int, final_ratio: float
) -> Callable[[int], float]:
    """The learning rate of step s (from 0) as a fraction of its peak. A pure function of the step: it has no state.

    Raises:
        ValueError: an unknown schedule, or a number out of range.
    """
    if schedule not in ("cosine", "linear", "inverse_sqrt", "constant"):
        raise ValueError(f"schedule ({schedule!r}) must be 'cosine', 'linear', 'inverse_sqrt' or 'constant'")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps ({warmup_steps}) must not be negative; 0 starts at the peak")
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_lr_ratio ({final_ratio}) must be in [0, 1]")

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        if schedule == "inverse_sqrt":
            return math.sqrt(max(warmup_steps, 1) / (step + 1))
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
        fall = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
        return final_ratio + (1 - final_ratio) * fall

    return ratio


def _data_parallel_size(task: LightningModule) -> int:
    kwargs: dict[str, Any] | None = task.trainer.distributed_sampler_kwargs
    return kwargs["num_replicas"] if kwargs else 1
