"""Which row counts give a row the same bits, and how to stay within one such class.

A GEMM picks its reduction order by its number of rows. Counts that pick the same order form a
class; a call with another number of rows can be padded up to the class or run in pieces of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Row counts `low` to `high` of an operator give a row the same bits."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"a row class runs from 1 up, not from {self.low} to {self.high}")

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """(start, stop) of each call for `rows` rows; none longer than `high`.

        Pieces are as equal as can be. One shorter than `low` is to be padded to `low`.
        """
        if rows <= self.high:
            return [(0, rows)]
        count = -(-rows // self.high)
        cuts = [rows * i // count for i in range(count + 1)]
        return list(pairwise(cuts))

    def holds(self, rows: int) -> bool:
        """Whether a call with `rows` rows is in the class as it is."""
        return self.low <= rows <= self.high


def runs(classes: Mapping[int, int]) -> list[tuple[list[int], int]]:
    """Neighbouring row counts of one class, ascending, with the class."""
    grouped = groupby(sorted(classes.items()), key=lambda item: item[1])
    return [([count for count, _ in items], key) for key, items in grouped]


def choose(classes: Mapping[int, int]) -> RowPlan | None:
    """The class that leaves most of the measured row counts as they are; None: all are one.

    Args:
        classes: a class number for each measured row count; counts between two neighbours of
            one class are taken to be in it too.
    """
    found = runs(classes)
    if len(found) == 1:
        return None
    best = max(found, key=lambda run: (len(run[0]), -run[0][0]))[0]
    return RowPlan(best[0], best[-1])
