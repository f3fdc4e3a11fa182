"""What is computed from scores by seed: intervals, retention (PRR), elasticity (PEoP), paired tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

from mhe_lightning.comparison.results import Estimate, Metric
from mhe_lightning.extras import require


def require_scipy() -> None:
    """Finds out before a long computation whether intervals and tests can be computed.

    Raises:
        ValueError: scipy cannot be imported.
    """
    _scipy_stats()


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of ``values`` and half the width of its 95 % confidence interval by Student's t.

    Args:
        values: one per seed, in any order and unit. If one is not finite, neither is the mean, and the half width is
            None.

    Returns:
        in the unit of the values; the half width is None for a single value.

    Raises:
        ValueError: there are no values.
        ValueError: scipy is needed, for two values or more, and cannot be imported.

    Source: Student 1908, *The Probable Error of a Mean*.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values (none) must be at least one; leave out what has no score")
    if not all(map(math.isfinite, values)):
        return Estimate(sum(values) / n, None, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, n)
    spread = math.hypot(*sorted(value - mean for value in values))  # squares of a diverged perplexity may overflow
    quantile = float(_scipy_stats().t.ppf(0.975, n - 1))
    return Estimate(mean, quantile * spread / math.sqrt((n - 1) * n), n)


def retention(score: float, reference: float, metric: Metric) -> float | None:
    """Performance retention ratio (PRR) of one seed.

    ``score / reference``, or ``1 - (score - reference) / reference`` where lower is better.

    Args:
        score: of a variant, as recorded.
        reference: score of the reference, in the same unit.
        metric: what the scores are.

    Returns:
        1 = all is kept, more than 1 = better than the reference. None where it is not defined, for every metric: the
        reference's score is not positive (Matthews' correlation can be), or one of the two is not finite.

    Source: Xue and Aletras 2023, *Pit One Against Many*.
    """
    if not (math.isfinite(score) and math.isfinite(reference) and reference > 0):
        return None
    return score / reference if metric.higher_is_better else 1 - (score - reference) / reference


def retained(scores: Mapping[int, float], reference: Mapping[int, float], metric: Metric) -> Estimate | None:
    """`retention` of each seed that both have, averaged.

    Args:
        scores: seed → score of a variant, as recorded.
        reference: seed → score of the reference.
        metric: what the scores are.

    Returns:
        None without a common seed, and where `retention` of any common seed is not defined: the mean over the others
        would be of seeds that were chosen by their outcome.

    Raises:
        ValueError: as in `estimate`.
    """
    return _paired(scores, reference, lambda score, other: retention(score, other, metric))


def elasticity(
    score: float, baseline_score: float, parameters: int, baseline_parameters: int, metric: Metric
) -> float | None:
    """Performance elasticity of parameters (PEoP) of one seed: relative gain in score per relative gain in parameters.

    ``(score / baseline_score - 1) / (parameters / baseline_parameters - 1)``; the numerator's sign is turned where
    lower is better.

    Args:
        score: of a variant, as recorded.
        baseline_score: score of the baseline, the single head, in the same unit.
        parameters: of the variant's attention, with output projections, without biases.
        baseline_parameters: of the baseline's attention, at least 1.
        metric: what the scores are.

    Returns:
        more is better, whichever way the metric points. None where it is not defined: the baseline's score is not
        positive, both have equally many parameters (as the baseline itself), or a score is not finite.

    Source: Xue and Aletras 2023, *Pit One Against Many*.
    """
    if not (math.isfinite(score) and math.isfinite(baseline_score) and baseline_score > 0):
        return None
    if parameters == baseline_parameters:
        return None
    gain = score / baseline_score - 1
    return (gain if metric.higher_is_better else -gain) / (parameters / baseline_parameters - 1)


def elasticities(
    scores: Mapping[int, float],
    baseline_scores: Mapping[int, float],
    parameters: int,
    baseline_parameters: int,
    metric: Metric,
) -> Estimate | None:
    """`elasticity` of each seed that both have, averaged.

    Args:
        scores: seed → score of a variant, as recorded.
        baseline_scores: seed → score of the baseline.
        parameters: of the variant's attention, with output projections, without biases.
        baseline_parameters: of the baseline's attention, at least 1.
        metric: what the scores are.

    Returns:
        None without a common seed, and where `elasticity` of any common seed is not defined.

    Raises:
        ValueError: as in `estimate`.
    """
    return _paired(
        scores,
        baseline_scores,
        lambda score, other: elasticity(score, other, parameters, baseline_parameters, metric),
    )


def paired_test(scores: Mapping[int, float], reference: Mapping[int, float]) -> float | None:
    """Two-sided p value of the paired t-test over the seeds that both have.

    Args:
        scores: seed → score of a variant.
        reference: seed → score of the reference, in the same unit.

    Returns:
        None with fewer than two common seeds, or where a score is not finite. Where all differences are equal the
        statistic is 0 / 0 or infinite: 1.0 if they are zero, 0.0 if not.

    Raises:
        ValueError: scipy cannot be imported.
    """
    seeds = common_seeds(scores, reference)
    own, other = [scores[seed] for seed in seeds], [reference[seed] for seed in seeds]
    if len(seeds) < 2 or not all(map(math.isfinite, own + other)):
        return None
    differences = {a - b for a, b in zip(own, other, strict=True)}
    if len(differences) == 1:
        return 1.0 if differences == {0.0} else 0.0
    with warnings.catch_warnings():
        # of differences that are equal but for rounding: p is next to 0, as it should be
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(_scipy_stats().ttest_rel(own, other).pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm-Bonferroni corrected p values: below α at a chance of at most α that any of the true hypotheses is rejected.

    Args:
        p_values: name of a comparison → p; None where there is no test, which then does not count.

    Returns:
        the same names in the same order.

    Source: Holm 1979, *A Simple Sequentially Rejective Multiple Test Procedure*.
    """
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[name] = largest
    return corrected


def common_seeds(*scores: Mapping[int, float]) -> list[int]:
    """Seeds that all of ``scores``, at least one, have, in order."""
    return sorted(set(scores[0]).intersection(*scores[1:]))


def _paired(
    scores: Mapping[int, float], others: Mapping[int, float], measure: Callable[[float, float], float | None]
) -> Estimate | None:
    measured = [measure(scores[seed], others[seed]) for seed in common_seeds(scores, others)]
    defined = [value for value in measured if value is not None]
    return estimate(defined) if defined and len(defined) == len(measured) else None


def _scipy_stats() -> ModuleType:
    return require("scipy.stats", "compare", "compare runs")
