"""Finetuning on labels of texts, pairs of texts and choices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from mhe_lightning.distributed import gather_rows
from mhe_lightning.metrics import compute_metrics
from mhe_lightning.models.heads import Pooling, SequenceHead
from mhe_lightning.tasks.base import Task, net_inputs, number_on, tokens_read

Batch = dict[str, Any]
Row = dict[str, Any]


class SequenceClassification(Task):
    """Predict the class or the value of a sequence, or which of several sequences is right.

    Classes: cross-entropy. A value: squared error. A choice: every candidate gets a score, and the loss is
    -log Σ softmax(scores) over those that are right. The loss is the mean over examples.

    Over a whole evaluation set, each example scored once: ``loss``, the data set's metrics, and ``score``, their mean,
    under ``val/`` and ``test/``; for sets of several parts (MNLI's mismatched) also ``<part>/<metric>``, and the score
    is the mean over parts. Examples whose label is hidden are predicted, but count for none of these.

    Args:
        net: the model.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        problem: "classes", "value" or "choice"; linked to the data.
        n_labels: numbers per sequence, 1 for a value or a choice; linked to the data.
        n_spans: spans of the text that the label is about; linked to the data.
        metrics: names in `mhe_lightning.metrics.METRICS`; linked to the data.
        pooling: the hidden state that is classified: of the "first" token ([CLS]), the "last" (for decoders), or
            the "mean".
        head_dropout: probability of dropping a number of the pooled state, in training.
        optimization: what `Task` takes besides, such as ``lr``.

    Raises:
        ValueError: the data are of no classification task, or ``pooling`` is "first" for a net that sees nothing after
            the first token.
    """

    score: ClassVar[str] = "score"
    """The mean of the data set's metrics, a share."""

    higher_is_better: ClassVar[bool] = True
    """Accuracy, F1 and correlations: all of them rise."""

    score_unit: ClassVar[float] = 100.0
    """Shares are shown in per cent."""

    def __init__(
        self,
        net: nn.Module,
        max_steps: int,
        problem: Literal["classes", "value", "choice"],
        n_labels: int,
        n_spans: int,
        metrics: Sequence[str],
        pooling: Pooling = "first",
        head_dropout: float = 0.1,
        **optimization: Any,
    ) -> None:
        super().__init__(net, max_steps, **optimization)
        if problem is None:
            raise ValueError("SequenceClassification needs labelled data, such as GlueData or SuperGlueData")
        if pooling == "first" and net.causal:
            raise ValueError("pooling 'first': a decoder's first token sees no other; set model.pooling to 'last'")
        output = getattr(net, "head", None)
        if output is not None and output.weight is not net.token_embedding.weight:  # type: ignore[union-attr]
            output.requires_grad_(False)  # a decoder's output projection has no part in this
        self.problem = problem
        self.n_labels = n_labels
        self.metrics = tuple(metrics)
        self.head = SequenceHead(
            width=net.width,  # type: ignore[arg-type]
            n_labels=n_labels,
            n_spans=n_spans,
            pooling=pooling,
            dropout=head_dropout,
        )
        self._rows: dict[int, Row] = {}

    def forward(self, batch: Batch) -> Tensor:
        """(N, n_labels) scores of a batch's sequences."""
        hidden = self.net(batch["tokens"], **net_inputs(self.net, batch))
        return self.head(hidden, batch.get("padding"), batch.get("spans")).float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._losses(self.forward(batch), batch)  # self(batch) would shard the root twice (FSDP2)
        return self.accumulate(losses.sum(), number_on(losses.device, len(losses)), tokens_read(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        scores = self(batch)
        losses = self._losses(scores, batch).double().tolist()
        for row, loss in zip(self._predictions(scores, batch), losses, strict=True):
            self._rows[row["row"]] = {**row, "loss": loss}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Row]:
        """For every example its number and index, what is predicted, the scores, and the label if it is known."""
        return self._predictions(self(batch), batch)

    def _losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """Of each example, (B,); nan where its label is hidden."""
        if self.problem == "choice":
            right = scores[:, 0].masked_fill(~batch["right"], -math.inf)
            return _by_example(scores[:, 0], batch).logsumexp(1) - _by_example(right, batch).logsumexp(1)
        labels = batch["labels"]
        if self.problem == "value":
            return (scores[:, 0] - labels.to(scores.dtype)) ** 2
        hidden = labels.isnan()
        losses = F.cross_entropy(scores, labels.nan_to_num(0.0).long(), reduction="none")
        return losses.masked_fill(hidden, math.nan)

    def _predictions(self, scores: Tensor, batch: Batch) -> list[Row]:
        numbers: list[Any]
        if self.problem == "choice":
            by_example = _by_example(scores[:, 0], batch)
            predictions = by_example.argmax(1).tolist()
            numbers = [[x for x in row if x != -math.inf] for row in by_example.tolist()]
        else:
            numbers = scores.tolist()
            predictions = scores[:, 0].tolist() if self.problem == "value" else scores.argmax(1).tolist()
        rows = []
        labels = batch["labels"].tolist()
        for number, prediction, own, label, info in zip(
            batch["rows"].tolist(), predictions, numbers, labels, batch["info"], strict=True
        ):
            row = {"row": number, "id": info["id"], "part": info["part"], "prediction": prediction, "scores": own}
            if info["answers"]:
                row["answers"] = info["answers"]
            elif not math.isnan(label):
                row["label"] = label if self.problem == "value" else int(label)
            if info["group"] is not None:
                row["group"] = info["group"]
            if info["choices"]:
                row["predicted_text"] = info["choices"][prediction]
            rows.append(row)
        return rows

    def _log_scores(self, split: str) -> None:
        rows = gather_rows(self._rows)
        self._rows = {}
        labelled = [row for row in rows if "label" in row or "answers" in row]
        if not labelled:
            rank_zero_info(
                f"{split}: the labels of all {len(rows)} rows are hidden, so there is no score; `predict` writes the "
                "benchmark's submission file"
            )
            self.log_evaluation(split, {"hidden_labels": float(len(rows))})
            return
        self.log_evaluation(split, self._scores(labelled))

    def _scores(self, rows: list[Row]) -> dict[str, float]:
        # infinite where no candidate of a choice is right; nan is a model that has diverged, and stays
        losses = [row["loss"] for row in rows if row["loss"] != math.inf]
        results = {"loss": math.fsum(losses) / len(losses) if losses else math.nan}
        parts = defaultdict(list)
        for row in rows:
            parts[row["part"]].append(row)
        scores = []
        for i, (part, own) in enumerate(parts.items()):
            n_classes = max(len(row["scores"]) for row in own) if self.problem != "value" else 1
            found = compute_metrics(self.metrics, own, n_classes)
            scores.append(math.fsum(found.values()) / len(found))
            results.update({name if i == 0 else f"{part}/{name}": value for name, value in found.items()})
        return {**results, "score": math.fsum(scores) / len(scores)}


def _by_example(values: Tensor, batch: Batch) -> Tensor:
    """Values (N,) of sequences as (B, most per example), -inf where an example has fewer."""
    sequences: Tensor = batch["candidates"]
    return values[sequences.clamp_min(0)].masked_fill(sequences < 0, -math.inf)
