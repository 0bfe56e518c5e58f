"""Probes each operator of a model, and plans how those that can be are kept within one class."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from margingate.config import GateError
from margingate.core import rowclass
from margingate.core.rowclass import NoPlanError, RowPlan, Times
from margingate.errors import first_line
from margingate.runtime.compat.compute.batch_invariant_matmul import (
    NOT_RUNNING,
    invariant_matmul,
    is_deep_gemm,
    kernel_counts,
)
from margingate.runtime.probe.measuring.call_times import microseconds
from margingate.runtime.probe.measuring.classes import (
    Finding,
    RowDependenceError,
    apart_in_graphs,
    extended,
    probe_operator,
    refusing,
    row_counts,
)
from margingate.runtime.probe.measuring.compile_kernels import Compilers, Need, compile_ahead
from margingate.runtime.probe.operators.operator import MadeUp, Operator
from margingate.runtime.probe.planning import capped

logger = logging.getLogger(__name__)

LONG_S = 10  # of measuring an operator, behind which the log says so
LARGEST_SMALL = 256  # row counts up to this are compared in windows, larger ones in blocks


def probe_groups(
    found: dict[str, list[Operator]],
    largest: int,
    prefill: Sequence[int] = (),
    graphs: Sequence[int] = (),
    busiest: int = LARGEST_SMALL,
) -> list[Finding]:
    """Probe each distinct operator once.

    Args:
        prefill: larger row counts; plans are to hold for them too, where that can be had.
        graphs: row counts of CUDA graphs, in which an operator may have other bits.
        busiest: rows of the largest decode step, see `capped.decodes_only`.

    Raises:
        GateError: an operator whose rows depend on each other at a fixed row count.
    """
    counts = row_counts(largest)
    firsts = (same[0] for same in found.values() if same[0].is_planned)
    with Compilers(weight for each in firsts if (weight := each.weight) is not None) as compilers:
        measured = [_classes(same[0], counts, prefill, graphs) for same in found.values()]
        compilers.compile(_needs(found.values(), measured))
    pairs = zip(found.values(), measured, strict=True)
    return [_finding(same, each, bool(prefill), busiest) for same, each in pairs]


def plans(found: dict[str, list[Operator]], findings: Sequence[Finding]) -> dict[int, RowPlan]:
    """The plans of `probe_groups`, by id of the module that each is for."""
    return _by_module(found, {finding.name: finding.plan for finding in findings})


def prefill_plans(
    found: dict[str, list[Operator]], findings: Sequence[Finding]
) -> dict[int, RowPlan]:
    """As `plans`: those of layers that have one of their own in prefills."""
    return _by_module(found, {finding.name: finding.prefill_plan for finding in findings})


def _by_module(
    found: dict[str, list[Operator]], named: Mapping[str, RowPlan | None]
) -> dict[int, RowPlan]:
    return {
        id(member.module): plan
        for same in found.values()
        if (plan := named.get(same[0].name)) is not None
        for member in same
    }


class Classes(NamedTuple):
    """Of the row counts that an operator was measured at."""

    decode: dict[int, int]
    wide: dict[int, int]  # with those of prefill, where the operator has such
    seconds: float


def _classes(
    first: Operator, counts: Sequence[int], prefill: Sequence[int], graphs: Sequence[int]
) -> Classes:
    start = time.monotonic()
    with torch.inference_mode(), refusing(first.name):
        classes = probe_operator(first, counts)
        if graphs:
            known = [count for count in graphs if count in classes]
            for count in apart_in_graphs(first, known):
                classes[count] = max(classes.values()) + 1
        wide = classes
        if len(classes) < len(counts):
            level = logging.INFO if first.device.type == "cpu" else logging.WARNING
            said = "margingate: more than %d rows of %s depend on each other: they run in pieces"
            logger.log(level, said, max(classes), first.name)
        elif prefill and first.sees_prefill:
            wide = extended(first, classes, prefill)
    seconds = time.monotonic() - start
    if seconds > LONG_S:  # the log goes on
        logger.info("margingate: measured %s in %.0f s", first.name, seconds)
    return Classes(classes, wide, seconds)


def _needs(found: Iterable[list[Operator]], measured: Iterable[Classes]) -> list[Need]:
    """What the batch-invariant kernel will be tried with."""
    tried = [
        (weight, classes.wide, most)
        for same, classes in zip(found, measured, strict=True)
        if (most := _tried(same[0], classes.wide)) and (weight := same[0].weight) is not None
    ]
    return [_need(*each, kernels) for kernels in (True, False) for each in tried]


def _need(weight: torch.Tensor, classes: Iterable[int], most: int, kernels: bool) -> Need:
    """Row counts that meet all kernels; or the others, most of which find theirs by then."""
    met = kernel_counts(most)
    return weight, met if kernels else sorted({n for n in classes if n <= most}.difference(met))


def _tried(operator: Operator, classes: Mapping[int, int]) -> int:
    """Up to how many rows the batch-invariant kernel is tried; 0: not at all."""
    if _may_join(operator):
        return rowclass.reach(classes)
    unsteady = len(set(classes.values())) > 1
    return max(classes) if operator.weight is not None and unsteady else 0


def _may_join(operator: Operator) -> bool:
    """Whether the batch-invariant kernel may have this layer's own bits, and be faster.

    It adds a bias to results that are rounded already. lm_head's weight is read once a step.
    """
    weight = operator.weight
    return (
        weight is not None
        and operator.sees_prefill
        and getattr(operator.module, "bias", None) is None
        and is_deep_gemm(weight)
    )


def _finding(same: list[Operator], measured: Classes, prefilled: bool, busiest: int) -> Finding:
    first, start = same[0], time.monotonic()
    wide = measured.wide
    plan, holds = None, prefilled and len(set(wide.values())) == 1
    prefill_plan = None
    if first.is_planned:
        many = wide if prefilled and first.sees_prefill else None
        with torch.inference_mode(), refusing(first.name):
            plan, holds = plan_of(same, measured.decode, many, busiest)
        capped.refuse_small_pieces(first, plan)
        holds |= prefilled and not first.sees_prefill  # more rows run in pieces
        if many is not None and not holds:
            prefill_plan = rowclass.choose_for_prefill(many)
            holds = prefill_plan is not None
    if first.must_agree and len(set(wide.values())) > 1:
        raise GateError(
            f"--deterministic-gate cannot use {first.name}: it gives a row other results at other "
            "row counts, and nothing keeps it to some; serve this model without the flag."
        )
    seconds = measured.seconds + time.monotonic() - start
    found = (first.kind, first.name, first.shape, len(same), wide, plan, seconds, holds)
    return Finding(*found, prefill_plan)


def plan_of(
    same: Sequence[Operator],
    classes: dict[int, int],
    wide: dict[int, int] | None,
    busiest: int = LARGEST_SMALL,
) -> tuple[RowPlan, bool]:
    """A plan for the operators that are `same`, and whether it holds for prefill too.

    Calls of more rows than were measured run in pieces.

    Args:
        wide: `classes` with the row counts of prefill; None: they do not matter.
        busiest: as `probe_groups`.
    """
    if wide is not None:
        if same[0].is_capped:
            return _plan(same, wide, to_the_top=False), True
        with suppress(NoPlanError):
            return _plan(same, wide, to_the_top=True), True
    return _plan(same, classes, to_the_top=False, busiest=busiest), False


def _plan(
    same: Sequence[Operator],
    classes: dict[int, int],
    *,
    to_the_top: bool,
    busiest: int = LARGEST_SMALL,
) -> RowPlan:
    """By measured times on a GPU; elsewhere the plan must not depend on the clock."""
    first = same[0]
    if not _is_timed(first):
        return rowclass.choose(classes, to_the_top=to_the_top)
    largest = busiest if capped.decodes_only(first) else None
    if first.is_capped:  # prompts, or steps of many rows, run in pieces of it
        classes = capped.large_enough(classes, largest)
    steady = len(set(classes.values())) == 1
    own = _by_kernel(same)
    joins = _joins(first, own[0], classes) if _may_join(first) else []
    if steady and not joins:
        return rowclass.choose(classes, to_the_top=to_the_top)
    counts = rowclass.timed_counts(classes, largest)
    kernel = None
    if joins:
        most = rowclass.reach(classes)
        kernel = microseconds(own, sorted({most, *(n for n in counts if n < most)}))
    elif own:
        if _may_join(first):  # what `probe_groups` had compiled ends at `reach`
            weight = own[0].like
            compile_ahead([_need(weight, classes, max(classes), each) for each in (True, False)])
        with suppress(RowDependenceError, *NOT_RUNNING):
            if _in_one_class(own[0], classes):
                kernel = microseconds(own, counts)
    times = Times(microseconds(same, counts), kernel, joins, largest)
    return rowclass.choose(classes, times, to_the_top=to_the_top)


def _is_timed(operator: Operator) -> bool:
    return operator.device.type == "cuda"


def _by_kernel(same: Iterable[Operator]) -> list[MadeUp]:
    """The batch-invariant kernel in the place of each; [] where it cannot stand in."""
    return [
        MadeUp(
            each.name,
            each.module,
            function=partial(invariant_matmul, weight=weight, bias=None),
            width=weight.shape[-1],
            like=weight,
        )
        for each in same
        if (weight := each.weight) is not None
    ]


def _joins(operator: Operator, own: MadeUp, classes: dict[int, int]) -> list[int]:
    """The row counts up to `reach` at which the kernel has the bits of the top class.

    All of them or none; at row counts of that class it is held to the operator's own results.
    """
    most, of_top = rowclass.reach(classes), set(rowclass.top(classes))
    beyond = min(count for count in of_top if count > most)
    within = [count for count in classes if count <= most]

    def either(x: torch.Tensor) -> torch.Tensor:
        return own.run(x) if len(x) <= most else operator.run(x)

    def agrees(count: int) -> bool:
        sample = torch.randn(count, own.width, device=own.device).to(own.like.dtype)
        return torch.equal(own.run(sample), operator.run(sample))

    with suppress(RowDependenceError, *NOT_RUNNING):
        shared = [count for count in within if count in of_top]
        tried = replace(own, function=either)
        if _in_one_class(tried, [*within, beyond]) and all(map(agrees, shared)):
            return within
    return []


def _in_one_class(operator: Operator, counts: Iterable[int]) -> bool:
    """Whether it gives a row the same bits at all of these row counts.

    Raises:
        RowDependenceError: not even at one of them.
    """
    counts = list(counts)
    small = [count for count in counts if count <= LARGEST_SMALL]
    large = [count for count in counts if count > LARGEST_SMALL]
    classes = probe_operator(operator, small)
    return len(set(extended(operator, classes, large).values())) == 1


def settle_kernels(
    found: dict[str, list[Operator]], planned: dict[int, RowPlan], decoded: int
) -> bool:
    """Run the batch-invariant kernel of each plan that has it, with all it may be asked for.

    It compiles what it has not met on this machine, seconds for each: now, and not in a request.

    Args:
        decoded: the largest row count of decode, whose steps are checked by themselves.

    Returns:
        Whether the row counts above `decoded` are in one class with the others.

    Raises:
        GateError: a kernel does not run.
    """
    holds = True
    for first, *_ in found.values():
        plan = planned.get(id(first.module))
        if plan is None or not plan.by_kernel:
            continue
        start = time.monotonic()
        (own,) = _by_kernel([first])
        with torch.inference_mode(), _running(first.name):
            for count in kernel_counts(min(plan.by_kernel, decoded)):
                own.run(own.like.new_zeros(count, own.width))
            if plan.by_kernel > decoded:
                try:
                    holds &= _in_one_class(own, kernel_counts(plan.by_kernel))
                except RowDependenceError:
                    holds = False
        seconds = time.monotonic() - start
        if seconds > 1:
            logger.info("margingate: kernels for %s are ready (%.1f s)", first.name, seconds)
    return holds


@contextmanager
def _running(name: str) -> Iterator[None]:
    try:
        yield
    except (*NOT_RUNNING, OSError) as error:
        raise GateError(
            f"--deterministic-gate planned to run {name} by SGLang's batch-invariant matmul, which "
            f"does not run here ({first_line(error)}): start once with --gate-probe fresh to plan "
            "without it."
        ) from error
