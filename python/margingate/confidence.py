"""Confidence bounds on rates of rare events: pure arithmetic, with SciPy's quantiles."""

from __future__ import annotations

import math


def miss_bound(missed: int, steps: int, confidence: float) -> float:
    """Upper end of the one-sided Clopper-Pearson interval for `missed` of `steps`.

    Clopper and Pearson, Biometrika 26 (1934), for independent trials. Steps of one answer are not
    quite that, so take it as an order of magnitude.
    """
    if missed >= steps:
        return 1.0
    from scipy.stats import beta

    return float(beta.ppf(confidence, missed + 1, steps - missed))


def clopper_pearson(count: int, of: int, confidence: float) -> tuple[float, float]:
    """The two-sided interval for `count` of `of`; (0, 1) for 0 of 0."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, of - count)) if count < of else 1.0
    return low, high


def steps_needed(target: float, confidence: float) -> int:
    """Steps without a miss from which on `miss_bound` is at most `target`."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-target))
