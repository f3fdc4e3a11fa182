"""Metrics of classification and regression over the rows of an evaluation set, all in float64.

torchmetrics counts (its confusion matrix) and correlates (its Pearson in float64). Its own ratios are formed in
float32, and its Spearman adds 1e-6 to a denominator; here they agree with scikit-learn and scipy to 1e-9.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.functional.regression import pearson_corrcoef

from mhe_lightning.metrics import squad

ScoredRow = Mapping[str, Any]
"""A row of an evaluation set: ``prediction`` and ``label`` (classes from 0, or numbers in regression); for MultiRC also
``group``, the question that an answer belongs to; for ReCoRD ``predicted_text`` and ``answers``."""

Metric = Callable[[Sequence[ScoredRow], int], float]
"""A function of the rows and of the number of classes. Without rows it raises ``ValueError``."""


def accuracy(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Share of rows whose class is right."""
    counts = _confusion(rows, n_labels)
    return sum(counts[c][c] for c in range(n_labels)) / len(rows)


def f1(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """F1 of class 1 of two; 0.0 if it neither occurs nor is predicted.

    Raises:
        ValueError: ``n_labels`` is not 2.
    """
    if n_labels != 2:
        raise ValueError(f"n_labels ({n_labels}) must be 2 for the F1 of class 1; use f1_macro for more classes")
    return _class_f1(_confusion(rows, n_labels), 1)


def f1_macro(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Mean F1 of the classes that occur or are predicted."""
    counts = _confusion(rows, n_labels)
    present = [c for c in range(n_labels) if any(counts[c]) or any(row[c] for row in counts)]
    return math.fsum(_class_f1(counts, c) for c in present) / len(present)


def matthews(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Matthews' correlation coefficient; 0.0 if only one class occurs or only one is predicted.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004), eq. 8.
    """
    counts = _confusion(rows, n_labels)
    n = len(rows)
    labels = [sum(row) for row in counts]
    predictions = [sum(column) for column in zip(*counts, strict=True)]
    covariance = n * sum(counts[c][c] for c in range(n_labels)) - sum(
        a * b for a, b in zip(labels, predictions, strict=True)
    )
    variances = (n * n - sum(a * a for a in labels)) * (n * n - sum(b * b for b in predictions))
    return covariance / math.sqrt(variances) if variances else 0.0


def pearson(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Pearson's correlation; 0.0 if predictions or labels are constant, nan if any is not finite."""
    return _correlation(rows, lambda values: values)


def spearman(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Pearson's correlation of the ranks, equal numbers sharing their mean rank; constants as for `pearson`."""
    return _correlation(rows, _ranks)


def f1a(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """F1 of class 1 over all answers of all questions.

    Source: Khashabi et al., "Looking Beyond the Surface: A Challenge Set for Reading Comprehension over Multiple
    Sentences" (2018, https://aclanthology.org/N18-1023).
    """
    return f1(rows, n_labels)


def question_em(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Share of questions (``group``) all of whose answers have the right class.

    Source: as for `f1a`.
    """
    pairs = _classes(rows, n_labels)
    right: defaultdict[Any, bool] = defaultdict(lambda: True)
    for group, (prediction, label) in zip(_values(rows, "group"), pairs, strict=True):
        right[group] &= prediction == label
    return sum(right.values()) / len(right)


def entity_em(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Mean exact match of ``predicted_text`` with one of ``answers``.

    Source: Zhang et al., "ReCoRD: Bridging the Gap between Human and Machine Commonsense Reading Comprehension" (2018,
    https://arxiv.org/abs/1810.12885).
    """
    return _entity_score(rows, squad.exact_match)


def entity_f1(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Mean F1 of the words of ``predicted_text`` with those of the closest of ``answers``.

    Source: as for `entity_em`.
    """
    return _entity_score(rows, squad.f1)


def gender_parity(rows: Sequence[ScoredRow], n_labels: int) -> float:
    """Share of pairs (``group``), which differ in a pronoun's gender only, of the same predicted class.

    Source: Rudinger et al., "Gender Bias in Coreference Resolution" (2018), as SuperGLUE's AX-g.
    """
    _classes(rows, n_labels)
    predictions: defaultdict[Any, set[Any]] = defaultdict(set)
    for group, row in zip(_values(rows, "group"), rows, strict=True):
        predictions[group].add(row["prediction"])
    return sum(len(found) == 1 for found in predictions.values()) / len(predictions)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "f1a": f1a,
    "question_em": question_em,
    "entity_em": entity_em,
    "entity_f1": entity_f1,
    "gender_parity": gender_parity,
}
"""The metrics by name; all in [0, 1] but the three correlations, which are in [-1, 1]."""


def compute_metrics(names: Sequence[str], rows: Sequence[ScoredRow], n_labels: int) -> dict[str, float]:
    """Several metrics of the same rows.

    Args:
        names: of `METRICS`.
        rows: of the whole evaluation set, each once.
        n_labels: number of classes; ignored by metrics without classes.

    Raises:
        ValueError: a name is unknown, there are no rows, or they do not fit a metric.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"metric {unknown[0]!r} is unknown; the known ones are {', '.join(METRICS)}")
    return {name: METRICS[name](rows, n_labels) for name in names}


def _values(rows: Sequence[ScoredRow], key: str) -> list[Any]:
    if not rows:
        raise ValueError("there are no rows to score; a metric needs at least 1")
    for i, row in enumerate(rows):
        if key not in row:
            raise ValueError(f"row {i} has no {key!r}, which the metric needs; it has {', '.join(row)}")
    return [row[key] for row in rows]


def _classes(rows: Sequence[ScoredRow], n_labels: int) -> list[tuple[int, int]]:
    """Prediction and label of each row."""
    if n_labels < 2:
        raise ValueError(f"n_labels ({n_labels}) must be at least 2 for a metric of classes; use pearson for numbers")
    columns = []
    for key in ("prediction", "label"):
        values = _values(rows, key)
        for i, value in enumerate(values):
            if not isinstance(value, Integral) or not 0 <= int(value) < n_labels:
                raise ValueError(f"{key} ({value!r}) of row {i} must be a class, an integer from 0 to {n_labels - 1}")
        columns.append([int(value) for value in values])
    return list(zip(*columns, strict=True))


def _confusion(rows: Sequence[ScoredRow], n_labels: int) -> list[list[int]]:
    """How many rows have label i and prediction j, at [i][j]."""
    predictions, labels = torch.tensor(_classes(rows, n_labels)).unbind(1)
    counts: list[list[int]] = multiclass_confusion_matrix(predictions, labels, num_classes=n_labels).tolist()
    return counts


def _class_f1(counts: list[list[int]], c: int) -> float:
    labels, predictions = sum(counts[c]), sum(row[c] for row in counts)
    return 2 * counts[c][c] / (labels + predictions) if labels + predictions else 0.0


def _correlation(rows: Sequence[ScoredRow], transform: Callable[[Tensor], Tensor]) -> float:
    """Of the transformed predictions and labels."""
    columns = [
        torch.tensor([float(value) for value in _values(rows, key)], dtype=torch.float64)
        for key in ("prediction", "label")
    ]
    if not all(column.isfinite().all() for column in columns):
        return math.nan
    if any((column == column[0]).all() for column in columns):
        return 0.0
    return pearson_corrcoef(*map(transform, columns)).item()


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


def _entity_score(rows: Sequence[ScoredRow], score: Callable[[str, Sequence[str]], float]) -> float:
    pairs = zip(_values(rows, "predicted_text"), _values(rows, "answers"), strict=True)
    return statistics.fmean(score(text, answers) for text, answers in pairs)
