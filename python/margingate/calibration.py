"""From steps with and without flips to a threshold: pure arithmetic.

A step is one decoded row of a batched run that was forced along the answer its request gives
alone. It flips if the batched run would have chosen another token. A threshold misses the flips
whose margin it does not reach.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

GRID = 64  # thresholds are multiples of 1/64 logit


class TooFewStepsError(ValueError):
    """The steps cannot support the target, whatever the threshold."""

    def __init__(self, steps: int, needed: int) -> None:
        super().__init__(steps, needed)
        self.steps, self.needed = steps, needed


@dataclass(frozen=True)
class Choice:
    """A threshold and what is known about it."""

    threshold: float  # logits
    missed: int  # flips seen with a margin at or above it
    miss_bound: float  # upper confidence bound on missed flips per step


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


def choose_threshold(
    margins: Sequence[float],
    flips: Sequence[float],
    target: float,
    confidence: float,
    *,
    headroom: float = 0.0,
) -> Choice:
    """The smallest threshold whose missed flips are bounded by `target` per step, and `headroom`.

    The bound takes each step for a trial, so the same numbers of one step in several batches have
    to be given once.

    Args:
        margins: of all distinct steps, logits; NaN counts as flagged by any threshold.
        flips: of those steps that flipped.
        target: missed flips per step.
        confidence: of the bound, below 1.
        headroom: logits, added to that threshold; the rest of the choice is of the sum.

    Raises:
        TooFewStepsError: even without a missed flip the bound is above `target`.
    """
    steps = len(margins)
    if miss_bound(0, max(steps, 1), confidence) > target:
        raise TooFewStepsError(steps, steps_needed(target, confidence))
    ascending = sorted(margin for margin in flips if not math.isnan(margin))
    for threshold in (0.0, *sorted({above(margin) for margin in ascending})):
        missed = len(ascending) - bisect_left(ascending, threshold)
        if miss_bound(missed, steps, confidence) <= target:
            break
    threshold += headroom
    missed = len(ascending) - bisect_left(ascending, threshold)
    return Choice(threshold, missed, miss_bound(missed, steps, confidence))


def flagged_share(margins: Sequence[float], threshold: float) -> float:
    """The share of these margins, logits, that a threshold flags; NaN by any."""
    return sum(not margin >= threshold for margin in margins) / len(margins)


def above(margin: float) -> float:
    """The first multiple of 1/GRID that flags `margin`."""
    return (math.floor(margin * GRID) + 1) / GRID
