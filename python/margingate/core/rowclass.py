"""Which row counts give a row the same bits, and how to stay within one such class.

A GEMM picks its reduction order by its number of rows. Counts that pick the same order form a
class; a call with another number of rows can be padded up to the class or run in pieces of it, or
all calls go to a kernel that reduces in one order at every row count. Where that is the class's
order, each call goes to whichever is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple


class Route(NamedTuple):
    """How calls with up to `rows` rows are made, where another call has the same bits sooner."""

    rows: int
    kernel: bool  # by the batch-invariant kernel; otherwise by the operator
    padded: int = 0  # with so many rows; 0: as they are

    @property
    def made(self) -> int:
        """Rows of the call that is made."""
        return self.padded or self.rows

    @property
    def plain(self) -> bool:
        """Whether it is the call that would be made without a plan."""
        return not self.kernel and not self.padded


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Row counts `low` to `high` of an operator give a row the same bits.

    With `own_kernel` not of the operator as it is, but of the batch-invariant kernel in its place.
    `routes`, by ascending rows, do not matter to the bits: the first one that reaches is taken.
    """

    low: int
    high: int
    own_kernel: bool = False
    routes: tuple[Route, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"a row class runs from 1 up, not from {self.low} to {self.high}")
        # JSON has lists in their place.
        object.__setattr__(self, "routes", tuple(Route(*route) for route in self.routes))

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """(start, stop) of each call for `rows` rows; none longer than `high`.

        Pieces are as equal as can be. The batch-invariant kernel takes all rows at once.
        """
        if self.own_kernel or rows <= self.high:
            return [(0, rows)]
        count = -(-rows // self.high)
        cuts = [rows * i // count for i in range(count + 1)]
        return list(pairwise(cuts))

    def route(self, rows: int) -> Route:
        """How a call of `rows` rows, one of `pieces`, is made."""
        if self.own_kernel:
            return Route(rows, kernel=True)
        padded = self.low if rows < self.low else 0
        return self._routed(rows) or Route(rows, kernel=False, padded=padded)

    def holds(self, rows: int) -> bool:
        """Whether the operator is called with these `rows` rows, as it would be without a plan."""
        if self.own_kernel or rows > self.high:
            return False
        route = self._routed(rows)
        return rows >= self.low if route is None else route.plain

    def _routed(self, rows: int) -> Route | None:
        for route in self.routes:  # a loop, since it is asked in every call of every layer
            if rows <= route.rows:
                return route
        return None

    @property
    def by_kernel(self) -> int:
        """The most rows that the batch-invariant kernel is called with; 0: it is not used."""
        if self.own_kernel:
            return self.high
        return max((route.made for route in self.routes if route.kernel), default=0)

    def __str__(self) -> str:
        if self.own_kernel:
            return "run by the batch-invariant kernel"
        said = [f"kept to {self.low} to {self.high}"] if self.low > 1 or not self.routes else []
        if self.by_kernel:
            said.append(f"up to {self.by_kernel} by the batch-invariant kernel with the same bits")
        return ", ".join(said)


def runs(classes: Mapping[int, int]) -> list[tuple[list[int], int]]:
    """Neighbouring row counts of one class, ascending, with the class."""
    grouped = groupby(sorted(classes.items()), key=lambda item: item[1])
    return [([count for count, _ in items], key) for key, items in grouped]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call by row count: the operator as it is, and the kernel in its place."""

    operator: Mapping[int, float]
    kernel: Mapping[int, float] | None  # None: there is none, or its bits depend on the row count
    joins: bool = False  # up to `reach` rows the kernel has the bits of the operator's last class


class NoPlanError(Exception):
    """No class holds the largest row count, and there is no kernel in the operator's place."""


def choose(
    classes: Mapping[int, int], times: Times | None = None, *, to_the_top: bool = False
) -> RowPlan | None:
    """How to stay within one class; None: all row counts are in one, and as fast as can be.

    It is the class that leaves most of the measured row counts as they are, or that of the largest,
    where the kernel joins it. A plan that is clearly faster, by the times of calls with the row
    counts of decode graphs, is taken instead.

    Args:
        classes: a class number for each measured row count; counts between two neighbours of
            one class are taken to be in it too.
        times: for some of these row counts.
        to_the_top: only a class that holds the largest row count will do: it is a prefill's.

    Raises:
        NoPlanError: with `to_the_top`, where nothing will do.
    """
    found = runs(classes)
    joined = None
    if times is not None and times.kernel is not None and times.joins:
        joined = _joined(found[-1][0][0], max(classes), times)
    if len(found) == 1:
        return joined if joined and joined.routes else None
    if to_the_top:
        found = [run for run in found[-1:] if run[0][0] <= MOST_PADDED]
    found.sort(key=lambda run: (-len(run[0]), run[0][0]))
    plans = [RowPlan(counts[0], counts[-1]) for counts, _ in found]
    if joined is not None:
        plans.insert(0, joined)
    elif times is not None and times.kernel is not None:
        plans.append(RowPlan(1, max(classes), own_kernel=True))
    if not plans:
        raise NoPlanError
    if times is None:
        return plans[0]
    return plans[_cheapest([_cost(plan, times) for plan in plans])]


MOST_PADDED = 64  # rows that a step of one row may be padded to
ROUTED = 128  # rows up to which the kernel is tried where the operator is in the class too
CLEARLY = 0.98  # times differ from run to run; a plan should not
CALLS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of decode graphs
EXTRA_US = 2.5  # to pad, or to put pieces together: a small kernel each, within a graph


def timed_counts(classes: Mapping[int, int]) -> list[int]:
    """The row counts whose times `choose` asks for."""
    lows = {run[0] for run, _ in runs(classes)}
    return sorted(lows | {count for count in CALLS if count <= max(classes)} | {_last(classes)})


def reach(classes: Mapping[int, int]) -> int:
    """Up to how many rows the kernel is of use beside the last class."""
    return max(runs(classes)[-1][0][0] - 1, min(ROUTED, max(classes) - 1))


def _last(classes: Mapping[int, int]) -> int:
    return min(max(classes), CALLS[-1])


def _joined(low: int, high: int, times: Times) -> RowPlan:
    """The class from `low` up, with the fastest way to make each call that the kernel may make."""
    assert times.kernel is not None
    routes: list[Route] = []
    before = 0
    for rows in sorted(times.kernel):
        ways = [Route(rows, False)] if before + 1 >= low else []
        ways += [Route(rows, True)]
        ways += [Route(rows, False, more) for more in times.operator if more >= max(rows, low)]
        ways += [Route(rows, True, more) for more in times.kernel if more > rows]
        best = ways[_cheapest([_route_us(way, times) for way in ways])]
        if routes and routes[-1]._replace(rows=rows) == best:
            routes.pop()
        routes.append(best)
        before = rows
    while routes and routes[-1].plain:
        routes.pop()
    return RowPlan(low, high, routes=tuple(routes))


def _cheapest(costs: Sequence[float]) -> int:
    """The first, unless another one is clearly cheaper."""
    found = costs.index(min(costs))
    return found if costs[found] < CLEARLY * costs[0] else 0


def _cost(plan: RowPlan, times: Times) -> float:
    """Mean time of calls with CALLS rows, each relative to the same call as it is."""
    calls = [rows for rows in CALLS if rows <= max(times.operator)]
    total = 0.0
    for rows in calls:
        pieces = [stop - start for start, stop in plan.pieces(rows)]
        spent = sum(_route_us(plan.route(piece)._replace(rows=piece), times) for piece in pieces)
        total += (spent + EXTRA_US * (len(pieces) > 1)) / _at(times.operator, rows)
    return total / len(calls)


def _route_us(route: Route, times: Times) -> float:
    """Microseconds of a call with so many rows."""
    used = times.kernel if route.kernel and times.kernel else times.operator
    return _at(used, route.made) + EXTRA_US * (route.padded > 0)


def _at(times: Mapping[int, float], rows: int) -> float:
    """The time at the next row count that was timed."""
    return times[min((count for count in times if count >= rows), default=max(times))]
