"""Causal language modelling."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from mhe_lightning.models.loss import IGNORE
from mhe_lightning.tasks.base import Task, results_of

Batch = dict[str, Any]


class LanguageModeling(Task):
    """Predict each token from those before it.

    The net is called as ``net(tokens, documents=…)`` and gives hidden states; ``net.loss(hidden, targets)`` is their
    cross-entropy summed over targets that are not -100 (`mhe_lightning.models.Decoder` is such a net).

    Logs ``train/loss`` in nats per token, and over a whole evaluation set, each token predicted once: ``loss``,
    ``ppl`` per token, ``word_ppl`` per word (whitespace-separated words and line ends, as for WikiText and Penn
    Treebank) and ``bits_per_byte``, under ``val/`` and ``test/``.
    """

    score: ClassVar[str] = "ppl"
    """Perplexity per token: language models are compared by it."""

    def setup(self, stage: str) -> None:
        self.evaluation = TokenLoss()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch["targets"]
        hidden = self.net(batch["tokens"], documents=batch.get("documents"))
        return self.accumulate(self.net.loss(hidden, targets), (targets != IGNORE).sum())  # type: ignore[operator]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val", results_of(self.evaluation))

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test", results_of(self.evaluation))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """For every row of the batch its number, its predicted tokens, and their loss in nats."""
        targets = batch["targets"]
        hidden = self.net(batch["tokens"], documents=batch.get("documents"))
        losses = self.net.token_losses(hidden, targets).double().sum(1).tolist()  # type: ignore[operator]
        counts = (targets != IGNORE).sum(1).tolist()
        rows = batch["rows"].tolist()
        return [
            {"row": row, "tokens": count, "loss": loss, "ppl": math.exp(loss / count)}
            for row, count, loss in zip(rows, counts, losses, strict=True)
            if count
        ]

    def _evaluate(self, batch: Batch) -> None:
        targets = batch["targets"]
        hidden = self.net(batch["tokens"], documents=batch.get("documents"))
        per_token = self.net.token_losses(hidden, targets)  # type: ignore[operator]
        self.evaluation.update(
            per_token.double().sum(), (targets != IGNORE).sum(), batch["words_per_token"], batch["bytes_per_token"]
        )


class TokenLoss(Metric):
    """Loss per token, word and byte over an evaluation set, summed in float64 and over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.loss: Tensor
        self.tokens: Tensor
        self.words: Tensor
        self.bytes: Tensor

    def update(self, loss: Tensor, tokens: Tensor, words_per_token: Tensor, bytes_per_token: Tensor) -> None:
        """Add a batch.

        Args:
            loss: in nats, summed over ``tokens``.
            tokens: how many were predicted.
            words_per_token: of the evaluation set, one equal number per row, (B,).
            bytes_per_token: likewise.
        """
        self.loss += loss
        self.tokens += tokens
        self.words += tokens * words_per_token[0]
        self.bytes += tokens * bytes_per_token[0]

    def compute(self) -> dict[str, Tensor]:
        return {
            "loss": self.loss / self.tokens,
            "ppl": (self.loss / self.tokens).exp(),
            "word_ppl": (self.loss / self.words).exp(),
            "bits_per_byte": self.loss / math.log(2) / self.bytes,
        }
