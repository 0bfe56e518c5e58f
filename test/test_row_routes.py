"""No operator is ever called with a row count that was not measured, whatever its classes are.

Operators here are made up: each has an arbitrary class at each row count, holes included, and bits
of its own at every count that was not measured. So a call that should not have been made shows in
the results. Small numbers of row counts are gone through one and all, and need no luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from margingate.core.rowclass import (
    NoPlanError,
    Route,
    RowPlan,
    Times,
    choose,
    reaches,
    spans,
    timed_counts,
    top,
)
from margingate.runtime.probe.measuring.classes import groups, prefill_counts, row_counts
from margingate.runtime.probe.planning import all_reduce, execute, plans

WIDTH = 4
Classes = Mapping[int, int]


class MadeUp:
    """An operator that adds to each row its class at the row count of the call."""

    def __init__(self, classes: Classes) -> None:
        self.classes = classes
        self.called: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = len(x)
        self.called.append(count)
        return x + self.classes.get(count, -1 - count)  # not measured: as at no other count


class Served:
    """An operator, and the batch-invariant kernel in its place, with the plan for both."""

    def __init__(self, plan: RowPlan, operator: Classes, kernel: Classes) -> None:
        self.plan, self.operator, self.kernel = plan, MadeUp(operator), MadeUp(kernel)
        self.key = operator[plan.low]

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer()
        result: torch.Tensor = execute.apply_linear(
            lambda _method, _layer, piece, _bias: self.operator(piece), None, layer, x
        )
        return result

    def head(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = execute.compute_lm_head(
            lambda _processor, piece, _head, _bias, **_: self.operator(piece),
            None,
            x,
            self._layer(),
            out=None,
        )
        return result

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        group = SimpleNamespace(world_size=2)
        all_reduce._plan, all_reduce._width = self.plan, WIDTH
        result: torch.Tensor = all_reduce.all_reduce(
            lambda _group, piece: self.operator(piece), group, x
        )
        return result

    def _layer(self) -> Any:
        weight = torch.empty(1)
        layer = SimpleNamespace(weight=weight)
        weight.owner = self  # type: ignore[attr-defined]  # which kernel is meant
        execute._plans.clear()
        execute._plans[id(layer)] = self.plan
        return layer


WAYS: dict[str, Callable[[Served, torch.Tensor], torch.Tensor]] = {
    "linear": Served.linear,
    "lm_head": Served.head,
    "all-reduce": Served.summed,
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a process of its own, which hold for forwards of any size."""
    monkeypatch.setattr(execute, "_plans", {})
    monkeypatch.setattr(execute, "_limit", math.inf)
    monkeypatch.setattr(all_reduce, "_plan", None)
    monkeypatch.setattr(all_reduce, "_width", 0)

    def invariant_matmul(x: torch.Tensor, *, weight: Any, bias: Any) -> torch.Tensor:
        result: torch.Tensor = weight.owner.kernel(x)
        return result

    monkeypatch.setattr(execute, "invariant_matmul", invariant_matmul)


def check_calls(plan: RowPlan, operator: Classes, kernel: Classes, rows: int) -> None:
    """That the calls have all rows, in order, room for them, and a measured count of one class."""
    calls, key, start = plan.calls(rows), operator[plan.low], 0
    for call in calls:
        assert call.start == start < call.stop, f"{calls} leave rows out or take them twice"
        start = call.stop
        assert call.made >= call.stop - call.start, f"{call} has no room for its rows"
        classes = kernel if call.kernel else operator
        assert call.made in classes, f"{plan!r} calls {call}, which nobody measured"
        assert classes[call.made] == key, f"{plan!r} calls {call}, which has other bits"
    assert start == rows
    if plan.runs_as_is(rows):
        assert operator.get(rows) == key, f"{plan!r} leaves {rows} rows as they are"
    if not plan.routes:
        assert plan.runs_as_is(rows) == (operator.get(rows) == key), f"{plan!r}, {rows} rows"


def check_results(served: Served, way: str, rows: int) -> None:
    """That each row has the bits of the class, through what serves, and nothing else was called."""
    x = torch.arange(rows * WIDTH, dtype=torch.float64).reshape(rows, WIDTH) * 1000
    assert torch.equal(WAYS[way](served, x), x + served.key), (way, rows, served.plan)
    for one in (served.operator, served.kernel):
        assert {one.classes.get(count) for count in one.called} <= {served.key}


# -- each assignment of a few row counts, one after the other

HIGHEST = 6
ABSENT = -1


def assignments(highest: int, keys: Iterable[int]) -> Iterator[dict[int, int]]:
    """Of the counts up to `highest`: each is not measured, or in one of the classes."""
    for states in product((ABSENT, *keys), repeat=highest):
        found = {count: key for count, key in enumerate(states, 1) if key != ABSENT}
        if found:
            yield found


@pytest.mark.parametrize("to_the_top", [False, True])
def test_every_plan_of_a_few_counts_without_times(to_the_top: bool) -> None:
    """Three classes in any order: padded, in pieces, and the last piece of each size."""
    for classes in assignments(HIGHEST, (0, 1, 2)):
        plan = choose(classes, to_the_top=to_the_top)
        for rows in range(1, 3 * HIGHEST):
            check_calls(plan, classes, {}, rows)


@pytest.mark.parametrize("way", WAYS)
def test_every_set_of_measured_counts_as_it_is_served(way: str) -> None:
    for classes in assignments(HIGHEST - 1, (0, 1)):
        served = Served(choose(classes), classes, {})
        for rows in range(1, 2 * HIGHEST + 2):
            check_results(served, way, rows)


# Microseconds of a call, of the operator and of the kernel: which way is the fastest at which
# count, so that all ways are taken in some plan.
PACES: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
    "the kernel": (lambda n: 90.0, lambda n: 30.0),
    "the operator": (lambda n: 30.0, lambda n: 90.0),
    "the kernel with more rows": (lambda n: 90.0, lambda n: 90.0 / n),
    "the operator with more rows": (lambda n: 90.0 / n, lambda n: 90.0),
    "either, in turn": (lambda n: 10.0 + 50 * (n % 2), lambda n: 60.0 - 50 * (n % 2)),
}


def timed(classes: Classes, joins: Iterable[int], pace: str) -> Times:
    """As the probe takes them, of the row counts that `choose` asks for."""
    own, kernel = PACES[pace]
    counts, joined = timed_counts(classes), set(joins)
    tried = sorted({reaches(classes)[0], *counts} & joined)
    return Times({n: own(n) for n in counts}, {n: kernel(n) for n in tried} or None, tuple(joined))


def with_joins(highest: int) -> Iterator[tuple[dict[int, int], dict[int, int]]]:
    """Classes of the operator, and the counts at which the kernel has the bits of the top one."""
    for classes in assignments(highest, (0, 1)):
        most, key = reaches(classes)[0], classes[max(classes)]
        within = [count for count in classes if count <= most]
        for chosen in product((False, True), repeat=len(within)):
            yield classes, {n: key for n, joins in zip(within, chosen, strict=True) if joins}


@pytest.mark.parametrize("pace", PACES)
def test_every_plan_of_a_few_counts_with_a_kernel_that_joins(pace: str) -> None:
    """Whichever counts were measured, and at whichever of them the kernel has the bits."""
    kinds = set()
    for classes, kernel in with_joins(HIGHEST - 1):
        plan = choose(classes, timed(classes, kernel, pace), to_the_top=True)
        kinds |= {(route.kernel, bool(route.padded)) for route in plan.routes}
        for rows in range(1, 3 * HIGHEST):
            check_calls(plan, classes, kernel, rows)
    assert kinds, "no plan has a route: then nothing was tried"


def test_every_kind_of_route_is_taken_somewhere() -> None:
    """Else the test before would say nothing of it."""
    kinds = {
        (route.kernel, bool(route.padded), route.padded > route.rows)
        for pace in PACES
        for classes, kernel in with_joins(HIGHEST - 1)
        for route in choose(classes, timed(classes, kernel, pace), to_the_top=True).routes
    }
    plain, own = (False, False, False), (True, False, False)
    padded, kernel = (False, True, True), (True, True, True)
    assert kinds >= {plain, own, padded, kernel}


@pytest.mark.parametrize("pace", ["either, in turn", "the kernel with more rows"])
@pytest.mark.parametrize("way", ["linear", "lm_head"])
def test_every_route_as_it_is_served(way: str, pace: str) -> None:
    for classes, kernel in with_joins(HIGHEST - 2):
        plan = choose(classes, timed(classes, kernel, pace), to_the_top=True)
        served = Served(plan, classes, kernel)
        for rows in range(1, 2 * HIGHEST):
            check_results(served, way, rows)


# -- as many row counts as decode and prefill have

MOST = 300  # more than what is timed, and than a kernel is tried with beside a class
SOME = settings(max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def measured(draw: st.DrawFn) -> dict[int, int]:
    """Row counts with their classes: runs with holes of one count, ends anywhere."""
    counts = draw(st.sets(st.integers(1, MOST), min_size=1, max_size=60))
    dense = draw(st.integers(0, 140))  # the first ones all, as decode's are
    borders = draw(st.lists(st.integers(1, MOST), max_size=4))
    holes = draw(st.sets(st.integers(1, MOST), max_size=12))
    return {
        count: 9 if count in holes else sum(count > border for border in borders) % 3
        for count in sorted({*counts, *range(1, dense + 1)})
    }


@SOME
@given(measured(), st.data())
def test_plans_of_many_counts(classes: dict[int, int], data: st.DataObject) -> None:
    kernel: dict[int, int] = {}
    times = None
    if data.draw(st.booleans(), "timed"):
        within = [count for count in classes if count <= reaches(classes)[0]]
        without = data.draw(st.sets(st.sampled_from(within or [0]), max_size=8), "kernel's holes")
        kernel = {n: classes[max(classes)] for n in within if n not in without}
        times = timed(classes, kernel, data.draw(st.sampled_from(sorted(PACES)), "pace"))
    try:
        plan = choose(classes, times, to_the_top=data.draw(st.booleans(), "to the top"))
    except NoPlanError:
        assert top(classes)[0] > 64
        return
    if plan.batch_invariant:
        assert [(c.start, c.stop, c.made, c.kernel) for c in plan.calls(777)] == [
            (0, 777, 777, True)
        ]
        return
    near = {n + d for span in plan.counts for n in span for d in (-1, 0, 1)}
    for rows in sorted({n for n in near if n > 0} | {*range(1, 40), 2 * plan.high, 1023}):
        check_calls(plan, classes, kernel, rows)
    served = Served(plan, classes, kernel)
    for rows in (1, max(plan.low - 1, 1), plan.high, plan.high + 1, 3 * plan.high - 1):
        check_results(served, "linear", rows)


@SOME
@given(
    st.sets(st.integers(1, 40), min_size=1),
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 40)), max_size=4),
    st.integers(1, 130),
)
def test_routes_that_a_file_holds(
    counts: set[int], drawn: list[tuple[bool, bool, int]], rows: int
) -> None:
    """Whatever routes a plan has, a call is one of them or the class's: none is made up."""
    routes, known = [], sorted(counts)
    for (kernel, padded, _), upto in zip(drawn, sorted(n for *_, n in drawn), strict=True):
        room = [n for n in known if n >= upto]
        if room and (padded or kernel):
            routes.append(Route(upto, kernel, room[0] if padded else 0))
    plan = RowPlan(*RowPlan(spans(counts), routes=tuple(routes)).record())
    reached = max((route.rows for route in routes), default=0)
    for call in plan.calls(rows):
        size = call.stop - call.start
        route = next((route for route in routes if size <= route.rows), None)
        assert (route is None) == (size > reached)
        if route is None:
            assert not call.kernel and call.made == min(n for n in known if n >= size)
        else:
            assert (call.made, call.kernel) == (route.padded or size, route.kernel)


# -- from the measurement to the call: probe, plan, layers that serve

DECODED = 12  # row counts of decode here


class Method(UnquantizedLinearMethod):
    """Applies an operator of made-up classes."""

    def __init__(self, operator: MadeUp) -> None:
        self.operator = operator

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return self.operator(x)


def model_of(operator: MadeUp) -> torch.nn.Module:
    """One linear layer."""
    model = torch.nn.Module()
    model.down_proj = torch.nn.Module()
    model.down_proj.weight = torch.nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)
    model.down_proj.quant_method = Method(operator)
    return model


class Everywhere(dict[int, int]):
    """Classes of all row counts: drawn ones, and beyond these one a count."""

    def __missing__(self, count: int) -> int:
        return 100 + count

    def get(self, count: int, default: Any = None) -> int:
        return self[count]


def check_from_probe_to_call(drawn: list[int], prefilled: list[int]) -> None:
    """Probe the operator, plan it, and call it with all row counts as a server would."""
    operator = MadeUp(Everywhere(enumerate(drawn, 1)))
    model = model_of(operator)
    found = groups(model)
    findings = plans.probe_groups(found, DECODED, prefilled)
    known = {*row_counts(DECODED), *prefilled}
    assert set(operator.called) == known == set(findings[0].classes)
    # A class of the probe's is one of the operator's, and the other way round.
    pairs = {(key, operator.classes[n]) for n, key in findings[0].classes.items()}
    assert len(pairs) == len({key for key, _ in pairs}) == len({key for _, key in pairs})
    planned = plans.plans(found, findings)
    execute.keep_to(planned, math.inf if findings[0].prefill else DECODED)
    key = operator.classes[planned[id(model.down_proj)].low]
    operator.called.clear()
    for rows in range(1, max(known) * 2 + 3):
        if rows > DECODED and not findings[0].prefill:
            break  # prompts are prefilled alone then, and their calls are left as they are
        x = torch.arange(rows * WIDTH, dtype=torch.float32).reshape(rows, WIDTH)
        method = model.down_proj.quant_method
        result = execute.apply_linear(Method.apply, method, model.down_proj, x)
        assert torch.equal(result, x + key), rows
    assert set(operator.called) <= known


def test_each_class_of_prefill_and_decode_from_probe_to_call() -> None:
    """A hole at each count in turn, and a border at each: none is missed for its place."""
    prefilled = [13, 17, 24]
    for at in range(1, 25):
        for counts in (prefilled, []):  # without any, larger calls are left as they are
            check_from_probe_to_call([int(n == at) for n in range(1, 25)], counts)
            check_from_probe_to_call([int(n >= at) for n in range(1, 25)], counts)


@settings(SOME, max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=40, max_size=40),
    st.sets(st.integers(DECODED + 1, 40), max_size=6),
)
def test_any_classes_from_probe_to_call(drawn: list[int], prefilled: set[int]) -> None:
    check_from_probe_to_call(drawn, sorted(prefilled))


@SOME
@given(st.integers(1, 512), st.integers(1, 9000), st.sets(st.integers(1, 9000), max_size=5))
def test_prefill_counts_are_beyond_those_of_decode_and_end_at_the_largest(
    above: int, most: int, more: set[int]
) -> None:
    largest = max(most, above + 1)
    counts = prefill_counts(above, largest, more)
    assert counts == sorted(set(counts)) and counts[0] > above and counts[-1] == largest
    assert {n for n in more if above < n <= largest} <= set(counts)
