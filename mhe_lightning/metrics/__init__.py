"""What evaluation sets are scored by: classification, regression and extractive question answering."""

from mhe_lightning.metrics.classification import METRICS, Metric, ScoredRow, compute_metrics
from mhe_lightning.metrics.squad import (
    Answered,
    Span,
    best_spans,
    exact_match,
    f1,
    merge_windows,
    normalize_answer,
    squad_scores,
)

__all__ = [
    "METRICS",
    "Answered",
    "Metric",
    "ScoredRow",
    "Span",
    "best_spans",
    "compute_metrics",
    "exact_match",
    "f1",
    "merge_windows",
    "normalize_answer",
    "squad_scores",
]
