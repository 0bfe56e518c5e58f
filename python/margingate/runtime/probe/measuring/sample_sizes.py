"""How many rows of made-up input are computed at a row count, so that other bits show.

Sums in another order differ in their last bits, and rounding a result to 16 bits hides that in all
but some of 10,000.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from margingate.runtime.probe.operators.operator import Operator

SAMPLE_ROWS = 64  # at every count, at least; twice that from counts above it
ROUNDED = 1 << 18  # results of 16 bits that are compared at every count, where rows have few
MOST_ROWS = 1 << 14  # that either of these asks for


@dataclass(frozen=True)
class SampleSize:
    """Of one operator's sample."""

    least: int = SAMPLE_ROWS  # rows at every count
    calls: int = 1  # at every count, each of so many other rows

    def rows(self, count: int) -> int:
        """Rows that are computed at this count: whole calls."""
        wanted = max(self.least // count, min(self.calls, MOST_ROWS // count), 1)
        return wanted * count

    def whole(self, counts: Iterable[int]) -> int:
        """Rows of a sample for all of these counts."""
        return max(self.least, *map(self.rows, counts))


def size_for(operator: Operator, count: int) -> SampleSize:
    """The size that shows sums in another order; `count` rows are computed to see the results."""
    results = operator.run(operator.sample(count))
    if results.element_size() > 2:
        return SampleSize()
    enough = -(-ROUNDED // results[0].numel())
    calls = enough if operator.differs_by_place else 1
    return SampleSize(min(max(SAMPLE_ROWS, enough), MOST_ROWS), calls)
