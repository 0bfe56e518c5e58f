"""Margins of all steps, and of those that flipped, in fixed bins."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from math import isnan


def _edges() -> tuple[float, ...]:
    # BF16 logits between 8 and 32 are multiples of 1/16 and 1/8, and so are most margins.
    fine = [step / 16 for step in range(33)]
    coarse = [2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32]
    return (*fine, *map(float, coarse))


EDGES = _edges()  # logits; a bin holds its lower edge, the last also all above
_UNCOUNTED = 1024  # margins; to count them together takes less than a few at each step
_WAITING = 4096  # different margins; those of BF16 logits are few, and come again and again


class MarginHistogram:
    """Counts of margins (logits) of steps and of flips. NaN margins are not counted."""

    def __init__(self) -> None:
        self.flips = [0] * (len(EDGES) - 1)
        self._steps = [0] * (len(EDGES) - 1)
        self._uncounted: list[float] = []  # margins of steps, as they came
        self._waiting: Counter[float] = Counter()  # and those counted that are in no bin yet

    @property
    def steps(self) -> list[int]:
        """By bin."""
        self._fill()
        return list(self._steps)

    def add_steps(self, margins: Iterable[float]) -> None:
        """Count one step for each margin."""
        self._uncounted.extend(margins)
        if len(self._uncounted) > _UNCOUNTED:
            self._count()
            if len(self._waiting) > _WAITING:
                self._fill()

    def add_flip(self, margin: float) -> None:
        """Count a flip of a row that the fast path emitted with this margin."""
        if not isnan(margin):
            self.flips[_bin(margin)] += 1

    def record(self) -> dict[str, list[float]]:
        """Edges and counts, ready for JSON."""
        steps: list[float] = [*self.steps]
        return {"edges": list(EDGES), "steps": steps, "flips": list(self.flips)}

    def _count(self) -> None:
        self._waiting.update(self._uncounted)
        self._uncounted.clear()

    def _fill(self) -> None:
        self._count()
        for margin, count in self._waiting.items():
            if not isnan(margin):
                self._steps[_bin(margin)] += count
        self._waiting.clear()


def _bin(margin: float) -> int:
    return min(max(bisect_right(EDGES, margin) - 1, 0), len(EDGES) - 2)
