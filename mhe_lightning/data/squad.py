"""SQuAD: questions whose answer is a span of a given text, or, in version 2.0, is not there.

Source: Rajpurkar et al. 2016, *SQuAD: 100,000+ Questions for Machine Comprehension of Text*; Rajpurkar et al. 2018,
*Know What You Don't Know: Unanswerable Questions for SQuAD*. Windows follow Devlin et al. 2019, *BERT: Pre-training of
Deep Bidirectional Transformers for Language Understanding*, and its code.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np
import pyarrow
import torch
from tokenizers import Encoding

from mhe_lightning.data.base import Batch
from mhe_lightning.data.classification import text_of, texts_in
from mhe_lightning.data.examples import Example, Row
from mhe_lightning.data.finetuning import FinetuningData, pad_segments
from mhe_lightning.data.sampler import rows_per_rank
from mhe_lightning.data.sequences import SequenceFormat

Version = Literal["v1", "v2"]
T = TypeVar("T")

HUB_NAMES = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}
SPLITS = {"train": "train", "validation": "validation", "test": "validation"}
SPECIAL_TOKENS = 3
NULL = 0
"""The token that an absent answer is at: the sequence's first, which is never one of the context."""
UNKNOWN = -1
"""Start and end of a window whose answer is not known."""


class SquadData(FinetuningData):
    """Questions and windows of their contexts, from SQuAD v1.1 or v2.0.

    An example is a window: ``[CLS] question [SEP] part of the context [SEP]``. Windows of a context begin every
    ``stride`` tokens (BERT's ``doc_stride``: the step, not the overlap, which is what is left of the window) until one
    reaches the context's end, so that every token is in at least one. Where it is in several, answers may start at it
    only in the window that shows most of what surrounds it (BERT's maximum context). A tokenizer without ``[CLS]``
    begins with the question; what is said of ``[CLS]`` then holds for the sequence's first token.

    Training aims at the tokens that hold the first answer, whole tokens where it begins or ends within one. It aims at
    ``[CLS]`` in windows that do not hold all of these, and where there is no answer, or none of its characters is in a
    token (the tokenizer drops some, such as control characters). Questions may be empty.

    A batch has ``tokens`` and ``segments`` (B, T); ``padding`` (B, T), True = a real token, unless all are; ``starts``
    and ``ends`` (B,), the first and the last token of the answer, -1 where it is not known; ``allowed`` (B, T), the
    tokens at which an answer may end, and ``allowed_starts`` (B, T), those at which it may start; ``rows`` (B,); and
    ``info``, a dictionary per window: ``id`` of the question, ``context``, ``offsets`` (T, 2), an array with the
    characters [start, end) of the context that each token holds, [0, 0) for those that are not of the context, and
    ``answers``, the texts of the right ones, None where they are hidden, empty where the question has none.

    The official test set is hidden, and not on the Hub: `test` and `predict` take the validation split, unless
    ``splits`` says otherwise. Rows whose answers are hidden (``answers`` null, in v1 also without any) may be in
    validation and test; they are predicted, but not scored.

    Args:
        batch_size: windows per micro-batch over all ranks.
        seed: of the order of the windows; linked to ``seed_everything``.
        version: "v1" (1.1), where every question has an answer, or "v2" (2.0), where it may have none.
        tokenizer: path of a tokenizer.json (a pretraining run has one), or "wordpiece" or "bpe" to train one on the
            training split's texts. Not set, it is that of ``init_from`` or of the run that goes on.
        tokenizer_size: largest vocabulary of a tokenizer that is trained.
        max_length: most tokens of a window, question and special tokens included.
        stride: tokens from the beginning of a window to that of the next.
        max_question_length: most tokens of a question, which is cut at its end.
        path: name of a Hub data set, or a folder in its layout; that of the version if not given.
        subset: configuration of the data set.
        revision: Git revision on the Hub.
        splits: our "train", "validation", "test" → the data set's names, several joined by "+"; what is not given is
            "train" or "validation".
        eval_batch_size: windows per evaluation batch over all ranks; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        shuffle: whether training windows are permuted anew each epoch.
        group_by_length: batch windows of similar length in training.
        cache_dir: folder of tokenised data sets.

    Raises:
        ValueError: an argument is out of range, or ``stride`` would skip tokens.
    """

    schema = pyarrow.schema(
        {
            "tokens": pyarrow.list_(pyarrow.int32()),
            "boundary": pyarrow.int32(),
            # of the context's tokens in the window
            "first_characters": pyarrow.list_(pyarrow.int32()),
            "last_characters": pyarrow.list_(pyarrow.int32()),
            # tokens [first, last) whose maximum context is in this window
            "central": pyarrow.list_(pyarrow.int32()),
            "start": pyarrow.int32(),
            "end": pyarrow.int32(),
            "id": pyarrow.string(),
            "context": pyarrow.string(),
            "answers": pyarrow.list_(pyarrow.string()),
        }
    )

    def __init__(
        self,
        batch_size: int,
        seed: int,
        version: Version = "v1",
        tokenizer: str | None = None,
        tokenizer_size: int = 8192,
        max_length: int = 384,
        stride: int = 128,
        max_question_length: int = 64,
        path: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        splits: Mapping[str, str] | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        shuffle: bool = True,
        group_by_length: bool = True,
        cache_dir: str = "prepared",
    ) -> None:
        if version not in HUB_NAMES:
            raise ValueError(f"version ({version!r}) must be one of {', '.join(HUB_NAMES)}")
        if max_question_length < 1:
            raise ValueError(f"max_question_length ({max_question_length}) must be at least 1; BERT has 64")
        room = max_length - max_question_length - SPECIAL_TOKENS
        if room < 1:
            raise ValueError(
                f"max_length ({max_length}) leaves no room for the context beside a question of max_question_length "
                f"({max_question_length}) and {SPECIAL_TOKENS} special tokens; raise the one or lower the other"
            )
        if not 1 <= stride <= room:
            raise ValueError(
                f"stride ({stride}) must be from 1 to {room}, the tokens of the context that are in a window beside "
                f"the longest question (max_length {max_length}, max_question_length {max_question_length}), or some "
                f"would be in none; try {max(1, room // 2)}"
            )
        self.version = version
        self.stride = stride
        self.max_question_length = max_question_length
        self._ids: dict[str, set[str]] = defaultdict(set)
        super().__init__(
            path=path or HUB_NAMES[version],
            subset=subset,
            revision=revision,
            splits={**SPLITS, **(splits or {})},
            tokenizer=tokenizer,
            tokenizer_size=tokenizer_size,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            group_by_length=group_by_length,
            cache_dir=cache_dir,
        )

    @property
    def unanswerable(self) -> bool:
        """Whether questions may have no answer; the task is linked to it."""
        return self.version == "v2"

    # Examples

    @property
    def label(self) -> str:
        return f"squad-{self.version}"

    def columns(self, split: str) -> list[str]:
        return ["id", "context", "question", "answers"]

    def texts(self, row: Row) -> Iterator[str]:
        return texts_in(row, ("question", "context"))

    def options(self) -> dict[str, Any]:
        return {"version": self.version, "stride": self.stride, "max_question_length": self.max_question_length}

    def prepare(self) -> None:
        self._ids.clear()
        super().prepare()

    def convert(self, rows: list[Row], names: list[str], part: str, split: str, form: SequenceFormat) -> list[Example]:
        questions = [text_of(row, "question", name) for row, name in zip(rows, names, strict=True)]
        contexts = [text_of(row, "context", name) for row, name in zip(rows, names, strict=True)]
        distinct = list(dict.fromkeys(contexts))  # several questions are about the same
        encoded = dict(zip(distinct, form.encode(distinct), strict=True))
        examples = []
        for row, name, question, context in zip(rows, names, form.encode(questions), contexts, strict=True):
            id = text_of(row, "id", name)
            if split != "train":  # predictions are by id
                self._check_new(id, split, name)
            texts, character = self._answers_of(row, name, split)
            offsets = _characters(encoded[context], context)
            if not (offsets[:, 1] > offsets[:, 0]).any():
                raise ValueError(f"{name}: context ({context[:20]!r}) has no token; correct or remove the row")
            answer = None if character is None else _tokens_at(offsets, *character)
            known = texts is not None and (not texts or character is not None)
            for window in self._windows(question.ids, encoded[context].ids, offsets, answer, form):
                if not known:
                    window.update(start=UNKNOWN, end=UNKNOWN)
                examples.append({**window, "id": id, "context": context, "answers": texts})
        return examples

    def _check_new(self, id: str, split: str, name: str) -> None:
        if id in self._ids[split]:
            raise ValueError(f"{name}: id ({id!r}) must be that of one question only; correct or remove the row")
        self._ids[split].add(id)

    def _answers_of(self, row: Row, name: str, split: str) -> tuple[list[str] | None, tuple[int, int] | None]:
        """The answers' texts, None if hidden, and the characters [start, end) of the first, None if it has no place."""
        answers = row["answers"]
        if answers is None and split != "train":
            return None, None
        texts, starts = (
            (answers.get("text"), answers.get("answer_start")) if isinstance(answers, Mapping) else (None, None)
        )
        if not _is_list_of(texts, str) or not _is_list_of(starts, int):
            raise ValueError(
                f"{name}: answers ({answers!r}) must have text, a list of texts, and answer_start, a list of "
                "characters; correct or remove the row"
            )
        if len(texts) != len(starts):
            raise ValueError(
                f"{name}: answers has {len(texts)} texts but {len(starts)} values of answer_start; correct or remove "
                "the row"
            )
        if not texts:
            if self.unanswerable:
                return [], None
            if split != "train":
                return None, None
            raise ValueError(
                f"{name}: the question has no answer, and in version v1 every one has; set data.version to v2, or "
                "remove the row"
            )
        text, start = texts[0], starts[0]
        found = row["context"][max(start, 0) : max(start, 0) + len(text)]
        if start >= 0 and text.strip() and found == text:
            return texts, (start, start + len(text))
        if split != "train":
            return texts, None  # for the score the texts are enough
        if not text.strip():
            raise ValueError(f"{name}: the first answer ({text!r}) is empty; correct or remove the row")
        raise ValueError(
            f"{name}: the context has {found!r} at answer_start ({start}), not the answer {text!r}; correct "
            "answer_start, which counts characters from 0, or remove the row"
        )

    def _windows(
        self,
        question: list[int],
        context: list[int],
        offsets: np.ndarray,
        answer: tuple[int, int] | None,
        form: SequenceFormat,
    ) -> Iterator[Example]:
        """The windows of a context; ``answer`` are the first and the last of its tokens."""
        head = [*form.start, *question[: self.max_question_length], form.end]
        spans = window_spans(len(context), self.max_length - len(head) - 1, self.stride)
        for (first, stop), (central_first, central_stop) in zip(spans, central_spans(spans), strict=True):
            tokens = [*head, *context[first:stop], form.end]
            shift = len(head) - first
            start = end = NULL
            if answer is not None and first <= answer[0] and answer[1] < stop:
                start, end = answer[0] + shift, answer[1] + shift
            yield {
                "tokens": tokens,
                "boundary": len(head),
                "first_characters": offsets[first:stop, 0].tolist(),
                "last_characters": offsets[first:stop, 1].tolist(),
                "central": [central_first + shift, central_stop + shift],
                "start": start,
                "end": end,
                "length": len(tokens),
                "truncated": len(question) > self.max_question_length,
            }

    def largest_batch(self, world_size: int) -> Batch:
        row = {"tokens": [0] * self.max_length, "boundary": 1, "first_characters": [0], "last_characters": [1]}
        row |= {"central": (1, 2), "id": "", "context": "", "answers": [], "start": 1, "end": 1, "rows": 0}
        return self.collate([row] * rows_per_rank(self.batch_size, world_size))

    def collate(self, rows: list[Batch]) -> Batch:
        batch: Batch = pad_segments([row["tokens"] for row in rows], [row["boundary"] for row in rows])
        allowed = np.zeros(batch["tokens"].shape, dtype=bool)
        central = np.zeros_like(allowed)
        batch["info"] = []
        for i, row in enumerate(rows):
            offsets = np.zeros((len(row["tokens"]), 2), dtype=np.int64)
            context = slice(row["boundary"], row["boundary"] + len(row["first_characters"]))
            offsets[context, 0] = row["first_characters"]
            offsets[context, 1] = row["last_characters"]
            allowed[i, : len(offsets)] = offsets[:, 1] > offsets[:, 0]
            central[i, slice(*row["central"])] = True
            # an array: lists of this size take long to be searched for tensors when a batch is moved to a device
            info = {"id": row["id"], "context": row["context"], "offsets": offsets, "answers": row["answers"]}
            batch["info"].append(info)
        batch["allowed"] = torch.from_numpy(allowed)
        batch["allowed_starts"] = torch.from_numpy(allowed & central)
        for name in ("start", "end"):
            batch[f"{name}s"] = torch.tensor([row[name] for row in rows])
        batch["rows"] = torch.tensor([row["rows"] for row in rows])
        return batch

    def submission(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """``predictions.json`` as the official evaluation script takes it, and ``null_odds.json`` in version v2.

        Where no answer was found at all the odds are the largest number there is.
        """
        files = {"predictions.json": {row["id"]: row["prediction_text"] for row in predictions}}
        if self.unanswerable:
            most = sys.float_info.max
            odds = {row["id"]: most if row["null_odds"] is None else row["null_odds"] for row in predictions}
            files["null_odds.json"] = odds
        return {name: json.dumps(content) + "\n" for name, content in files.items()}


def window_spans(n_tokens: int, room: int, step: int) -> list[tuple[int, int]]:
    """Windows [first, stop) of at most ``room`` of a text's tokens that begin every ``step`` tokens, up to its end.

    Every token is in at least one, as ``step`` is at most ``room``.
    """
    firsts = range(0, max(1, n_tokens - room + step), step)
    return [(first, min(first + room, n_tokens)) for first in firsts]


def central_spans(windows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of each window [first, stop) the tokens [first, stop) for which it has the maximum context; each token is in one.

    The context of a token is the lesser of the numbers of tokens on its left and on its right, plus 0.01 times the
    window's length; of equal windows the first is taken. Source: the code of Devlin et al. 2019.
    """
    token = np.arange(windows[-1][1])
    context = np.full((len(windows), len(token)), -1)
    for i, (first, stop) in enumerate(windows):
        own = token[first:stop]
        context[i, first:stop] = 100 * np.minimum(own - first, stop - 1 - own) + (stop - first)
    # contexts rise and fall by one from token to token, so what a window has is in one piece
    best = context.argmax(0)
    return [(int(np.searchsorted(best, i)), int(np.searchsorted(best, i, "right"))) for i in range(len(windows))]


def _characters(encoding: Encoding, context: str) -> np.ndarray:
    """The characters [start, end) that each token holds, (T, 2), without white space around them.

    Accents that are characters of their own, which a normalizer may drop, belong to the token before them.
    """
    offsets = encoding.offsets
    found = []
    for i, (start, end) in enumerate(offsets):
        limit = offsets[i + 1][0] if i + 1 < len(offsets) else len(context)
        while end < limit and unicodedata.combining(context[end]):
            end += 1
        while start < end and context[start].isspace():
            start += 1
        while end > start and context[end - 1].isspace():
            end -= 1
        found.append((start, end))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _tokens_at(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token that hold some of the characters [start, end), None if there is none."""
    inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()[0]
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _is_list_of(values: Any, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
