"""Translation with an encoder-decoder: teacher forcing in training, beam search in evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Tokenizer
from torch import Tensor, nn

from mhe_lightning.distributed import gather_rows
from mhe_lightning.metrics.translation import bleu, chrf, compound_split_bleu, require_scorers
from mhe_lightning.models.loss import IGNORE
from mhe_lightning.models.search import Hypothesis, beam_search, check_search
from mhe_lightning.tasks.base import Task

Batch = dict[str, Any]
Row = dict[str, Any]


class Translation(Task):
    """Translate sentences, trained on pairs of a sentence and its translation.

    In training the decoder reads the right translation, shifted by one token, and predicts each of its tokens and its
    end; ``train/loss`` is the cross-entropy with label smoothing, in nats per target token. Over a whole evaluation
    set: ``loss`` (without smoothing) and ``ppl``; ``bleu`` and ``chrf``, those of sacreBLEU on detokenised text, with
    the older ``compound_split_bleu`` where asked for, in per cent; and ``score``, which is ``bleu``, under ``val/`` and
    ``test/``. The signatures that BLEU means nothing without are printed, and recorded in `results.json`. An empty
    source has an empty translation. Pairs whose target is hidden are translated, but count for none of these.

    Source: Vaswani et al. 2017, *Attention Is All You Need*, arXiv 1706.03762 (objective and decoding).

    Args:
        net: the model, a `mhe_lightning.models.EncoderDecoder`.
        max_steps: optimizer steps that the schedule spans; linked to ``trainer.max_steps``.
        tokenizer: of both languages; linked to the data.
        end_token: the token that ends sentences and begins the decoder's input; linked to the data.
        label_smoothing: probability that is spread evenly over the vocabulary in the training loss.
        beam_size: of the beam search; 1 is greedy.
        length_penalty: α of the beam search: scores are log-probabilities divided by ((5 + n) / 6)^α.
        extra_tokens: a translation has at most so many tokens more than its source.
        n_best: translations per sentence that `predict` writes.
        fit_beam_size: ``beam_size`` of the validations during `fit`; 0 gives their loss alone.
        compound_split: also score as papers before sacreBLEU did, for a target in this language, such as ``de``.
        optimization: what `Task` takes besides, such as ``lr``.

    Raises:
        ValueError: the data are no translations, an argument is out of range, or sacreBLEU is not installed.
    """

    score: ClassVar[str] = "bleu"
    """SacreBLEU's BLEU, in per cent."""

    higher_is_better: ClassVar[bool] = True
    """BLEU rises."""

    def __init__(
        self,
        net: nn.Module,
        max_steps: int,
        tokenizer: Tokenizer,
        end_token: int,
        label_smoothing: float = 0.1,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        extra_tokens: int = 50,
        n_best: int = 1,
        fit_beam_size: int = 1,
        compound_split: str | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(net, max_steps, **optimization)
        if tokenizer is None or end_token is None:
            raise ValueError("Translation needs pairs of sentences, such as TranslationData")
        if not hasattr(net, "decode"):
            raise ValueError(f"{type(net).__name__} has no encoder and decoder; Translation needs an EncoderDecoder")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be in [0, 1); 0 switches it off")
        if fit_beam_size < 0:
            raise ValueError(f"fit_beam_size ({fit_beam_size}) must be at least 0, which translates nothing during fit")
        check_search(beam_size, length_penalty, extra_tokens, n_best)
        require_scorers(compound_split)
        self.tokenizer = tokenizer
        self.end_token = end_token
        self.label_smoothing = label_smoothing
        self.beam_size = beam_size
        self.length_penalty = length_penalty
        self.extra_tokens = extra_tokens
        self.n_best = n_best
        self.fit_beam_size = fit_beam_size
        self.compound_split = compound_split
        self._rows: dict[int, Row] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states of the decoder, (B, T, D)."""
        return self.net(batch["tokens"], batch["target_tokens"], padding=batch.get("padding"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch["targets"]
        n_targets = (targets != IGNORE).sum()
        hidden = self.forward(batch)  # self(batch) would shard the root twice (FSDP2)
        loss = self.net.loss(hidden, targets, label_smoothing=self.label_smoothing)  # type: ignore[operator]
        real = batch["padding"] if "padding" in batch else torch.ones_like(batch["tokens"], dtype=torch.bool)
        n_sources = (real & (batch["rows"] >= 0)[:, None]).sum()  # a rank without rows has one that stands for none
        return self.accumulate(loss, n_targets, n_sources + n_targets)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        targets = batch["targets"]
        losses = self.net.token_losses(self(batch), targets).double().sum(1).tolist()  # type: ignore[operator]
        counts = (targets != IGNORE).sum(1).tolist()
        beam_size = self.fit_beam_size if self.trainer.state.fn == "fit" else self.beam_size
        found = self._translate(batch, beam_size, n_best=1) if beam_size else [[] for _ in counts]
        for number, loss, count, reference, hypotheses in zip(
            batch["rows"].tolist(), losses, counts, batch["references"], found, strict=True
        ):
            text = hypotheses[0]["text"] if hypotheses else None
            self._rows[number] = {"loss": loss, "targets": count, "reference": reference, "hypothesis": text}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Row]:
        """For every row of the batch its number, the best translation and its score, and ``n_best`` where asked for."""
        rows = []
        for number, found in zip(
            batch["rows"].tolist(), self._translate(batch, self.beam_size, self.n_best), strict=True
        ):
            row = {"row": number, "hypothesis": found[0]["text"], "score": found[0]["score"]}
            rows.append({**row, "n_best": found} if self.n_best > 1 else row)
        return rows

    def _translate(self, batch: Batch, beam_size: int, n_best: int) -> list[list[Row]]:
        return translate(
            self.net,  # type: ignore[arg-type]
            self.tokenizer,
            batch["tokens"],
            batch.get("padding"),
            batch["empty"],
            end_token=self.end_token,
            beam_size=beam_size,
            length_penalty=self.length_penalty,
            extra_tokens=self.extra_tokens,
            n_best=n_best,
        )

    def _log_scores(self, split: str) -> None:
        rows = gather_rows(self._rows)
        self._rows = {}
        known = [row for row in rows if row["reference"] is not None]
        if not known:
            rank_zero_info(f"{split}: the translations of all sentences are hidden, so there is no score")
            self.log_evaluation(split, {"hidden_labels": float(len(rows))})
            return
        # rows come in the order of their numbers: the sums are the same on any number of ranks
        mean = math.fsum(row["loss"] for row in known) / sum(row["targets"] for row in known)
        loss = torch.tensor(mean, dtype=torch.float64)  # a loss that has diverged has an infinite perplexity
        self.log_evaluation(split, {"loss": loss, "ppl": loss.exp(), **self._scores(known)})

    def _scores(self, rows: list[Row]) -> dict[str, Tensor | float]:
        if rows[0]["hypothesis"] is None:
            return {}
        hypotheses, references = [row["hypothesis"] for row in rows], [row["reference"] for row in rows]
        scores = {"bleu": bleu(hypotheses, references), "chrf": chrf(hypotheses, references)}
        if self.compound_split is not None:
            scores["compound_split_bleu"] = compound_split_bleu(hypotheses, references, self.compound_split)
        self.signatures = {name: score.signature for name, score in scores.items()}
        if self.trainer.state.fn != "fit":
            for name, score in scores.items():
                rank_zero_info(f"{name} {score.value:.2f}  {score.signature}")
        return {**{name: score.value for name, score in scores.items()}, "score": scores["bleu"].value}


def translate(
    net: nn.Module,
    tokenizer: Tokenizer,
    tokens: Tensor,
    padding: Tensor | None,
    empty: Sequence[bool],
    *,
    end_token: int,
    **search: Any,
) -> list[list[Row]]:
    """The best translations of a batch of sources, as texts on one line each.

    Args:
        net: the model, in eval mode.
        tokenizer: of both languages.
        tokens: (B, S) token ids of the sources, each with its end token.
        padding: (B, S) boolean, True = a real token; None where all are.
        empty: of each source, whether it has no text; it is not searched for, its translation is "".
        end_token: ends sentences, and begins the decoder's input.
        search: what `beam_search` takes besides.

    Returns:
        Of each source ``text``, ``score`` and ``log_probability`` of its hypotheses, best first.
    """
    found: list[list[Row]] = [[{"text": "", "score": 0.0, "log_probability": 0.0}] for _ in empty]
    wanted = [row for row, nothing in enumerate(empty) if not nothing]
    if wanted:
        rows = torch.tensor(wanted, device=tokens.device)
        hypotheses = beam_search(
            net,  # type: ignore[arg-type]
            tokens[rows],
            None if padding is None else padding[rows],
            start_token=end_token,
            end_token=end_token,
            **search,
        )
        for row, best in zip(wanted, hypotheses, strict=True):
            found[row] = [_as_text(hypothesis, tokenizer) for hypothesis in best]
    return found


def _as_text(hypothesis: Hypothesis, tokenizer: Tokenizer) -> Row:
    text = " ".join(tokenizer.decode(hypothesis.tokens).split())  # one line, as the sources are read
    return {"text": text, "score": hypothesis.score, "log_probability": hypothesis.log_probability}
