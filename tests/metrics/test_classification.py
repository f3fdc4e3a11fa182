"""Every metric against scikit-learn or scipy, degenerate inputs among them, and the grouped ones by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.metrics import METRICS, compute_metrics

CLASS_METRICS = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1_macro": lambda labels, predictions: sklearn.metrics.f1_score(
        labels, predictions, average="macro", zero_division=0
    ),
    "matthews": sklearn.metrics.matthews_corrcoef,
}
BINARY_METRICS = {
    name: lambda labels, predictions: sklearn.metrics.f1_score(labels, predictions, zero_division=0)
    for name in ("f1", "f1a")
}
CORRELATIONS = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}


def as_rows(predictions, labels) -> list[dict]:
    return [{"prediction": p, "label": label} for p, label in zip(predictions, labels, strict=True)]


@st.composite
def classes(draw, n_labels: int | None = None) -> tuple[list[int], list[int], int]:
    """Predictions and labels of which some classes are often absent."""
    n = n_labels or draw(st.integers(2, 6))
    used = st.sampled_from(draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    size = draw(st.integers(1, 40))
    columns = [draw(st.lists(values, min_size=size, max_size=size)) for values in (used, used | st.integers(0, n - 1))]
    predictions, labels = draw(st.permutations(columns))
    return predictions, labels, n


@pytest.mark.filterwarnings("ignore:.*single label.*")
@pytest.mark.parametrize("name", CLASS_METRICS)
@given(data=classes())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_metrics_of_classes_are_those_of_scikit_learn(name, data):
    predictions, labels, n_labels = data
    expected = CLASS_METRICS[name](labels, predictions)
    assert METRICS[name](as_rows(predictions, labels), n_labels) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", BINARY_METRICS)
@given(data=classes(n_labels=2))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_f1_is_that_of_scikit_learn(name, data):
    predictions, labels, _ = data
    expected = BINARY_METRICS[name](labels, predictions)
    assert METRICS[name](as_rows(predictions, labels), 2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_large_sets_agree_as_well(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 5000)
    predictions = np.where(draw.random(5000) < 0.7, labels, draw.integers(0, 3, 5000))
    for name, expected in CLASS_METRICS.items():
        assert METRICS[name](as_rows(predictions, labels), 4) == pytest.approx(expected(labels, predictions), abs=1e-9)
    scores = draw.normal(size=5000).round(1)
    numbers = as_rows((scores + draw.normal(size=5000)).tolist(), scores.tolist())
    for name, correlation in CORRELATIONS.items():
        expected = correlation([row["prediction"] for row in numbers], [row["label"] for row in numbers])[0]
        assert METRICS[name](numbers, 1) == pytest.approx(expected, abs=1e-9)


@st.composite
def numbers(draw) -> tuple[list[float], list[float]]:
    """Columns that are not constant, many of their numbers equal, of any offset and scale."""
    size = draw(st.integers(2, 40))
    columns = []
    for _ in range(2):
        values = st.integers(0, 5) if draw(st.booleans()) else st.integers(-10000, 10000)
        column = draw(st.lists(values, min_size=size, max_size=size).filter(lambda column: len(set(column)) > 1))
        scale, offset = draw(st.sampled_from([0.01, 1.0, 1000.0])), draw(st.sampled_from([0.0, 0.3, -50.0]))
        columns.append([scale * value + offset for value in column])
    return columns[0], columns[1]


@pytest.mark.parametrize("name", CORRELATIONS)
@given(data=numbers())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_correlations_are_those_of_scipy(name, data):
    expected = CORRELATIONS[name](*data)[0]
    assert METRICS[name](as_rows(*data), 1) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([0.1, 0.1, 0.1], [1, 2, 3]), ([1.5, 2.5], [4.0, 4.0]), ([3.0, 3.0], [3.0, 3.0]), ([1.0], [2.0])],
)
@pytest.mark.filterwarnings("error")
def test_what_is_constant_correlates_with_nothing(name, predictions, labels):
    assert METRICS[name](as_rows(predictions, labels), 1) == 0.0


@pytest.mark.parametrize("name", CORRELATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("error")
def test_a_diverged_model_has_no_correlation(name, value):
    assert math.isnan(METRICS[name](as_rows([1.0, value], [1.0, 2.0]), 1))
    assert math.isnan(METRICS[name](as_rows([1.0, value], [2.0, 2.0]), 1))


def test_degenerate_classes_by_hand():
    never, always = as_rows([0, 0, 0], [0, 1, 1]), as_rows([1, 1, 1], [0, 1, 1])
    nothing = as_rows([0, 0], [0, 0])
    assert compute_metrics(["matthews", "f1", "f1_macro"], never, 2) == {"matthews": 0, "f1": 0, "f1_macro": 0.25}
    assert compute_metrics(["matthews", "f1", "f1_macro"], always, 2) == {"matthews": 0, "f1": 0.8, "f1_macro": 0.4}
    assert compute_metrics(["matthews", "f1", "f1_macro"], nothing, 2) == {"matthews": 0, "f1": 0, "f1_macro": 1}
    assert METRICS["matthews"](as_rows([0, 1], [1, 0]), 2) == -1.0


def test_classes_may_be_numpys_integers_and_booleans():
    rows = as_rows([np.int64(1), True, np.int32(0)], [1, False, 0])
    assert METRICS["accuracy"](rows, 2) == pytest.approx(2 / 3)


# --- MultiRC


def test_multirc_by_hand():
    rows = [
        {"group": "q1", "prediction": 1, "label": 1},
        {"group": "q2", "prediction": 1, "label": 0},
        {"group": "q1", "prediction": 0, "label": 0},
        {"group": "q2", "prediction": 1, "label": 1},
        {"group": "q3", "prediction": 0, "label": 0},
        {"group": "q2", "prediction": 0, "label": 0},
        {"group": "q4", "prediction": 0, "label": 1},
    ]
    scores = compute_metrics(["f1a", "question_em", "accuracy"], rows, 2)
    # class 1: two right of three predicted and three labelled; q1 and q3 are right throughout
    assert scores == {"f1a": pytest.approx(2 / 3), "question_em": 0.5, "accuracy": pytest.approx(5 / 7)}
    assert compute_metrics(["f1a", "question_em"], rows[::-1], 2) == {k: scores[k] for k in ("f1a", "question_em")}


def test_a_question_is_right_only_as_a_whole():
    rows = [{"group": "q", "prediction": p, "label": 1} for p in (1, 0, 1)]
    assert METRICS["question_em"](rows, 2) == 0.0
    assert METRICS["question_em"](rows[::2], 2) == 1.0


# --- AX-g


def test_gender_parity_by_hand():
    rows = [
        {"group": "0", "prediction": 1, "label": 0},
        {"group": "1", "prediction": 0, "label": 0},
        {"group": "0", "prediction": 1, "label": 0},
        {"group": "2", "prediction": 0, "label": 1},
        {"group": "1", "prediction": 1, "label": 0},
        {"group": "2", "prediction": 0, "label": 1},
        {"group": "3", "prediction": 1, "label": 1},
        {"group": "3", "prediction": 1, "label": 1},
    ]
    # all pairs but the second are of one class, whether or not it is the right one
    assert METRICS["gender_parity"](rows, 2) == 0.75
    assert METRICS["gender_parity"](rows[::-1], 2) == 0.75


# --- ReCoRD


def test_record_by_hand():
    rows = [
        {"predicted_text": "the U.S.", "answers": ["United States", "US"]},
        {"predicted_text": "Obama", "answers": ["Barack Obama", "Michelle"]},
        {"predicted_text": "Paris", "answers": ["London"]},
        {"predicted_text": "New York City", "answers": ["York", "New York"]},
    ]
    assert compute_metrics(["entity_em", "entity_f1"], rows, 2) == {
        "entity_em": 0.25,
        "entity_f1": pytest.approx((1 + 2 / 3 + 0 + 4 / 5) / 4),
    }


# --- errors


@pytest.mark.parametrize("name", METRICS)
def test_no_rows_are_refused(name):
    with pytest.raises(ValueError, match="there are no rows to score; a metric needs at least 1"):
        compute_metrics([name], [], 2)


@pytest.mark.parametrize("name", METRICS)
def test_rows_without_what_a_metric_needs_are_refused(name):
    with pytest.raises(ValueError, match=r"row 0 has no '\w+', which the metric needs; it has other"):
        compute_metrics([name], [{"other": 1}], 2)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"metric 'bleu' is unknown; the known ones are accuracy, f1, f1_macro, .*f1a"):
        compute_metrics(["f1", "bleu"], [], 2)


@pytest.mark.parametrize(
    ("name", "row", "n_labels", "message"),
    [
        ("accuracy", {"prediction": 2, "label": 0}, 2, r"prediction \(2\) of row 0 must be a class, .* from 0 to 1"),
        ("accuracy", {"prediction": 0, "label": -1}, 3, r"label \(-1\) of row 0 must be a class, .* from 0 to 2"),
        ("f1", {"prediction": 0.7, "label": 1}, 2, r"prediction \(0\.7\) of row 0 must be a class"),
        ("matthews", {"prediction": 0, "label": 0}, 1, r"n_labels \(1\) must be at least 2"),
        ("f1", {"prediction": 0, "label": 0}, 3, r"n_labels \(3\) must be 2 for the F1 of class 1; use f1_macro"),
    ],
)
def test_rows_that_do_not_fit_a_metric_are_refused(name, row, n_labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics([name], [row], n_labels)
