"""A trained model of ours, whole: its net, its head, its tokenizer, and what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning import run
from mhe_lightning.callbacks.run_record import read_results
from mhe_lightning.checkpoint import RECORD, config_of, read_checkpoint
from mhe_lightning.data.classification import ClassificationData, Problem
from mhe_lightning.experiment import class_of
from mhe_lightning.loading import load_tokenizer_of
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder
from mhe_lightning.models.heads import MaskedTokenHead, SequenceHead, SpanHead
from mhe_lightning.nets import load_net
from mhe_lightning.weights_only import ORIGIN

PLACES = ("attention", "encoder_attention", "decoder_attention", "cross_attention")
"""Arguments of a net that say what attends, where they are given."""

PADDING_TOKENS = ("[PAD]", "<pad>")


@dataclass(frozen=True)
class Native:
    """A trained model.

    Args:
        path: of its checkpoint.
        net: in eval mode, on the CPU.
        head: what its task predicts with, if that is not part of the net; in eval mode.
        tokenizer: the one that it was trained with.
        config: the experiment that it was trained by.
        results: of its run, as far as there are any.
        steps: optimizer steps that it was trained for.
        problem: what a `SequenceHead` gives.
        labels: names of the classes that it tells apart.
        origin: what its weights were made from, if not trained here; see `mhe_lightning.weights_only`.
    """

    path: Path
    net: nn.Module
    head: nn.Module | None
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    steps: int
    problem: Problem | None = None
    labels: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_length(self) -> int:
        """Most tokens that it reads."""
        length: int = self.net.max_length  # type: ignore[assignment]
        return length

    @property
    def padding(self) -> int | None:
        """The token that fills rows up, where the tokenizer has one."""
        found = (self.tokenizer.token_to_id(token) for token in PADDING_TOKENS)
        return next((int(token) for token in found if token is not None), None)

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model predicts, before any softmax.

        Args:
            batch: ``tokens`` (B, T), ``padding`` (B, T), True = a real token; for an encoder ``segments`` (B, T), for
                an encoder-decoder ``target_tokens`` (B, T').

        Returns:
            (B, T, V) of a language model, masked or not, (B, T', V) of an encoder-decoder, (B, n_labels) of a
            sequence's label, (B, T, 2) of a span's ends, (B, T, D) hidden states of an encoder without a head.
        """
        net, head = self.net, self.head
        if isinstance(net, EncoderDecoder):
            return net.logits(net(batch["tokens"], batch["target_tokens"], padding=batch["padding"]))
        if isinstance(net, Decoder):
            return net.logits(net(batch["tokens"], padding=batch["padding"]))
        hidden = net(batch["tokens"], segments=batch["segments"], padding=batch["padding"])
        if isinstance(head, MaskedTokenHead):
            return head(hidden) @ net.token_embedding.weight.T + head.bias  # type: ignore[union-attr, operator]
        if isinstance(head, SpanHead):
            return torch.stack(head(hidden), -1)
        if isinstance(head, SequenceHead):
            return head(hidden, batch["padding"])
        assert isinstance(net, Encoder)
        return hidden


def load_native(folder: Path, path: Path, tokenizer: str | None = None) -> Native:
    """The model of a checkpoint.

    Args:
        folder: the run that it is of.
        path: the checkpoint.
        tokenizer: a tokenizer.json; the run's if not given.

    Raises:
        ValueError: it cannot be read, or the tokenizer is not the net's.
    """
    checkpoint = read_checkpoint(path)
    config = config_of(checkpoint)
    net = load_net(checkpoint)
    found = load_tokenizer_of(net, tokenizer or folder / run.TOKENIZER)
    weights = {k.removeprefix("head."): v for k, v in checkpoint["state_dict"].items() if k.startswith("head.")}
    head = _head(weights, net, config["model"]["init_args"])
    try:
        results = read_results(folder)
    except (OSError, ValueError):
        results = {}
    origin = checkpoint[RECORD].get(ORIGIN) or {}
    problem, labels = labels_of(config, origin) if isinstance(head, SequenceHead) else (None, ())
    return Native(path, net, head, found, config, results, checkpoint["global_step"], problem, labels, origin)


def _head(weights: Mapping[str, Tensor], net: nn.Module, settings: Mapping[str, Any]) -> nn.Module | None:
    """The head with these weights; a sequence's, a span's and masked tokens' have different ones."""
    if not weights:
        return None
    width: int = net.width  # type: ignore[assignment]
    head: nn.Module
    if "norm.weight" in weights:
        head = MaskedTokenHead(width=width, vocab_size=weights["bias"].shape[0])
    elif "dense.weight" in weights:
        head = SequenceHead(
            width=width,
            n_labels=weights["classifier.weight"].shape[0],
            n_spans=weights["dense.weight"].shape[1] // width - 1,
            pooling=settings.get("pooling", "first"),
            dropout=settings.get("head_dropout", 0.1),
        )
    elif weights.keys() == {"classifier.weight", "classifier.bias"}:
        head = SpanHead(width=width)
    else:
        raise ValueError(f"the head of this model is none of ours: {', '.join(weights)}")
    head.load_state_dict(weights)
    return head.eval()


def labels_of(config: Mapping[str, Any], origin: Mapping[str, Any]) -> tuple[Problem | None, tuple[str, ...]]:
    """What a classifier tells apart, by the data that it was trained on, or by what it was imported from."""
    while origin.get("source_origin"):  # a conversion of what was imported
        origin = origin["source_origin"]
    if origin.get("format") == "transformers":
        return _imported_labels(origin)
    data = config.get("data") or {}
    try:
        kind = class_of(data["class_path"]) if "class_path" in data else object
    except (ImportError, AttributeError):  # a user's own, from elsewhere
        kind = object
    if not issubclass(kind, ClassificationData):
        return None, ()
    spec = kind.tasks[data["init_args"]["task"]]
    return spec.problem, tuple(spec.labels)


def _imported_labels(origin: Mapping[str, Any]) -> tuple[Problem | None, tuple[str, ...]]:
    """The same from a class of transformers and its config."""
    given = origin.get("config", {})
    if str(origin.get("architecture", "")).endswith("ForMultipleChoice"):
        return "choice", ()
    named = given.get("id2label") or {}
    kind, count = given.get("problem_type"), len(named) or given.get("num_labels", 2)
    if kind == "regression" or (kind is None and count == 1):  # as transformers takes it
        return "value", ()
    return "classes", tuple(str(named[key]) for key in sorted(named, key=int))
