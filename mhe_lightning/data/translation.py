"""Pairs of a text and its translation, in batches of about equally many tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import pyarrow
import torch

from mhe_lightning.data.base import Batch
from mhe_lightning.data.examples import Dropped, Example, ExampleData, Row, pad
from mhe_lightning.data.hub import HubDataset
from mhe_lightning.data.language_modeling import IGNORE
from mhe_lightning.data.sampler import Order, TokenBatchOrder
from mhe_lightning.data.sequences import SequenceFormat, TokenSequence
from mhe_lightning.data.tokenizer import end_of_text_id

COLUMN = "translation"
"""The column that holds ``{de: …, en: …}`` in the Hub's data sets of translations; others have one per language."""


class TranslationData(ExampleData):
    """A parallel corpus: a Hub data set or a mirror of it, such as WMT14.

    Both languages have one vocabulary. A training batch holds pairs of similar length and at most ``batch_tokens``
    tokens on either side, padding included. Pairs that are empty, too long or of too different lengths are left out of
    training, and how many is printed and recorded; evaluation keeps every pair, and cuts what is too long.

    A batch has ``tokens`` (B, S), the sources, each with an end token; ``padding`` (B, S), True = a real token, unless
    all are; ``target_tokens`` and ``targets`` (B, T): the target behind the end token, which also starts it, and the
    target before the end token, -100 where there is none; ``rows`` (B,); and lists of ``references`` (None where the
    target is hidden) and of whether a source is ``empty``.

    Args:
        path: name of a Hub data set, or a folder in its layout.
        source: language to translate from, as the data set names it.
        target: language to translate to.
        batch_tokens: most tokens of a micro-batch's sources, and of its targets, over all ranks.
        seed: of the order of the pairs; linked to ``seed_everything``.
        tokenizer: "bpe" (byte-level) or "unigram" to train one on the training split, both languages together, or the
            path of a tokenizer.json. null takes that of ``init_from`` or of the run that goes on.
        tokenizer_size: largest vocabulary of a tokenizer that is trained; the default is that of Vaswani et al. 2017.
        max_length: most tokens of a source, and of a target, the end token included.
        max_ratio: most tokens of the longer side per token of the shorter in training; null for any.
        subset: configuration of the data set.
        revision: Git revision on the Hub.
        splits: our "train", "validation", "test" → the data set's names; several are joined by "+".
        eval_batch_size: sentences per batch of a rank in evaluation. Batches are the same on any number of ranks.
        num_workers: worker processes of each loader.
        shuffle: whether pairs and batches are permuted anew each epoch.
        cache_dir: folder of tokenised data sets.

    Raises:
        ValueError: an argument is out of range.
    """

    schema = pyarrow.schema(
        {
            "source": pyarrow.list_(pyarrow.int32()),
            "target": pyarrow.list_(pyarrow.int32()),
            "reference": pyarrow.string(),
            "empty": pyarrow.bool_(),
        }
    )

    whole_evaluation_batches = True

    def __init__(
        self,
        path: str,
        source: str,
        target: str,
        batch_tokens: int,
        seed: int,
        tokenizer: str | None = "bpe",
        tokenizer_size: int = 37000,
        max_length: int = 256,
        max_ratio: float | None = 3.0,
        subset: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        shuffle: bool = True,
        cache_dir: str = "prepared",
    ) -> None:
        super().__init__(
            path=path,
            subset=subset,
            revision=revision,
            splits={"train": "train", "validation": "validation", "test": "test", **(splits or {})},
            tokenizer=tokenizer,
            tokenizer_size=tokenizer_size,
            max_length=max_length,
            batch_size=1,  # a position of the order is a whole batch
            seed=seed,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            cache_dir=cache_dir,
        )
        if source == target:
            raise ValueError(f"source and target are both {source!r}; give two languages, such as en and de")
        if batch_tokens < max_length:
            raise ValueError(
                f"batch_tokens ({batch_tokens}) must hold a sentence of max_length ({max_length}) tokens; "
                "raise the one or lower the other"
            )
        if max_ratio is not None and max_ratio < 1:
            raise ValueError(f"max_ratio ({max_ratio}) must be at least 1; 3 is the default, null allows any")
        self.source_language = source
        self.target_language = target
        self.batch_tokens = batch_tokens
        self.max_ratio = max_ratio
        self._order: TokenBatchOrder | None = None

    # Examples

    @property
    def label(self) -> str:
        name = self.source.name.rstrip("/").rpartition("/")[2]
        return "-".join([*filter(None, [name, self.subset]), f"{self.source_language}2{self.target_language}"])

    def options(self) -> dict[str, Any]:
        return {"source": self.source_language, "target": self.target_language, "max_ratio": self.max_ratio}

    def columns(self, split: str) -> list[str]:
        theirs = next(name for name in self.splits[split].split("+") if name in self.source.splits())
        return columns_of(self.source, theirs, self.source_language, self.target_language, hidden=split != "train")

    def texts(self, row: Row) -> Iterator[str]:
        return (text for text in self._pair(row, self.label, "train") if text is not None)

    def tokens_in(self, example: Example) -> int:
        return len(example["source"]) + len(example["target"])

    def convert(
        self, rows: list[Row], names: list[str], part: str, split: str, form: SequenceFormat
    ) -> Sequence[Example | Dropped]:
        pairs = [self._pair(row, name, split) for row, name in zip(rows, names, strict=True)]
        sources = encode_sources([source or "" for source, _ in pairs], form)
        targets = form.encode([" ".join((target or "").split()) for _, target in pairs])
        converted: list[Example | Dropped] = []
        for (source, target), sequence, encoding in zip(pairs, sources, targets, strict=True):
            target_tokens = [*encoding.ids, form.end]
            reason = None
            if split == "train":
                # a source that was cut has max_length tokens left
                n_source = len(sequence.tokens) + sequence.truncated
                reason = self._reason_to_drop(source, target, n_source, len(target_tokens))
            if reason is not None:
                converted.append(Dropped(reason))
                continue
            cut = len(target_tokens) > self.max_length
            if cut:  # its end is not there to be predicted
                target_tokens = target_tokens[: self.max_length]
            converted.append(
                {
                    "source": sequence.tokens,
                    "target": [] if target is None else target_tokens,
                    "reference": target,
                    "empty": is_empty(source or ""),
                    "length": max(len(sequence.tokens), len(target_tokens)),
                    "truncated": sequence.truncated or cut,
                }
            )
        return converted

    def _reason_to_drop(self, source: str | None, target: str | None, n_source: int, n_target: int) -> str | None:
        if is_empty(source or "") or is_empty(target or ""):
            return "without source or target"
        shorter, longer = sorted((n_source, n_target))
        if longer > self.max_length:
            return f"longer than {self.max_length} tokens"
        if self.max_ratio is not None and longer > self.max_ratio * shorter:
            return f"one side more than {self.max_ratio:g} times as long as the other"
        return None

    def _pair(self, row: Row, name: str, split: str) -> tuple[str | None, str | None]:
        """Source and target of a row; None where it is missing. Rows to evaluate may have no place for a target."""
        texts = row.get(COLUMN, row)
        found = []
        for language in (self.source_language, self.target_language):
            hidden = split != "train" and language == self.target_language
            if not isinstance(texts, Mapping) or not (language in texts or hidden):
                have = ", ".join(texts) if isinstance(texts, Mapping) else repr(texts)
                raise ValueError(f"{name} has no language {language!r} but {have}; set data.source and data.target")
            text = texts.get(language)
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{name}: {language} is {text!r}, not a text; correct or remove the row")
            found.append(text)
        return found[0], found[1]

    # What the model is linked to

    @cached_property
    def end_token(self) -> int:
        """The token that ends each source and target, and begins the decoder's input."""
        return end_of_text_id(self.tokenizer)

    # Batches

    def order(self) -> Order:
        if self._order is None:
            lengths = self.table("train")["length"].to_numpy().copy()  # what is mapped is read-only
            self._order = TokenBatchOrder(lengths, self.batch_tokens, self.seed, self.shuffle)
        return self._order

    def largest_batch(self, world_size: int) -> Batch:
        rows = max(1, self.batch_tokens // self.max_length // world_size)
        tokens = torch.zeros(rows, self.max_length, dtype=torch.long)
        return {
            "tokens": tokens,
            "target_tokens": tokens.clone(),
            "targets": tokens.clone(),
            "rows": torch.arange(rows),
            "references": [""] * rows,
            "empty": [False] * rows,
        }

    def largest_row(self) -> Batch:
        return self.largest_batch(self.batch_tokens)

    def collate(self, rows: list[Batch]) -> Batch:
        tokens, real = pad([row["source"] for row in rows])
        # a row that stands for none has nothing to predict; neither has one whose target is hidden
        targets = [row["target"] if row["rows"] >= 0 else [] for row in rows]
        wanted, predicted = pad([target or [self.end_token] for target in targets])
        batch: Batch = {
            "tokens": tokens,
            "target_tokens": torch.cat([torch.full((len(rows), 1), self.end_token), wanted[:, :-1]], 1),
            "targets": wanted.masked_fill(~predicted, IGNORE),
            "rows": torch.tensor([row["rows"] for row in rows]),
            "references": [row["reference"] for row in rows],
            "empty": [row["empty"] for row in rows],
        }
        batch["targets"][torch.tensor([not target for target in targets])] = IGNORE
        if not real.all():
            batch["padding"] = real
        return batch

    def submission(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        return {"hypotheses.txt": "".join(row["hypothesis"] + "\n" for row in predictions)}

    def describe(self) -> dict[str, Any]:
        languages = {"source": self.source_language, "target": self.target_language}
        return {**super().describe(), **languages, "batch_tokens": self.batch_tokens}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_order": None}


def columns_of(dataset: HubDataset, split: str, source: str, target: str, hidden: bool = False) -> list[str]:
    """The columns of a data set that hold its pairs: one for both languages, or one for each.

    Args:
        dataset: the data set.
        split: its name of the split.
        source: one language.
        target: the other.
        hidden: whether the split may be without targets.
    """
    known = dataset.columns(split)
    if known is None or COLUMN in known:
        return [COLUMN]
    return [source] if hidden and target not in known else [source, target]


def is_empty(text: str) -> bool:
    """Whether there is nothing to translate; the translation of nothing is nothing."""
    return not text.strip()


def encode_sources(texts: Sequence[str], form: SequenceFormat) -> list[TokenSequence]:
    """Texts as a translation model reads them: white space made uniform, an end token behind, cut where too long."""
    return form.pairs([(" ".join(text.split()), None) for text in texts])
