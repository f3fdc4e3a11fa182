"""Labelled texts, pairs of texts and choices: what GLUE and SuperGLUE have in common."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow
import torch
from torch.nn.utils.rnn import pad_sequence

from mhe_lightning.data.base import Batch
from mhe_lightning.data.examples import Example, Row
from mhe_lightning.data.finetuning import FinetuningData, pad_segments
from mhe_lightning.data.sampler import rows_per_rank
from mhe_lightning.data.sequences import SequenceFormat, TokenSequence

Problem = Literal["classes", "value", "choice"]

USUAL_SPLITS = {"train": "train", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class TaskSpec:
    """A task of a benchmark.

    Args:
        columns: Columns of its rows besides ``label``.
        metrics: Names in `mhe_lightning.metrics.METRICS`; their mean is the task's score.
        labels: Names of the classes, as the benchmark's submission files write them; none for a value or a choice.
        problem: "classes", a "value" (regression), or a "choice" between candidates, each scored on its own.
        range: Lowest and highest value, in regression.
        n_spans: Spans of the text that the label is about.
        splits: Our splits → the data set's names.
        file: Name of the submission file, without its ending.
        part_files: Names for joined splits by what follows the "_" of the source split's name, where they differ.
        subset: Configuration of the data set, where it is not the task's name.
        averaged: Whether the task counts for the benchmark's average.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    file: str
    labels: tuple[str, ...] = ()
    problem: Problem = "classes"
    range: tuple[float, float] = (-math.inf, math.inf)
    n_spans: int = 0
    splits: Mapping[str, str] = field(default_factory=lambda: USUAL_SPLITS)
    part_files: Mapping[str, str] = field(default_factory=dict)
    averaged: bool = True


class ClassificationData(FinetuningData):
    """Examples of one task of a benchmark.

    A batch has ``tokens`` and ``segments`` (N, T), ``labels`` (B,), nan where the label is hidden, ``rows`` (B,), and
    ``info``, a dictionary per example with what is not a number; unless all tokens are real, ``padding`` (N, T), True =
    a real token, and ``real`` (M,), their positions along the flattened (N, T). N is B but for choices, where every
    candidate is a sequence: then ``candidates`` (B, most) are the numbers of each example's sequences, -1 where it has
    fewer, and ``right`` (N,) says whether one is a right answer. Where a label is about spans, ``spans``
    (B, n_spans, 2) are the first token and one past the last of each.

    Args:
        task: name of the task.
        batch_size: examples per micro-batch over all ranks.
        seed: of the order of the examples; linked to ``seed_everything``.
        tokenizer: path of a tokenizer.json (a pretraining run has one), or "wordpiece" or "bpe" to train one on the
            training split's texts. Not set, it is that of ``init_from`` or of the run that goes on.
        tokenizer_size: largest vocabulary of a tokenizer that is trained.
        max_length: most tokens of a sequence; the longer text of a pair is cut first.
        path: name of a Hub data set, or a folder in its layout; the benchmark's if not given.
        subset: configuration of the data set; the task's name if not given.
        revision: Git revision on the Hub.
        splits: our "train", "validation", "test" → the data set's names, several joined by "+"; those of the task if
            not given. ``{test: validation}`` added to them scores the validation split in `test` and `predict`.
        eval_batch_size: examples per evaluation batch over all ranks; ``batch_size`` if not given.
        num_workers: worker processes of each loader.
        shuffle: whether training examples are permuted anew each epoch.
        group_by_length: batch examples of similar length in training.
        cache_dir: folder of tokenised data sets.

    Raises:
        ValueError: an unknown task, or an argument is out of range.
    """

    benchmark: ClassVar[str]
    hub_name: ClassVar[str]
    tasks: ClassVar[Mapping[str, TaskSpec]]

    schema = pyarrow.schema(
        {
            "sequences": pyarrow.list_(pyarrow.list_(pyarrow.int32())),
            "boundaries": pyarrow.list_(pyarrow.int32()),
            "spans": pyarrow.list_(pyarrow.int32()),
            "label": pyarrow.float64(),
            "right": pyarrow.list_(pyarrow.int32()),
            "id": pyarrow.string(),
            "part": pyarrow.string(),
            "group": pyarrow.string(),
            "choices": pyarrow.list_(pyarrow.string()),
            "answers": pyarrow.list_(pyarrow.string()),
        }
    )

    def __init__(
        self,
        task: str,
        batch_size: int,
        seed: int,
        tokenizer: str | None = None,
        tokenizer_size: int = 8192,
        max_length: int = 128,
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
        if task not in self.tasks:
            raise ValueError(f"task ({task!r}) must be one of {', '.join(self.tasks)}")
        self.task = task
        self.spec = self.tasks[task]
        super().__init__(
            path=path or self.hub_name,
            subset=subset or task,
            revision=revision,
            splits={**self.spec.splits, **(splits or {})},
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

    # What the task's model is linked to

    @property
    def problem(self) -> Problem:
        """Whether a class, a value or a choice is predicted."""
        return self.spec.problem

    @property
    def n_labels(self) -> int:
        """Numbers that the model gives per sequence."""
        return len(self.spec.labels) if self.spec.problem == "classes" else 1

    @property
    def n_spans(self) -> int:
        """Spans that the model looks at."""
        return self.spec.n_spans

    @property
    def metrics(self) -> list[str]:
        """Names of the task's metrics."""
        return list(self.spec.metrics)

    # Examples

    @property
    def label(self) -> str:
        return f"{self.benchmark}-{self.task}"

    def columns(self, split: str) -> list[str]:
        return [*self.spec.columns, "label"]

    def options(self) -> dict[str, Any]:
        return {"task": self.task}

    def convert(self, rows: list[Row], names: list[str], part: str, split: str, form: SequenceFormat) -> list[Example]:
        examples = self.examples(rows, names, form)
        for example, row, name in zip(examples, rows, names, strict=True):
            example.setdefault("spans", [])
            example.setdefault("label", self._label_of(row, name, split))
            example["part"] = part
            sequences: list[TokenSequence] = example.pop("pairs")
            example["sequences"] = [sequence.tokens for sequence in sequences]
            example["boundaries"] = [sequence.boundary for sequence in sequences]
            example["length"] = max(len(sequence.tokens) for sequence in sequences)
            example["truncated"] = any(sequence.truncated for sequence in sequences)
            if split == "train" and self.problem == "choice" and not example["right"]:
                example["length"] = 0
        # a question none of whose candidates is right teaches nothing
        return [example for example in examples if example["length"]]

    @abstractmethod
    def examples(self, rows: list[Row], names: list[str], form: SequenceFormat) -> list[Example]:
        """Of each row ``pairs`` (its sequences) and ``id``, and what the task has of ``spans``, ``right``, ``group``,
        ``choices`` and ``answers``."""

    def _label_of(self, row: Row, name: str, split: str) -> float | None:
        """The row's label, None where it is hidden: -1, as on the Hub, in validation and test."""
        label = row["label"]
        if self.problem == "value":
            low, high = self.spec.range
            if label is not None and low <= label <= high:
                return float(label)
            allowed = f"between {low} and {high}"
        else:
            n = len(self.spec.labels)
            if label in range(n):
                return float(label)
            allowed = f"one of 0 to {n - 1} ({', '.join(self.spec.labels)})"
        if split != "train" and (label is None or label == -1):
            return None
        hidden = "; only validation and test rows may have hidden labels (-1)" if label == -1 else ""
        raise ValueError(f"{name}: label ({label}) must be {allowed}{hidden}; correct or remove the row")

    def largest_batch(self, world_size: int) -> Batch:
        n_sequences = 2 if self.problem == "choice" else 1  # as COPA; what has more is longer by as much
        sequences = [[0] * self.max_length] * n_sequences
        row = dict.fromkeys(("id", "part", "group", "choices", "answers"))
        row |= {"sequences": sequences, "boundaries": [self.max_length] * n_sequences, "label": 0.0, "right": [0]}
        row |= {"spans": [0, 1] * self.n_spans, "rows": 0}
        return self.collate([row] * rows_per_rank(self.batch_size, world_size))

    def collate(self, rows: list[Batch]) -> Batch:
        sequences = [sequence for row in rows for sequence in row["sequences"]]
        boundaries = [boundary for row in rows for boundary in row["boundaries"]]
        batch: Batch = pad_segments(sequences, boundaries)
        labels = [math.nan if row["label"] is None else row["label"] for row in rows]
        batch["labels"] = torch.tensor(labels, dtype=torch.float64)
        batch["rows"] = torch.tensor([row["rows"] for row in rows])
        batch["info"] = [{key: row[key] for key in ("id", "part", "group", "choices", "answers")} for row in rows]
        if self.problem == "choice":
            counts = [len(row["sequences"]) for row in rows]
            own = torch.arange(len(sequences)).split(counts)
            batch["candidates"] = pad_sequence(list(own), batch_first=True, padding_value=-1)
            batch["right"] = torch.tensor([i in row["right"] for row in rows for i in range(len(row["sequences"]))])
        if self.n_spans:
            batch["spans"] = torch.tensor([row["spans"] for row in rows]).view(len(rows), self.n_spans, 2)
        return batch


def text_of(row: Row, column: str, name: str) -> str:
    """A row's text; ValueError if it has none."""
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"{name}: {column} is {text!r}, not a text; correct or remove the row")
    return text


def texts_in(row: Row, columns: Sequence[str]) -> Iterator[str]:
    """Those of a row's columns that are texts."""
    return (row[column] for column in columns if isinstance(row[column], str))


def official_id(row: Row) -> str:
    """The benchmark's own index of a row, as JSON."""
    return json.dumps(row["idx"])
