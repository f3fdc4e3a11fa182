"""GLUE: nine tasks of a sentence or a pair of sentences, and their diagnostics.

Source: Wang et al. 2018, *GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding*.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from mhe_lightning.data.classification import ClassificationData, TaskSpec, official_id, text_of, texts_in
from mhe_lightning.data.examples import Example, Row
from mhe_lightning.data.sequences import SequenceFormat

MNLI_LABELS = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
YES_NO = ("0", "1")

TASKS: dict[str, TaskSpec] = {
    "cola": TaskSpec(("sentence", "idx"), ("matthews",), "CoLA", YES_NO),
    "sst2": TaskSpec(("sentence", "idx"), ("accuracy",), "SST-2", YES_NO),
    "mrpc": TaskSpec(("sentence1", "sentence2", "idx"), ("f1", "accuracy"), "MRPC", YES_NO),
    "stsb": TaskSpec(
        ("sentence1", "sentence2", "idx"), ("pearson", "spearman"), "STS-B", problem="value", range=(0.0, 5.0)
    ),
    "qqp": TaskSpec(("question1", "question2", "idx"), ("f1", "accuracy"), "QQP", YES_NO),
    "mnli": TaskSpec(
        ("premise", "hypothesis", "idx"),
        ("accuracy",),
        "MNLI-m",
        MNLI_LABELS,
        splits={
            "train": "train",
            "validation": "validation_matched+validation_mismatched",
            "test": "test_matched+test_mismatched",
        },
        part_files={"mismatched": "MNLI-mm"},
    ),
    "qnli": TaskSpec(("question", "sentence", "idx"), ("accuracy",), "QNLI", ENTAILMENT),
    "rte": TaskSpec(("sentence1", "sentence2", "idx"), ("accuracy",), "RTE", ENTAILMENT),
    "wnli": TaskSpec(("sentence1", "sentence2", "idx"), ("accuracy",), "WNLI", YES_NO),
    # diagnostics, for a model that was trained on MNLI
    "ax": TaskSpec(
        ("premise", "hypothesis", "idx"), ("matthews",), "AX", MNLI_LABELS, splits={"test": "test"}, averaged=False
    ),
}


class GlueData(ClassificationData):
    """Examples of a GLUE task, one of `TASKS`; arguments and batches as in `ClassificationData`."""

    benchmark = "glue"
    hub_name = "nyu-mll/glue"
    tasks = TASKS

    def texts(self, row: Row) -> Iterator[str]:
        return texts_in(row, self.spec.columns)

    def examples(self, rows: list[Row], names: list[str], form: SequenceFormat) -> list[Example]:
        first, *second = [column for column in self.spec.columns if column != "idx"]
        pairs = [
            (text_of(row, first, name), text_of(row, second[0], name) if second else None)
            for row, name in zip(rows, names, strict=True)
        ]
        return [{"pairs": [pair], "id": official_id(row)} for row, pair in zip(rows, form.pairs(pairs), strict=True)]

    def submission(self, predictions: list[dict[str, Any]]) -> dict[str, str]:
        """``<task>.tsv`` as the benchmark takes them: index and prediction, a line each, in the order of the index."""
        parts = defaultdict(list)
        for row in predictions:
            parts[row["part"]].append((json.loads(row["id"]), row["prediction"]))
        files = {}
        for part, found in parts.items():
            lines = [f"{index}\t{self._written(prediction)}" for index, prediction in sorted(found)]
            name = self.spec.part_files.get(part, self.spec.file)
            files[f"{name}.tsv"] = "\n".join(["index\tprediction", *lines]) + "\n"
        return files

    def _written(self, prediction: float) -> str:
        if self.problem == "value":
            low, high = self.spec.range
            return f"{min(max(prediction, low), high):.3f}"
        return self.spec.labels[int(prediction)]
