"""Finetuning on questions whose answer is a span of a text."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from mhe_lightning.distributed import gather_rows
from mhe_lightning.metrics.squad import Answered, Span, best_spans, merge_windows, squad_scores
from mhe_lightning.models.heads import SpanHead
from mhe_lightning.tasks.base import Task, net_inputs, number_on, tokens_read

Batch = dict[str, Any]
Row = dict[str, Any]

NULL = 0
"""The token that an absent answer is at, [CLS]."""


class ExtractiveQuestionAnswering(Task):
    """Find the first and the last token of the answer to a question, in windows of a text.

    The loss is the mean over windows of the cross-entropies of start and end over the window's tokens, question and
    special tokens included and padding left out, halved (Devlin et al. 2019). An answer that is not in the window is at
    ``[CLS]``.

    A window's best answers start and end at tokens of the context; the answers to a question are the best of all its
    windows. Where questions may have no answer, the score of none is the lowest over the windows of the start logit
    plus the end logit at ``[CLS]``, and an empty answer is given if it exceeds the best other one by more than
    ``null_threshold``.

    Over a whole evaluation set, each question scored once by the rules of SQuAD (`mhe_lightning.metrics.squad`):
    ``loss`` (over windows), ``exact`` and ``f1`` in per cent, and ``score``, which is ``f1``, under ``val/`` and
    ``test/``. Where questions may have no answer also ``has_answer_exact``, ``has_answer_f1``, ``no_answer_exact``, and
    ``best_exact`` and ``best_f1``, those of the thresholds that are best for the set, ``best_exact_threshold`` and
    ``best_f1_threshold``. Questions whose answers are hidden are predicted, but count for none of these.

    Args:
        net: the model, bidirectional.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        unanswerable: whether questions may have no answer; linked to the data.
        n_best: starts and ends that are combined in each window, and answers that `predict` gives per question.
        max_answer_tokens: of an answer.
        null_threshold: how much the score of no answer must exceed that of the best one.
        optimization: what `Task` takes besides, such as ``lr``.

    Raises:
        ValueError: the data are no such questions, the net sees only what comes before, or a number is out of range.
    """

    score: ClassVar[str] = "score"
    """F1, in per cent."""

    higher_is_better: ClassVar[bool] = True
    """F1 rises."""

    def __init__(
        self,
        net: nn.Module,
        max_steps: int,
        unanswerable: bool,
        n_best: int = 20,
        max_answer_tokens: int = 30,
        null_threshold: float = 0.0,
        **optimization: Any,
    ) -> None:
        super().__init__(net, max_steps, **optimization)
        if unanswerable is None:
            raise ValueError("ExtractiveQuestionAnswering needs questions with answers in a text, such as SquadData")
        if net.causal:
            raise ValueError(
                f"{type(net).__name__} sees only what comes before; the span of an answer needs an Encoder"
            )
        for name, count in (("n_best", n_best), ("max_answer_tokens", max_answer_tokens)):
            if count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        if not math.isfinite(null_threshold):
            raise ValueError(f"null_threshold ({null_threshold}) must be a finite number; 0.0 is usual")
        self.unanswerable = unanswerable
        self.n_best = n_best
        self.max_answer_tokens = max_answer_tokens
        self.null_threshold = null_threshold
        self.head = SpanHead(width=net.width)  # type: ignore[arg-type]
        self._rows: dict[int, Row] = {}

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of each token to be the first and the last of the answer, 2 × (B, T); minus infinity at padding."""
        hidden = self.net(batch["tokens"], **net_inputs(self.net, batch))
        start, end = (logits.float() for logits in self.head(hidden))
        if "padding" in batch:
            start, end = (logits.masked_fill(~batch["padding"], -math.inf) for logits in (start, end))
        return start, end

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        start, end = self.forward(batch)  # self(batch) would shard the root twice (FSDP2)
        losses = _losses(start, end, batch)
        return self.accumulate(losses.sum(), number_on(losses.device, len(losses)), tokens_read(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        start, end = self(batch)
        losses = _losses(start, end, batch).double().tolist()
        for row, loss, info in zip(self._candidates(start, end, batch), losses, batch["info"], strict=True):
            self._rows[row["row"]] = {**row, "loss": loss, "answers": info["answers"]}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Row]:
        """For every window its number, its question, the best answers, and the score of none."""
        start, end = self(batch)
        return self._candidates(start, end, batch)

    def merge_predictions(self, rows: list[Row]) -> list[Row]:
        """A row per question: its id, the answer, and the best answers with their probabilities among each other.

        Where questions may have no answer, "" is one of the best, and ``null_odds`` is how much its score exceeds that
        of the best other answer, None where there is no other.
        """
        return [self._prediction(id, windows) for id, windows in _by_question(rows).items()]

    def _candidates(self, start: Tensor, end: Tensor, batch: Batch) -> list[Row]:
        starts, ends = start.cpu(), end.cpu()
        allowed, allowed_starts = batch["allowed"].cpu(), batch["allowed_starts"].cpu()
        rows = []
        for i, (number, info) in enumerate(zip(batch["rows"].tolist(), batch["info"], strict=True)):
            own = slice(len(info["offsets"]))  # without padding
            spans = best_spans(
                starts[i, own],
                ends[i, own],
                allowed[i, own],
                info["offsets"].tolist(),
                info["context"],
                n_best=self.n_best,
                max_answer_tokens=self.max_answer_tokens,
                allowed_starts=allowed_starts[i, own],
            )
            null_score = starts[i, NULL].double() + ends[i, NULL].double()
            rows.append(
                {
                    "row": number,
                    "id": info["id"],
                    # tuples: Lightning looks for tensors in what is predicted, and refuses frozen dataclasses
                    "spans": [(s.score, s.start, s.end, s.text) for s in spans],
                    "null_score": null_score.item(),
                }
            )
        return rows

    def _answered(self, id: str, windows: list[Row]) -> tuple[Answered, list[Span], float]:
        """The answer to a question, its best answers, and the score of none."""
        spans = merge_windows([[Span(*span) for span in window["spans"]] for window in windows], self.n_best)
        null_score = min(window["null_score"] for window in windows)
        return Answered.from_spans(id, spans, null_score), spans, null_score

    def _prediction(self, id: str, windows: list[Row]) -> Row:
        answered, spans, null_score = self._answered(id, windows)
        best: list[Row] = [{"text": s.text, "start": s.start, "end": s.end, "score": s.score} for s in spans]
        row: Row = {"id": id, "prediction_text": answered.text}
        if self.unanswerable:
            if answered.null_odds > self.null_threshold:
                row["prediction_text"] = ""
            row["null_odds"] = answered.null_odds if math.isfinite(answered.null_odds) else None
            best.append({"text": "", "start": 0, "end": 0, "score": null_score})
            best.sort(key=lambda answer: -answer["score"])
        if best:
            scores = torch.tensor([answer["score"] for answer in best], dtype=torch.float64)
            for answer, probability in zip(best, scores.softmax(0).tolist(), strict=True):
                answer["probability"] = probability
        return {**row, "n_best": best}

    def _log_scores(self, split: str) -> None:
        rows = gather_rows(self._rows)
        self._rows = {}
        known = [row for row in rows if row["answers"] is not None]
        if not known:
            rank_zero_info(f"{split}: the answers to all questions are hidden, so there is no score")
            self.log_evaluation(split, {"hidden_labels": float(len(_by_question(rows)))})
            return
        self.log_evaluation(split, self._scores(known))

    def _scores(self, rows: list[Row]) -> dict[str, float]:
        finite = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        questions = _by_question(rows)
        answered = [self._answered(id, windows)[0] for id, windows in questions.items()]
        references = {id: windows[0]["answers"] for id, windows in questions.items()}
        scores = squad_scores(answered, references, self.null_threshold if self.unanswerable else None)
        loss = math.fsum(finite) / len(finite) if finite else math.nan
        return {"loss": loss, **scores, "score": scores["f1"]}


def _losses(start: Tensor, end: Tensor, batch: Batch) -> Tensor:
    """Of each window, (B,); nan where the answer is not known."""
    first, last = batch["starts"], batch["ends"]
    losses = F.cross_entropy(start, first.clamp_min(NULL), reduction="none")
    losses = (losses + F.cross_entropy(end, last.clamp_min(NULL), reduction="none")) / 2
    return losses.masked_fill(first < 0, math.nan)


def _by_question(rows: list[Row]) -> dict[str, list[Row]]:
    """Windows by their question, in the order of each one's first."""
    questions: dict[str, list[Row]] = {}
    for row in rows:
        questions.setdefault(row["id"], []).append(row)
    return questions
