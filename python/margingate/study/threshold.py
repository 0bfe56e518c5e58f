"""From steps with and without flips to a threshold: pure arithmetic.

A step is one decoded row of a batched run that was forced along the answer its request gives
alone. It flips if the batched run would have chosen another token, so only a step that moved can,
one with other numbers than alone. A threshold misses the flips whose margin it does not reach.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from margingate.confidence import miss_bound, steps_needed

GRID = 64  # thresholds are multiples of 1/64 logit
MANTISSA = {"torch.bfloat16": 7, "torch.float16": 10}  # bits; float32 has 23


class TooFewStepsError(ValueError):
    """The steps cannot support the target, whatever the threshold."""

    def __init__(self, distinct: int, needed: int) -> None:
        super().__init__(distinct, needed)
        self.distinct, self.needed = distinct, needed


@dataclass(frozen=True)
class Trials:
    """What a bound rests on: counts of steps."""

    steps: int
    moved: int  # of them, with other numbers than alone
    distinct: int  # of these, the same numbers of a step in several batches counted once

    def bound(self, missed: int, confidence: float) -> float:
        """Upper confidence bound on missed flips per step, of the mix of batches that was run.

        The share of steps that move, times the share of missed flips among those. Each has half
        of the doubt (Bonferroni). Steps with the same numbers are one trial of the second only.

        Args:
            missed: flips, of the distinct steps.
        """
        each = (1 + confidence) / 2
        return self.moving(each) * miss_bound(missed, self.distinct, each)

    def moving(self, confidence: float) -> float:
        """Upper confidence bound on the share of steps that move."""
        return miss_bound(self.moved, self.steps, confidence)

    def needed(self, target: float, confidence: float) -> int:
        """Distinct steps that moved, without a miss, from which on the bound is `target`."""
        each = (1 + confidence) / 2
        return steps_needed(min(target / self.moving(each), 0.5), each)


@dataclass(frozen=True)
class Choice:
    """A threshold and what is known about it."""

    threshold: float  # logits
    missed: int  # flips seen with a margin at or above it
    miss_bound: float  # upper confidence bound on missed flips per step; see Trials


def choose_threshold(
    trials: Trials,
    flips: Sequence[float],
    target: float,
    confidence: float,
    *,
    headroom: float = 0.0,
) -> Choice:
    """The smallest threshold whose missed flips are bounded by `target` per step, and `headroom`.

    Args:
        trials: what was run.
        flips: gaps of the distinct steps that flipped, logits; any threshold flags NaN.
        target: missed flips per step.
        confidence: of the bound, below 1.
        headroom: logits, added to that threshold; the rest of the choice is of the sum.

    Raises:
        TooFewStepsError: even without a missed flip the bound is above `target`.
    """
    if trials.bound(0, confidence) > target:
        raise TooFewStepsError(trials.distinct, trials.needed(target, confidence))
    ascending = sorted(margin for margin in flips if not math.isnan(margin))
    for threshold in (0.0, *sorted({above(margin) for margin in ascending})):
        missed = len(ascending) - bisect_left(ascending, threshold)
        if trials.bound(missed, confidence) <= target:
            break
    threshold += headroom
    missed = len(ascending) - bisect_left(ascending, threshold)
    return Choice(threshold, missed, trials.bound(missed, confidence))


def widest_gap(margin: float, best: float, dtype: str) -> float:
    """Logits: what may have lain between the two best ones before they were rounded to `dtype`.

    Each is off by half a step at most, and at `best`, the larger one, steps are the wider ones.
    """
    exponent = math.floor(math.log2(max(abs(best), 2.0**-100)))
    return margin + 2.0 ** (exponent - MANTISSA.get(dtype, 23))


def flagged_share(margins: Sequence[float], threshold: float) -> float:
    """The share of these margins, logits, that a threshold flags; NaN by any."""
    return sum(not margin >= threshold for margin in margins) / len(margins)


def above(margin: float) -> float:
    """The first multiple of 1/GRID that flags `margin`."""
    return (math.floor(margin * GRID) + 1) / GRID
