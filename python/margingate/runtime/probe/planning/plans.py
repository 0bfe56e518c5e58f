"""Probes each operator of a model, and plans how those that can be are kept within one class."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from margingate.config import GateError
from margingate.core import rowclass
from margingate.core.rowclass import NoPlanError, RowPlan, Times
from margingate.runtime.compat.compute.batch_invariant_matmul import NOT_RUNNING, kernel_counts
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
from margingate.runtime.probe.operators.operator import Operator
from margingate.runtime.probe.planning import capped, invariant_kernel
from margingate.runtime.probe.planning.invariant_kernel import LARGEST_SMALL

logger = logging.getLogger(__name__)

LONG_S = 10  # of measuring an operator, behind which the log says so


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
    if invariant_kernel.may_join(operator):
        return rowclass.reaches(classes)[0]
    unsteady = len(set(classes.values())) > 1
    return max(classes) if operator.weight is not None and unsteady else 0


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
    own = invariant_kernel.by_kernel(same)
    joins = invariant_kernel.joins(first, own[0], classes) if own else []
    if steady and not joins:
        return rowclass.choose(classes, to_the_top=to_the_top)
    counts = rowclass.timed_counts(classes, largest)
    kernel = None
    if joins:
        most = max(joins)
        kernel = microseconds(own, sorted({most, *(n for n in counts if n < most)}))
    elif own:
        if invariant_kernel.may_join(first):  # what `probe_groups` had compiled ends at `reaches`
            weight = own[0].like
            compile_ahead([_need(weight, classes, max(classes), each) for each in (True, False)])
        with suppress(RowDependenceError, *NOT_RUNNING):
            if invariant_kernel.in_one_class(own[0], classes):
                kernel = microseconds(own, counts)
    times = Times(microseconds(same, counts), kernel, joins, largest)
    return rowclass.choose(classes, times, to_the_top=to_the_top)


def _is_timed(operator: Operator) -> bool:
    return operator.device.type == "cuda"
