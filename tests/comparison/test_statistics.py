"""Intervals, retention, elasticity and tests against numbers that were worked out by hand."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhe_lightning.comparison.results import Estimate, Metric
from mhe_lightning.comparison.statistics import (
    elasticities,
    elasticity,
    estimate,
    holm,
    paired_test,
    require_scipy,
    retained,
    retention,
)

PPL = Metric("ppl", higher_is_better=False)
ACCURACY = Metric("accuracy", higher_is_better=True, unit=100)
both_metrics = pytest.mark.parametrize("metric", [PPL, ACCURACY], ids=lambda metric: metric.name)

positive = st.floats(0.1, 1000)
scores_by_seed = st.dictionaries(st.integers(0, 9), positive, min_size=1)

# --- the interval


def test_the_interval_of_three_values():
    # mean 2; variance (1 + 0 + 1) / 2 = 1; with 2 degrees of freedom t(p) = (2p - 1) sqrt(2 / (4p (1 - p))), so
    # t(0.975) = 0.95 sqrt(2 / 0.0975) = 4.3026527297; half width 4.3026527297 * 1 / sqrt(3) = 2.4841377117
    found = estimate([1.0, 2.0, 3.0])

    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.3026527297 / math.sqrt(3), rel=1e-10)


def test_the_interval_of_two_values():
    # mean 11; variance (1 + 1) / 1 = 2; t(0.975, 1) = tan(0.475 pi) = 12.706204736...; 12.7062 * sqrt(2) / sqrt(2)
    found = estimate([10.0, 12.0])

    assert found.mean == 11.0
    assert found.half_width == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)


def test_one_value_has_no_interval():
    assert estimate([0.1]) == Estimate(0.1, None, 1)


def test_equal_values_have_an_interval_of_width_zero():
    found = estimate([0.1, 0.1, 0.1])

    assert (found.mean, found.half_width) == (pytest.approx(0.1, rel=1e-15), pytest.approx(0, abs=1e-15))


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, math.inf], [math.inf, -math.inf]])
def test_a_value_that_is_not_finite_leaves_no_interval(values):
    found = estimate(values)

    assert not math.isfinite(found.mean)
    assert found.half_width is None


def test_huge_values_have_an_interval():
    # of a diverged perplexity: twice test_the_interval_of_two_values, times 1e200
    assert estimate([2e201, 2.4e201]).half_width == pytest.approx(2e200 * math.tan(0.475 * math.pi), rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_values_is_irrelevant(values, order: random.Random):
    shuffled = order.sample(values, len(values))

    assert estimate(shuffled) == estimate(values)


# --- retention


def test_retention_is_the_share_of_the_reference():
    assert retention(0.81, 0.9, ACCURACY) == pytest.approx(0.9, rel=1e-15)  # 0.81 / 0.9


def test_retention_of_a_perplexity_that_is_higher_than_the_reference():
    assert retention(22.0, 20.0, PPL) == 1 - 2 / 20  # 0.9


def test_retention_of_a_perplexity_that_is_lower_than_the_reference_is_above_one():
    assert retention(19.0, 20.0, PPL) == 1 + 1 / 20  # 1.05


def test_retention_may_be_negative():
    assert retention(-0.1, 0.5, ACCURACY) == pytest.approx(-0.2)
    assert retention(60.0, 20.0, PPL) == 1 - 40 / 20  # -1


@both_metrics
@pytest.mark.parametrize(
    ("score", "reference"), [(0.5, 0.0), (0.5, -0.1), (math.nan, 0.5), (math.inf, 0.5), (0.5, math.nan), (1, math.inf)]
)
def test_retention_is_undefined_without_a_positive_reference_or_finite_scores(metric, score, reference):
    assert retention(score, reference, metric) is None


def test_retention_over_seeds_is_the_mean_of_the_seeds_ratios():
    # seed 1: 18/20 = 0.9, seed 2: 33/30 = 1.1; seed 3 and 4 are of one side only.
    # mean 1.0; variance (0.01 + 0.01) / 1 = 0.02; half width t(0.975, 1) * sqrt(0.02 / 2) = 12.7062 * 0.1
    # (the ratio of the means would be 51/50)
    found = retained({1: 18.0, 2: 33.0, 3: 1.0}, {2: 30.0, 1: 20.0, 4: 1.0}, ACCURACY)

    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx(1.0, rel=1e-15)
    assert found.half_width == pytest.approx(0.1 * math.tan(0.475 * math.pi), rel=1e-12)


def test_retention_over_seeds_of_perplexities():
    # 1 - (22 - 20) / 20 = 0.9 and 1 - (24 - 30) / 30 = 1.2
    found = retained({1: 22.0, 2: 24.0}, {1: 20.0, 2: 30.0}, PPL)

    assert found is not None
    assert found.mean == pytest.approx(1.05, rel=1e-15)


def test_retention_over_seeds_is_undefined_if_that_of_any_seed_is_or_none_is_common():
    assert retained({1: 0.3, 2: 0.4}, {1: 0.5, 2: 0.0}, ACCURACY) is None
    assert retained({1: 0.3, 2: math.nan}, {1: 0.5, 2: 0.5}, ACCURACY) is None
    assert retained({1: 0.3}, {2: 0.5}, ACCURACY) is None
    # but a seed that is not common does not matter
    assert retained({1: 0.25, 2: 0.3}, {1: 0.5, 3: -1.0}, ACCURACY) == Estimate(0.5, None, 1)


@both_metrics
@given(scores=scores_by_seed)
def test_the_reference_retains_exactly_all_of_itself(metric, scores):
    found = retained(scores, scores, metric)

    assert found is not None
    assert found.mean == 1.0
    assert found.half_width == (None if len(scores) == 1 else 0.0)


@both_metrics
@given(score=positive, reference=positive, factor=st.floats(1e-3, 1e3))
def test_scaling_all_scores_leaves_retention_as_it_is(metric, score, reference, factor):
    found, scaled = retention(score, reference, metric), retention(factor * score, factor * reference, metric)

    assert found is not None
    assert scaled is not None
    # of 2 - ratio, rounding is relative to the ratio
    assert abs(scaled - found) <= 1e-12 * max(1, score / reference)


@both_metrics
@settings(max_examples=25, deadline=None)
@given(scores=scores_by_seed, reference=scores_by_seed, order=st.randoms(use_true_random=False))
def test_the_order_of_seeds_is_irrelevant(metric, scores, reference, order: random.Random):
    shuffled = dict(order.sample(list(scores.items()), len(scores)))

    assert retained(shuffled, reference, metric) == retained(scores, reference, metric)
    assert elasticities(shuffled, reference, 5, 3, metric) == elasticities(scores, reference, 5, 3, metric)
    assert paired_test(shuffled, reference) == paired_test(scores, reference)


# --- elasticity


def test_elasticity_is_gain_in_score_per_gain_in_parameters():
    # (0.88 / 0.8 - 1) / (150 / 100 - 1) = 0.1 / 0.5
    assert elasticity(0.88, 0.8, 150, 100, ACCURACY) == pytest.approx(0.2)


def test_elasticity_of_a_lower_perplexity_with_more_parameters_is_positive():
    # -(36 / 40 - 1) / (300 / 100 - 1) = 0.1 / 2
    assert elasticity(36.0, 40.0, 300, 100, PPL) == pytest.approx(0.05)


def test_elasticity_of_a_loss_in_score_is_negative():
    assert elasticity(44.0, 40.0, 300, 100, PPL) == pytest.approx(-0.05)
    assert elasticity(0.72, 0.8, 150, 100, ACCURACY) == pytest.approx(-0.2)


def test_elasticity_with_fewer_parameters_than_the_baseline():
    # (0.72 / 0.8 - 1) / (50 / 100 - 1) = -0.1 / -0.5
    assert elasticity(0.72, 0.8, 50, 100, ACCURACY) == pytest.approx(0.2)


@both_metrics
def test_elasticity_is_undefined_with_equally_many_parameters(metric):
    assert elasticity(0.9, 0.8, 100, 100, metric) is None
    assert elasticities({1: 0.9}, {1: 0.8}, 100, 100, metric) is None


@both_metrics
@pytest.mark.parametrize(("score", "baseline"), [(0.5, 0.0), (0.5, -0.1), (math.nan, 0.5), (0.5, math.inf)])
def test_elasticity_is_undefined_without_a_positive_baseline_or_finite_scores(metric, score, baseline):
    assert elasticity(score, baseline, 150, 100, metric) is None


def test_elasticity_over_seeds():
    # seed 1: 0.1 / 0.5 = 0.2; seed 2: (0.96 / 0.8 - 1) / 0.5 = 0.4; mean 0.3
    # variance 2 * 0.1^2 / 1 = 0.02; half width 12.7062 * sqrt(0.02 / 2)
    found = elasticities({1: 0.88, 2: 0.96, 5: 0.1}, {1: 0.8, 2: 0.8}, 150, 100, ACCURACY)

    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx(0.3)
    assert found.half_width == pytest.approx(0.1 * math.tan(0.475 * math.pi), rel=1e-9)


def test_elasticity_over_seeds_is_undefined_if_that_of_any_seed_is_or_none_is_common():
    assert elasticities({1: 0.88, 2: 0.96}, {1: 0.8, 2: 0.0}, 150, 100, ACCURACY) is None
    assert elasticities({1: 0.88}, {2: 0.8}, 150, 100, ACCURACY) is None


# --- the paired test


def test_the_paired_test_of_three_seeds():
    # differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641, 2 degrees of freedom;
    # there p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14) = 0.0741799
    found = paired_test({1: 11.0, 2: 12.0, 3: 13.0, 4: 0.0}, {3: 10.0, 2: 10.0, 1: 10.0, 5: 0.0})

    assert found == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)


def test_the_paired_test_of_two_seeds():
    # differences 1 and 3: mean 2, variance 2, t = 2 / sqrt(2 / 2) = 2, 1 degree of freedom (Cauchy):
    # p = 1 - 2 atan(2) / pi = 0.2951672
    assert paired_test({1: 1.0, 2: 3.0}, {1: 0.0, 2: 0.0}) == pytest.approx(1 - 2 * math.atan(2) / math.pi, rel=1e-12)


def test_the_paired_test_is_two_sided():
    low, high = {1: 1.0, 2: 2.5, 3: 2.0}, {1: 2.0, 2: 3.0, 3: 4.0}

    assert paired_test(low, high) == pytest.approx(paired_test(high, low), rel=1e-12)


def test_there_is_no_paired_test_of_fewer_than_two_common_seeds_or_of_scores_that_are_not_finite():
    assert paired_test({1: 1.0, 2: 2.0}, {1: 0.5, 3: 1.0}) is None
    assert paired_test({}, {1: 0.5}) is None
    assert paired_test({1: 1.0, 2: math.nan}, {1: 0.5, 2: 1.0}) is None


def test_equal_differences_give_one_if_zero_and_else_zero():
    assert paired_test({1: 1.5, 2: 2.5}, {1: 1.5, 2: 2.5}) == 1.0
    assert paired_test({1: 1.5, 2: 2.5}, {1: 1.0, 2: 2.0}) == 0.0


@pytest.mark.filterwarnings("error")
def test_differences_that_are_equal_but_for_rounding_do_not_warn():
    assert paired_test({1: 0.3, 2: 0.4, 3: 0.7}, {1: 0.2, 2: 0.3, 3: 0.6}) == pytest.approx(0, abs=1e-12)


# --- Holm's correction


def test_holm_multiplies_the_smallest_p_most():
    # 0.01 * 3, 0.02 * 2, 0.04 * 1; the last may not be below the one before: 0.04
    assert holm({"a": 0.04, "b": 0.01, "c": 0.02}) == pytest.approx({"a": 0.04, "b": 0.03, "c": 0.04})


def test_holm_keeps_the_order_and_stays_at_most_one():
    # 0.03 * 4 = 0.12; 0.04 * 3 = 0.12; 0.5 * 2 = 1; 0.9
    found = holm({"d": 0.9, "a": 0.03, "c": 0.5, "b": 0.04})

    assert found == pytest.approx({"d": 1.0, "a": 0.12, "c": 1.0, "b": 0.12})
    assert list(found) == ["d", "a", "c", "b"]
    # 0.6 * 2 is more than one
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_holm_does_not_count_what_was_not_tested():
    # two tests: 0.01 * 2 and 0.04
    assert holm({"mha": None, "a": 0.01, "b": 0.04}) == {"mha": None, "a": 0.02, "b": 0.04}
    assert holm({"mha": None}) == {"mha": None}


@given(st.dictionaries(st.text(max_size=2), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_a_p_value_nor_swaps_two(p_values):
    found = holm(p_values)

    by_p = sorted(p_values, key=p_values.__getitem__)
    assert all(p_values[name] <= found[name] <= 1 for name in p_values)
    assert all(found[a] <= found[b] for a, b in itertools.pairwise(by_p))


# --- without scipy


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)

    for call in (require_scipy, lambda: estimate([1.0, 2.0]), lambda: paired_test({1: 1.0, 2: 3.0}, {1: 0.0, 2: 0.0})):
        with pytest.raises(ValueError, match=r"mhe-lightning\[compare\]"):
            call()


def test_a_single_seed_needs_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)

    assert estimate([1.0]).mean == 1.0
    assert paired_test({1: 1.0}, {1: 2.0}) is None
