"""Which row counts give a row the same bits, and how to stay within one such class.

A GEMM picks its reduction order by its number of rows. Counts that pick the same order form a
class. A class is a set of counts and seldom a range: cuBLAS has holes at odd counts. A plan calls
an operator with measured counts of one class only; a call with another number of rows is padded up
to the next one or run in pieces, or it goes to a kernel that reduces in one order at every count.
Where that order is the class's, each call goes to whichever is faster. Nothing is interpolated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

Span = tuple[int, int]  # from and to, both included
MOST_PADDED = 64  # rows that a step of one row may be padded to
MOST_PREFILL_PADDED = 512  # rows that a prefill of one row may be padded to
LARGE = 1024  # rows of a piece that takes as long a row as a larger call: products bound it
ROUTED = 128  # rows up to which the kernel is tried where the operator is in the class too
CLEARLY = 0.98  # times differ from run to run; a plan should not
CALLS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of decode graphs
EXTRA_US = 2.5  # to pad, or to put pieces together: a small kernel each, within a graph


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


class Call(NamedTuple):
    """One call for some rows of an input."""

    start: int
    stop: int
    made: int  # rows of the call: those from start to stop, and padding
    kernel: bool  # by the batch-invariant kernel; otherwise by the operator


def spans(counts: Iterable[int]) -> tuple[Span, ...]:
    """Runs of consecutive numbers among `counts`, ascending."""
    ordered = sorted(set(counts))
    grouped = groupby(enumerate(ordered), key=lambda item: item[1] - item[0])
    runs_of = ([count for _, count in items] for _, items in grouped)
    return tuple((run[0], run[-1]) for run in runs_of)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """An operator gives a row the same bits in calls with each of these row counts.

    `counts` are spans of counts that were all measured. With `batch_invariant` they are those
    of the batch-invariant kernel in the operator's place, which reduces in one order at every
    count: they are a sample, and it takes any count. `routes`, by ascending rows, do not matter
    to the bits: the first one that reaches is taken.
    """

    counts: tuple[Span, ...]
    batch_invariant: bool = False
    routes: tuple[Route, ...] = ()
    _highs: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # JSON has lists in their place.
        counts = tuple((int(low), int(high)) for low, high in self.counts)
        ends = [end for span in counts for end in span]
        if not ends or ends[0] < 1 or ends != sorted(ends):
            raise ValueError(f"the row counts of a class ascend from 1 up, unlike {counts}")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "routes", tuple(Route(*route) for route in self.routes))
        object.__setattr__(self, "_highs", tuple(high for _, high in counts))

    @property
    def low(self) -> int:
        """The smallest row count of the class."""
        return self.counts[0][0]

    @property
    def high(self) -> int:
        """The largest one; more rows run in pieces."""
        return self._highs[-1]

    def bits(self) -> list[Any]:
        """What the bits of a row depend on, for a fingerprint: no two classes begin alike."""
        return [self.low, self.high, self.batch_invariant]

    def record(self) -> list[Any]:
        """For JSON: `RowPlan(*record)` is the plan again."""
        return [self.counts, self.batch_invariant, self.routes]

    def calls(self, rows: int) -> list[Call]:
        """The calls for `rows` rows. The batch-invariant kernel takes all of them at once."""
        if self.batch_invariant:
            return [Call(0, rows, rows, True)]
        if rows <= self.high:
            return [self._call(0, rows)]
        pieces = -(-rows // self.high)
        size = self._next(-(-rows // pieces))
        return [self._call(start, min(start + size, rows)) for start in range(0, rows, size)]

    def runs_as_is(self, rows: int) -> bool:
        """Whether the operator is called with these `rows` rows, as it would be without a plan."""
        if self.batch_invariant or rows > self.high:
            return False
        route = self._routed(rows)
        return self._next(rows) == rows if route is None else route.plain

    def _call(self, start: int, stop: int) -> Call:
        rows = stop - start
        route = self._routed(rows)
        if route is None:
            return Call(start, stop, self._next(rows), False)
        return Call(start, stop, route.padded or rows, route.kernel)

    def _next(self, rows: int) -> int:
        """The least row count of the class that has room for `rows`, `high` at most."""
        low, _ = self.counts[bisect_left(self._highs, rows)]
        return max(rows, low)

    def _routed(self, rows: int) -> Route | None:
        for route in self.routes:  # a loop, since it is asked in every call of every layer
            if rows <= route.rows:
                return route
        return None

    @property
    def by_kernel(self) -> int:
        """The most rows that the batch-invariant kernel is called with; 0: it is not used."""
        if self.batch_invariant:
            return self.high
        return max((route.made for route in self.routes if route.kernel), default=0)

    def __str__(self) -> str:
        if self.batch_invariant:
            return "run by the batch-invariant kernel"
        total = sum(high - low + 1 for low, high in self.counts)
        said = [f"kept to {total} row counts from {self.low} to {self.high}"]
        if self.by_kernel:
            said.append(f"up to {self.by_kernel} by the batch-invariant kernel with the same bits")
        return ", ".join(said)


def runs(classes: Mapping[int, int]) -> list[tuple[list[int], int]]:
    """Neighbouring measured row counts of one class, ascending, with the class."""
    grouped = groupby(sorted(classes.items()), key=lambda item: item[1])
    return [([count for count, _ in items], key) for key, items in grouped]


def members(classes: Mapping[int, int]) -> dict[int, list[int]]:
    """The row counts of each class, ascending."""
    found: dict[int, list[int]] = {}
    for count in sorted(classes):
        found.setdefault(classes[count], []).append(count)
    return found


def top(classes: Mapping[int, int]) -> list[int]:
    """The row counts of the class that holds the largest one."""
    return members(classes)[classes[max(classes)]]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call by row count: the operator as it is, and the kernel in its place."""

    operator: Mapping[int, float]
    kernel: Mapping[int, float] | None  # None: there is none, or its bits depend on the row count
    joins: Collection[int] = ()  # row counts at which the kernel has the bits of the top class
    busiest: int | None = None  # see `timed_counts`


class NoPlanError(Exception):
    """No class will do for a prefill, and there is no kernel in the operator's place."""


def choose(
    classes: Mapping[int, int], times: Times | None = None, *, to_the_top: bool = False
) -> RowPlan:
    """How to stay within one class of measured row counts.

    It is the class that leaves most of the measured row counts as they are, or that of the largest,
    where the kernel joins it. A plan that is clearly faster, by the times of calls with the row
    counts of decode graphs, is taken instead. For a prefill a class must hold the largest row
    count, or be one of which large pieces make it up.

    Args:
        classes: a class number for each measured row count.
        times: for some of these row counts.
        to_the_top: only a class that will do for a prefill, up to the largest row count.

    Raises:
        NoPlanError: with `to_the_top`, where nothing will do.
    """
    found = _that_serve_prefill(classes, MOST_PADDED) if to_the_top else _largest_first(classes)
    plans = [RowPlan(spans(counts)) for counts in found]
    if times is not None and times.kernel is not None:
        if times.joins:
            plans.insert(0, _joined(top(classes), times))
        elif len(set(classes.values())) > 1:
            plans.append(RowPlan(((1, max(classes)),), batch_invariant=True))
    if not plans:
        raise NoPlanError
    if times is None or len(plans) == 1:
        return plans[0]
    return plans[_cheapest([_cost(plan, times) for plan in plans])]


def choose_for_prefill(classes: Mapping[int, int]) -> RowPlan | None:
    """How to stay within a class in prefills alone, where none serves decode steps too.

    It is the class that leaves most of the row counts as they are, among those of the largest count
    or else those of large pieces, if small prefills are not padded by much. None: there is none.
    """
    found = _that_serve_prefill(classes, MOST_PREFILL_PADDED)
    return RowPlan(spans(found[0])) if found else None


def _largest_first(classes: Mapping[int, int]) -> list[list[int]]:
    """The row counts of each class, ascending."""
    return sorted(members(classes).values(), key=lambda counts: (-len(counts), counts[0]))


def _that_serve_prefill(classes: Mapping[int, int], padded: int) -> list[list[int]]:
    """Those of `_largest_first` that may run a prefill of up to the largest row count.

    Args:
        padded: rows that a call of one row may be padded to.
    """
    largest = max(classes)
    found = [
        counts
        for counts in _largest_first(classes)
        if counts[0] <= padded and counts[-1] >= min(largest, LARGE)
    ]
    whole = [counts for counts in found if counts[-1] == largest]
    return whole or found  # no pieces where none are needed


def timed_counts(classes: Mapping[int, int], busiest: int | None = None) -> list[int]:
    """The row counts whose times `choose` asks for: first ones of classes, and those of graphs.

    Args:
        busiest: rows of the largest call that plans are chosen by, which runs in pieces where no
            class has as many. None: the most that classes have.
    """
    largest = min(max(classes) if busiest is None else busiest, CALLS[-1])
    lows = {counts[0] for counts in members(classes).values() if len(counts) > 1}
    return sorted({largest, *lows, *(count for count in CALLS if count <= largest)})


def reaches(classes: Mapping[int, int]) -> list[int]:
    """Up to how many rows the kernel is of use beside the top class, the most first.

    That is up to the last row count of a decode step that is in another class. It is enough if the
    kernel has the bits of the top class below all counts of that class.
    """
    of_top = top(classes)
    fewer = max(of_top[0] - 1, min(ROUTED, max(classes) - 1))
    others = set(classes).difference(of_top)
    last = max((count for count in others if count <= CALLS[-1]), default=0)
    return [last, fewer] if last > fewer else [fewer]


def _joined(counts: Sequence[int], times: Times) -> RowPlan:
    """The class of these counts, with the fastest way to make each call that the kernel may make.

    A way that leaves calls as they are is one for the row counts since the last that was timed,
    so each of these must have been measured.
    """
    assert times.kernel is not None
    own, joined = set(counts), set(times.joins)
    routes: list[Route] = []
    before = 0
    for rows in sorted(joined.intersection(times.kernel)):
        between = set(range(before + 1, rows + 1))
        ways = [Route(rows, False)] if between <= own else []
        ways += [Route(rows, True)] if between <= joined else []
        ways += [Route(rows, False, n) for n in times.operator if n >= rows and n in own]
        ways += [Route(rows, True, n) for n in times.kernel if n >= rows and n in joined]
        best = ways[_cheapest([_route_us(way, times) for way in ways])]
        if routes and routes[-1]._replace(rows=rows) == best:
            routes.pop()
        routes.append(best)
        before = rows
    while routes and routes[-1].plain:
        routes.pop()
    return RowPlan(spans(counts), routes=tuple(routes))


def _cheapest(costs: Sequence[float]) -> int:
    """The first, unless another one is clearly cheaper."""
    found = costs.index(min(costs))
    return found if costs[found] < CLEARLY * costs[0] else 0


def _cost(plan: RowPlan, times: Times) -> float:
    """Mean time of calls with CALLS rows, each relative to the same call as it is."""
    asked = [rows for rows in CALLS if rows <= (times.busiest or max(times.operator))]
    total = 0.0
    for rows in asked:
        calls = plan.calls(rows)
        spent = sum(_call_us(call, times) for call in calls)
        total += (spent + EXTRA_US * (len(calls) > 1)) / _at(times.operator, rows)
    return total / len(asked)


def _call_us(call: Call, times: Times) -> float:
    used = times.kernel if call.kernel and times.kernel else times.operator
    return _at(used, call.made) + EXTRA_US * (call.made > call.stop - call.start)


def _route_us(route: Route, times: Times) -> float:
    """Microseconds of a call with so many rows."""
    padding = max(route.padded - route.rows, 0)
    return _call_us(Call(0, route.made - padding, route.made, route.kernel), times)


def _at(times: Mapping[int, float], rows: int) -> float:
    """The time at the next row count that was timed."""
    return times[min((count for count in times if count >= rows), default=max(times))]
