"""Distillation: a net learns the hidden states, and perhaps the predictions, of a trained one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from mhe_lightning.checkpoint import RECORD, TOKENIZER_HASH, read_checkpoint, run_of
from mhe_lightning.models.heads import MaskedTokenHead
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.nets import load_net
from mhe_lightning.tasks.base import Task, net_inputs, results_of

Batch = dict[str, Any]


class Teacher(NamedTuple):
    """A trained model to learn from: its net and the masked-token head that it may have, both frozen.

    Args:
        net: in eval mode.
        head: of masked tokens, if it was trained with one.
        tokenizer_sha256: of the tokenizer that it was trained with, if that is known.
    """

    net: nn.Module
    head: MaskedTokenHead | None
    tokenizer_sha256: str | None

    def to(self, like: Tensor) -> None:
        """Move to the device and dtype of ``like``, if it is elsewhere."""
        own = next(self.net.parameters())
        if (own.device, own.dtype) != (like.device, like.dtype):
            for module in (self.net, self.head):
                if module is not None:
                    module.to(like)


class Distillation(Task):
    """Learn a trained model's hidden states and predictions, such as after a conversion to another attention.

    The loss of a token is the mean over the layers asked for of ``‖s - t‖² / ‖t - mean(t)‖²``, s being the net's and t
    the teacher's hidden state, the mean that over t's channels; times ``hidden_weight``. With ``logits_weight`` comes
    ``T² KL(softmax(z_t / T) ‖ softmax(z_s / T))`` of the logits z at temperature T. Those of a decoder are its own.
    Those of an encoder are what the teacher's masked-token head, which is not trained, makes of either's states.

    Batches are those of `LanguageModelingData` and `MaskedLanguageModelingData`. An encoder reads the text itself, with
    the masked tokens put back, since hidden states of whole text are what is used of it; with ``masked`` it reads what
    masked language modelling does, which suits ``logits_weight``. Padding counts for nothing.

    Logs ``train/loss`` per token, and over a whole evaluation set ``loss`` and ``cosine``: the mean over rows of the
    cosine similarity of the last hidden states' means over a row's tokens, under ``val/`` and ``test/``. The teacher is
    no part of the checkpoints.

    Source: Hinton et al. 2015, arXiv 1503.02531 (logits); Sanh et al. 2019 and Jiao et al. 2020 (hidden states).

    Args:
        net: the model that learns; begin from a conversion with ``--init_from``.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        teacher: a run directory (its newest checkpoint) or a checkpoint file of a model of the same kind, width and
            vocabulary. It is read when training or evaluation begins.
        layers: the hidden states to learn: those after the "last" block (and norm), or after "all" blocks.
        hidden_weight: weight of the hidden states' error.
        logits_weight: weight of the predictions' divergence; 0 computes none.
        temperature: T of the predictions; higher ones show more of what is unlikely.
        masked: whether an encoder reads masked tokens as masked.
        optimization: what `Task` takes besides, such as ``lr``.

    Raises:
        ValueError: an argument is out of range, or the net is an encoder-decoder.
    """

    score: ClassVar[str] = "cosine"
    """Cosine similarity of pooled hidden states: how near the model is to its teacher."""

    higher_is_better: ClassVar[bool] = True
    """1 is equal direction."""

    def __init__(
        self,
        net: nn.Module,
        max_steps: int,
        teacher: str,
        layers: Literal["last", "all"] = "last",
        hidden_weight: float = 1.0,
        logits_weight: float = 0.0,
        temperature: float = 1.0,
        masked: bool = False,
        **optimization: Any,
    ) -> None:
        super().__init__(net, max_steps, **optimization)
        if hasattr(net, "decode"):
            raise ValueError(
                f"{type(net).__name__} cannot be distilled here; Distillation needs a Decoder or an Encoder"
            )
        if layers not in ("last", "all"):
            raise ValueError(f"layers ({layers!r}) must be 'last' or 'all'")
        if hidden_weight < 0 or logits_weight < 0 or hidden_weight + logits_weight == 0:
            raise ValueError(
                f"hidden_weight ({hidden_weight}) and logits_weight ({logits_weight}) must not be negative, and one of "
                "them positive"
            )
        if temperature <= 0:
            raise ValueError(f"temperature ({temperature}) must be positive; 1 leaves probabilities as they are")
        self.teacher_path = teacher
        self.layers = layers
        self.hidden_weight = hidden_weight
        self.logits_weight = logits_weight
        self.temperature = temperature
        self.masked = masked
        # a tuple, not a module: neither the optimizer nor the checkpoints see it
        self.teacher: Teacher | None = None

    def setup(self, stage: str) -> None:
        self.evaluation = Nearness()
        self._read_teacher()

    def check_tokenizer(self, sha256: str) -> None:
        theirs = self._read_teacher().tokenizer_sha256
        if theirs is not None and theirs != sha256:
            raise ValueError(
                f"the teacher {self.teacher_path} was trained with the tokenizer {theirs[:12]}…, the data have "
                f"{sha256[:12]}…; set --data.tokenizer to the tokenizer.json of the teacher's run"
            )

    def _read_teacher(self) -> Teacher:
        if self.teacher is None:
            self.teacher = load_teacher(Path(self.teacher_path))
            self._check_teacher(self.teacher)
        return self.teacher

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, counted, _ = self._compare(batch)
        return self.accumulate((losses * counted).sum(), counted.sum())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses, counted, (ours, theirs) = self._compare(batch)
        rows = counted.any(1)
        cosines = F.cosine_similarity(_mean(ours, counted), _mean(theirs, counted), dim=-1)
        self.evaluation.update((losses.double() * counted).sum(), counted.sum(), cosines[rows])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val", results_of(self.evaluation))

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test", results_of(self.evaluation))

    def _compare(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Of each token its loss (B, T) and whether it counts (B, T); the last hidden states of both, (B, T, D)."""
        assert self.teacher is not None, "setup has read it"
        self.teacher.to(next(self.net.parameters()))
        tokens, inputs = self._tokens(batch), net_inputs(self.net, batch)
        inputs.pop("real", None)  # each block's states are compared as sequences
        with torch.no_grad():
            theirs = self._states(self.teacher.net, tokens, inputs)
        ours = self._states(self.net, tokens, inputs)
        counted = counted_tokens(batch, causal=bool(self.net.causal))
        losses = torch.zeros_like(counted, dtype=ours[-1].dtype)
        if self.hidden_weight:
            errors = [relative_error(s, t) for s, t in zip(ours, theirs, strict=True)]
            losses = losses + self.hidden_weight * torch.stack(errors).mean(0)
        if self.logits_weight:
            places = counted.nonzero(as_tuple=True)  # logits are large: none of padding
            divergence = self._divergence(ours[-1][places], theirs[-1][places])
            losses = losses.index_put(places, self.logits_weight * divergence, accumulate=True)
        return losses, counted, (ours[-1], theirs[-1])

    def _tokens(self, batch: Batch) -> Tensor:
        tokens: Tensor = batch["tokens"]
        if self.net.causal or self.masked or "targets" not in batch:
            return tokens
        return torch.where(batch["targets"] == IGNORE, tokens, batch["targets"])

    def _states(self, net: nn.Module, tokens: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The hidden states (B, T, D) to learn, those that the net gives last."""
        if self.layers == "last":
            return [net(tokens, **inputs)]
        with _block_outputs(net) as states:
            last = net(tokens, **inputs)
        return [*states[:-1], last]

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """``T² KL(teacher ‖ net)`` of each of (M, D) hidden states, (M,)."""
        assert self.teacher is not None
        net, head = self.teacher.net, self.teacher.head
        if head is None:
            z, z_there = self.net.logits(ours), net.logits(theirs)  # type: ignore[operator]
        else:
            embeddings: Tensor = net.token_embedding.weight  # type: ignore[union-attr, assignment]
            z, z_there = (F.linear(head(states), embeddings, head.bias) for states in (ours, theirs))
        log_p, log_p_there = ((logits.float() / self.temperature).log_softmax(-1) for logits in (z, z_there))
        return self.temperature**2 * F.kl_div(log_p, log_p_there, reduction="none", log_target=True).sum(-1)

    def _check_teacher(self, teacher: Teacher) -> None:
        found = [
            f"{name} is {getattr(teacher.net, name)} there and {getattr(self.net, name)} here"
            for name in ("causal", "width", "vocab_size")
            if getattr(teacher.net, name) != getattr(self.net, name)
        ]
        if teacher.net.max_length < self.net.max_length:  # type: ignore[operator]
            found.append(f"it has {teacher.net.max_length} positions, the net {self.net.max_length}")
        depths = [len(net.blocks) for net in (teacher.net, self.net)]  # type: ignore[arg-type]
        if self.layers == "all" and depths[0] != depths[1]:
            found.append(f"it has {depths[0]} blocks, the net {depths[1]} (layers 'last' needs no equal depth)")
        if self.logits_weight and teacher.head is None and not hasattr(teacher.net, "logits"):
            found.append("it has no masked-token head, which logits_weight needs; set it to 0")
        if found:
            raise ValueError(f"the teacher {self.teacher_path} does not fit the net: " + "; ".join(found))


class Nearness(Metric):
    """Loss per token and cosine per row over an evaluation set, summed in float64 and over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "cosine"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tokens", "rows"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.loss: Tensor
        self.cosine: Tensor
        self.tokens: Tensor
        self.rows: Tensor

    def update(self, loss: Tensor, tokens: Tensor, cosines: Tensor) -> None:
        """Add a batch: its summed loss, the number of its tokens, and the cosine of each of its rows (B,)."""
        self.loss += loss
        self.tokens += tokens
        self.cosine += cosines.double().sum()
        self.rows += len(cosines)

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.loss / self.tokens, "cosine": self.cosine / self.rows}


def load_teacher(path: Path) -> Teacher:
    """The model of a run directory's newest checkpoint, or of a checkpoint file.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    checkpoint = read_checkpoint(run_of(path)[1])
    net = load_net(checkpoint)
    weights = {k.removeprefix("head."): v for k, v in checkpoint["state_dict"].items() if k.startswith("head.")}
    head = None
    if weights.keys() == {"bias", "dense.weight", "dense.bias", "norm.weight", "norm.bias"}:  # no other head's
        head = MaskedTokenHead(width=net.width, vocab_size=net.vocab_size)  # type: ignore[arg-type]
        head.load_state_dict(weights)
        head.eval().requires_grad_(False)
    return Teacher(net.eval().requires_grad_(False), head, checkpoint[RECORD].get(TOKENIZER_HASH))


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """``‖s - t‖² / ‖t - mean(t)‖²`` of each hidden state, (..., D) → (...).

    Each token is normalised by its own teacher's state, not by a batch's variance, so that k micro-batches of b rows
    give the loss that one of k·b gives.
    """
    spread = (theirs - theirs.mean(-1, keepdim=True)).square().sum(-1)
    return (ours - theirs).square().sum(-1) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def counted_tokens(batch: Mapping[str, Any], *, causal: bool) -> Tensor:
    """Which tokens of a batch are text of its own, (B, T) boolean: no padding, and no row that stands for none.

    A decoder's rows carry no padding; what fills them up has no targets.
    """
    tokens = batch["tokens"]
    counted = batch["padding"] if "padding" in batch else torch.ones_like(tokens, dtype=torch.bool)
    if causal:
        counted = counted & (batch["targets"] != IGNORE)
    if "rows" in batch:
        counted = counted & (batch["rows"] >= 0)[:, None]
    return counted


@contextmanager
def _block_outputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what each block gives, (B, T, D)."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        states.append(output)

    handles = [block.register_forward_hook(keep) for block in net.blocks]  # type: ignore[union-attr]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _mean(hidden: Tensor, counted: Tensor) -> Tensor:
    """(B, T, D) → (B, D) over the tokens that count; zero of a row without any."""
    weights = counted.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, weights) / weights.sum(1, keepdim=True).clamp_min(1)
