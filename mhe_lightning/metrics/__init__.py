"""What evaluation sets are scored by: classification, regression, extractive question answering and translation."""

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
from mhe_lightning.metrics.translation import Score, bleu, chrf, compound_split_bleu, require_scorers

__all__ = [
    "METRICS",
    "Answered",
    "Metric",
    "Score",
    "ScoredRow",
    "Span",
    "best_spans",
    "bleu",
    "chrf",
    "compound_split_bleu",
    "compute_metrics",
    "exact_match",
    "f1",
    "merge_windows",
    "normalize_answer",
    "require_scorers",
    "squad_scores",
]
