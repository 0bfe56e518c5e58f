"""Which row counts give a row the same bits, and how to stay within one such class.

A GEMM picks its reduction order by its number of rows. Counts that pick the same order form a
class; a call with another number of rows can be padded up to the class or run in pieces of it, or
all calls go to a kernel that reduces in one order at every row count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Row counts `low` to `high` of an operator give a row the same bits.

    With `own_kernel` not of the operator as it is, but of the batch-invariant kernel in its place.
    """

    low: int
    high: int
    own_kernel: bool = False

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
        """Whether the operator as it is, called with `rows` rows, is in the class."""
        return not self.own_kernel and self.low <= rows <= self.high

    def __str__(self) -> str:
        if self.own_kernel:
            return "run by the batch-invariant kernel"
        return f"kept to {self.low} to {self.high}"


def runs(classes: Mapping[int, int]) -> list[tuple[list[int], int]]:
    """Neighbouring row counts of one class, ascending, with the class."""
    grouped = groupby(sorted(classes.items()), key=lambda item: item[1])
    return [([count for count, _ in items], key) for key, items in grouped]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call by row count: the operator as it is, and the kernel in its place."""

    operator: Mapping[int, float]
    kernel: Mapping[int, float] | None  # None: there is none, or its bits depend on the row count


class NoPlanError(Exception):
    """No class holds the largest row count, and there is no kernel in the operator's place."""


def choose(
    classes: Mapping[int, int], times: Times | None = None, *, to_the_top: bool = False
) -> RowPlan | None:
    """How to stay within one class; None: all row counts are in one.

    It is the class that leaves most of the measured row counts as they are. A plan that is clearly
    faster, by the times of calls with the row counts of decode graphs, is taken instead.

    Args:
        classes: a class number for each measured row count; counts between two neighbours of
            one class are taken to be in it too.
        times: for some of these row counts.
        to_the_top: only a class that holds the largest row count will do: it is a prefill's.

    Raises:
        NoPlanError: with `to_the_top`, where nothing will do.
    """
    found = runs(classes)
    if len(found) == 1:
        return None
    if to_the_top:
        found = [run for run in found[-1:] if run[0][0] <= MOST_PADDED]
    found.sort(key=lambda run: (-len(run[0]), run[0][0]))
    plans = [RowPlan(counts[0], counts[-1]) for counts, _ in found]
    if times is not None and times.kernel is not None:
        plans.append(RowPlan(1, max(classes), own_kernel=True))
    if not plans:
        raise NoPlanError
    if times is None:
        return plans[0]
    costs = [_cost(plan, times) for plan in plans]
    cheapest = costs.index(min(costs))
    return plans[cheapest if costs[cheapest] < CLEARLY * costs[0] else 0]


MOST_PADDED = 64  # rows that a step of one row may be padded to
CLEARLY = 0.98  # times differ from run to run; a plan should not
CALLS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # row counts of decode graphs
EXTRA_US = 2.5  # to pad, or to put pieces together: a small kernel each, within a graph


def timed_counts(classes: Mapping[int, int]) -> list[int]:
    """The row counts whose times `choose` asks for."""
    lows = {run[0] for run, _ in runs(classes)}
    return sorted(lows | {count for count in CALLS if count <= max(classes)} | {_last(classes)})


def _last(classes: Mapping[int, int]) -> int:
    return min(max(classes), CALLS[-1])


def _cost(plan: RowPlan, times: Times) -> float:
    """Mean time of calls with CALLS rows, each relative to the same call as it is."""
    timed = sorted(times.operator)
    used = times.kernel if plan.own_kernel and times.kernel else times.operator
    calls = [rows for rows in CALLS if rows <= timed[-1]]
    total = 0.0
    for rows in calls:
        pieces = [stop - start for start, stop in plan.pieces(rows)]
        spent = sum(_at(used, max(piece, plan.low)) for piece in pieces)
        extra = EXTRA_US * (sum(piece < plan.low for piece in pieces) + (len(pieces) > 1))
        total += (spent + extra) / _at(times.operator, rows)
    return total / len(calls)


def _at(times: Mapping[int, float], rows: int) -> float:
    """The time at the next row count that was timed."""
    return times[min((count for count in times if count >= rows), default=max(times))]
