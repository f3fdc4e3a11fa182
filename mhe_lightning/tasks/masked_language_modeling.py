"""Masked language modelling."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mhe_lightning.models.heads import MaskedTokenHead
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.tasks.base import Task, net_inputs, number_on, results_of, tokens_read

Batch = dict[str, Any]

PSEUDO_LIKELIHOOD_BATCH = 32
"""Copies of a row, each with another token masked, that go through the net together."""


class MaskedLanguageModeling(Task):
    """Predict masked tokens from all others.

    The net is called as ``net(tokens, segments=…, documents=…, padding=…, kept=…)`` for its hidden states at the masked
    positions only; these go through BERT's head, whose output projection is the net's ``token_embedding``.

    Logs ``train/loss`` in nats per masked token, and over the whole evaluation set with its fixed masks ``loss``,
    ``accuracy``, and ``pseudo_ppl`` = exp(loss), under ``val/`` and ``test/``. `predict` gives each row's
    pseudo-log-likelihood with every token masked in turn, alone (Salazar et al. 2020, *Masked Language Model Scoring*).

    Args:
        net: the model, bidirectional.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        optimization: what `Task` takes besides, such as ``lr``.
    """

    pretrains = True

    score: ClassVar[str] = "pseudo_ppl"
    """Pseudo-perplexity: masked language models are compared by it."""

    def __init__(self, net: nn.Module, max_steps: int, **optimization: Any) -> None:
        super().__init__(net, max_steps, **optimization)
        if net.causal:
            raise ValueError(f"{type(net).__name__} sees only what comes before; masked tokens need an Encoder")
        self.head = MaskedTokenHead(width=net.width, vocab_size=net.vocab_size)  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        self.evaluation = MaskedTokenScores()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden, targets = self._masked(batch)
        loss = self.head.loss(hidden, self._embeddings(), targets)
        return self.accumulate(loss, number_on(loss.device, len(targets)), tokens_read(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        hidden, targets = self._masked(batch)
        self.evaluation.update(*self.head.scores(hidden, self._embeddings(), targets))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluation("val", results_of(self.evaluation))

    def on_test_epoch_end(self) -> None:
        self.log_evaluation("test", results_of(self.evaluation))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """For every row its number, its tokens, and their pseudo-log-likelihood in nats."""
        found = []
        for i, row in enumerate(batch["rows"].tolist()):
            positions = batch["ordinary"][i].nonzero().flatten()
            if row < 0 or len(positions) == 0:
                continue
            own = {key: value[i] for key, value in batch.items() if key != "masked"}
            likelihood = self._pseudo_likelihood(own, positions)
            ppl = math.exp(-likelihood / len(positions))
            found.append({"row": row, "tokens": len(positions), "pseudo_log_likelihood": likelihood, "pseudo_ppl": ppl})
        return found

    def _pseudo_likelihood(self, row: Batch, positions: Tensor) -> float:
        """Sum over ``positions`` of the log-likelihood of the token there, it alone being masked."""
        tokens = torch.where(row["targets"] == IGNORE, row["tokens"], row["targets"])
        total = 0.0
        for some in positions.split(PSEUDO_LIKELIHOOD_BATCH):
            copies = tokens.repeat(len(some), 1)
            at = torch.arange(len(some), device=tokens.device)
            copies[at, some] = row["mask_token"]
            inputs = {key: value.expand(len(some), -1) for key, value in net_inputs(self.net, row).items()}
            hidden = self.net(copies, **inputs, kept=at * len(tokens) + some)
            losses, _ = self.head.scores(hidden, self._embeddings(), tokens[some])
            total -= losses.double().sum().item()
        return total

    def _masked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states (M, D) and targets (M,) of the masked positions."""
        targets = batch["targets"].flatten()
        # the host that made the batch knows where they are; how many a device finds is waited for
        kept = batch["masked"] if "masked" in batch else (targets != IGNORE).nonzero().flatten()
        return self.net(batch["tokens"], **net_inputs(self.net, batch), kept=kept), targets[kept]

    def _embeddings(self) -> Tensor:
        return self.net.token_embedding.weight  # type: ignore[union-attr, return-value]


class MaskedTokenScores(Metric):
    """Loss and accuracy over the masked tokens of an evaluation set, summed in float64 and over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.loss: Tensor
        self.hits: Tensor
        self.tokens: Tensor

    def update(self, losses: Tensor, hits: Tensor) -> None:
        """Add masked tokens: their losses in nats (M,), and whether each was the likeliest (M,)."""
        self.loss += losses.double().sum()
        self.hits += hits.sum()
        self.tokens += hits.numel()

    def compute(self) -> dict[str, Tensor]:
        loss = self.loss / self.tokens
        return {"loss": loss, "accuracy": self.hits.double() / self.tokens, "pseudo_ppl": loss.exp()}
