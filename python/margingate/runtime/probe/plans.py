"""Probes each operator of a model, and plans how each linear layer is kept within one class."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch

from margingate.config import GateError
from margingate.core.rowclass import NoPlanError, RowPlan, Times, choose, reach, timed_counts, top
from margingate.runtime.compat.batch_invariant_matmul import (
    invariant_matmul,
    is_deep_gemm,
    kernel_counts,
)
from margingate.runtime.probe.classes import (
    HEAD,
    Finding,
    Member,
    RowDependenceError,
    apart_in_graphs,
    extended,
    probe_operator,
    refusing,
    row_counts,
)
from margingate.runtime.probe.compile_kernels import Compilers, Need, compile_ahead
from margingate.runtime.probe.graph_timing import replay_us

logger = logging.getLogger(__name__)

Operator = Callable[[torch.Tensor], torch.Tensor]
TIMED_CALLS = 20
LARGEST_SMALL = 256  # row counts up to this are compared in windows, larger ones in blocks


def probe_groups(
    found: dict[str, list[Member]],
    largest: int,
    prefill: Sequence[int] = (),
    graphs: Sequence[int] = (),
) -> list[Finding]:
    """Probe each distinct operator once.

    Args:
        prefill: larger row counts; plans are to hold for them too, where that can be had.
        graphs: row counts of CUDA graphs, in which an operator may have other bits.

    Raises:
        GateError: an operator whose rows depend on each other at a fixed row count.
    """
    counts = row_counts(largest)
    linear = (same[0].module.weight for same in found.values() if same[0].kind == "linear")
    with Compilers(linear) as compilers:
        measured = [_classes(same[0], counts, prefill, graphs) for same in found.values()]
        compilers.compile(_needs(found.values(), measured))
    return [
        _finding(same, each, bool(prefill))
        for same, each in zip(found.values(), measured, strict=True)
    ]


def plans(found: dict[str, list[Member]], findings: Sequence[Finding]) -> dict[int, RowPlan]:
    """The plans of `probe_groups`, by id of the module that each is for."""
    named = {finding.name: finding.plan for finding in findings if finding.plan is not None}
    return {
        id(member.module): named[same[0].name]
        for same in found.values()
        for member in same
        if same[0].name in named
    }


class Classes(NamedTuple):
    """Of the row counts that an operator was measured at."""

    decode: dict[int, int]
    wide: dict[int, int]  # with those of prefill, where the operator has such
    seconds: float


def _classes(
    first: Member, counts: Sequence[int], prefill: Sequence[int], graphs: Sequence[int]
) -> Classes:
    start, width = time.monotonic(), first.width
    with torch.inference_mode(), refusing(first.name):
        classes = probe_operator(first.operator, width, counts, first.like)
        if graphs:
            known = [count for count in graphs if count in classes]
            for count in apart_in_graphs(first.operator, width, known, first.like):
                classes[count] = max(classes.values()) + 1
        wide = classes
        if prefill and first.name != HEAD:  # which has a row a request
            wide = extended(first.operator, width, classes, prefill, first.like)
    return Classes(classes, wide, time.monotonic() - start)


def _needs(found: Iterable[list[Member]], measured: Iterable[Classes]) -> list[Need]:
    """What the batch-invariant kernel will be tried with."""
    tried = [
        (same[0].module.weight, classes.wide, most)
        for same, classes in zip(found, measured, strict=True)
        if (most := _tried(same[0], classes.wide))
    ]
    return [_need(*each, kernels) for kernels in (True, False) for each in tried]


def _need(weight: torch.Tensor, classes: Iterable[int], most: int, kernels: bool) -> Need:
    """Row counts that meet all kernels; or the others, most of which find theirs by then."""
    met = kernel_counts(most)
    return weight, met if kernels else sorted({n for n in classes if n <= most}.difference(met))


def _tried(member: Member, classes: Mapping[int, int]) -> int:
    """Up to how many rows the batch-invariant kernel is tried; 0: not at all."""
    if _may_join(member):
        return reach(classes)
    unsteady = len(set(classes.values())) > 1
    return max(classes) if _may_replace(member) and unsteady else 0


def _may_replace(member: Member) -> bool:
    """Whether the batch-invariant kernel may take its place: measured without a bias, not wide."""
    return member.kind == "linear" and not member.widened and member.call.bias is not True


def _may_join(member: Member) -> bool:
    """Whether the batch-invariant kernel may have this layer's own bits, and be faster.

    It adds a bias to results that are rounded already. lm_head's weight is read once a step.
    """
    return (
        member.kind == "linear"
        and member.name != HEAD
        and getattr(member.module, "bias", None) is None
        and is_deep_gemm(member.module.weight)
    )


def _finding(same: list[Member], measured: Classes, prefilled: bool) -> Finding:
    first, start = same[0], time.monotonic()
    weight, wide = first.module.weight, measured.wide
    plan, holds = None, prefilled and len(set(wide.values())) == 1
    if first.kind == "linear":
        head = first.name == HEAD
        many = wide if prefilled and not head else None
        with torch.inference_mode(), refusing(first.name):
            plan, holds = plan_of(same, measured.decode, many)
        holds |= prefilled and head  # more rows run in pieces
    seconds = measured.seconds + time.monotonic() - start
    shape = tuple(weight.shape)
    return Finding(first.kind, first.name, shape, len(same), wide, plan, seconds, holds)


def plan_of(
    same: Sequence[Member], classes: dict[int, int], wide: dict[int, int] | None
) -> tuple[RowPlan, bool]:
    """A plan for the linear layers that are `same`, and whether it holds for prefill too.

    Calls of more rows than were measured run in pieces.

    Args:
        wide: `classes` with the row counts of prefill; None: they do not matter.
    """
    if wide is not None:
        with suppress(NoPlanError):
            return _plan(same, wide, to_the_top=True), True
    return _plan(same, classes, to_the_top=False), False


def _plan(same: Sequence[Member], classes: dict[int, int], *, to_the_top: bool) -> RowPlan:
    """By measured times on a GPU; elsewhere the plan must not depend on the clock."""
    first, steady = same[0], len(set(classes.values())) == 1
    weight = first.module.weight
    if not weight.is_cuda:
        return choose(classes, to_the_top=to_the_top)
    own = [partial(invariant_matmul, weight=each.module.weight, bias=None) for each in same]
    joins = _joins(first.operator, own[0], classes, weight) if _may_join(first) else []
    if steady and not joins:
        return choose(classes, to_the_top=to_the_top)
    counts = timed_counts(classes)
    kernel = None
    if joins:
        most = reach(classes)
        kernel = _microseconds(own, weight, sorted({most, *(n for n in counts if n < most)}))
    elif _may_replace(first):
        if _may_join(first):  # what `probe_groups` had compiled ends at `reach`
            compile_ahead([_need(weight, classes, max(classes), each) for each in (True, False)])
        # RuntimeError: it does not run here, as where DeepGEMM has nothing to compile with
        with suppress(RowDependenceError, RuntimeError):
            if _in_one_class(own[0], classes, weight):
                kernel = _microseconds(own, weight, counts)
    operators = [each.operator for each in same]
    times = Times(_microseconds(operators, weight, counts), kernel, joins)
    return choose(classes, times, to_the_top=to_the_top)


def _joins(
    operator: Operator, own: Operator, classes: dict[int, int], like: torch.Tensor
) -> list[int]:
    """The row counts up to `reach` at which the kernel has the bits of the top class.

    All of them or none; at row counts of that class it is held to the operator's own results.
    """
    most, of_top = reach(classes), set(top(classes))
    beyond = min(count for count in of_top if count > most)
    within = [count for count in classes if count <= most]

    def either(x: torch.Tensor) -> torch.Tensor:
        return own(x) if len(x) <= most else operator(x)

    def agrees(count: int) -> bool:
        sample = torch.randn(count, like.shape[-1], device=like.device).to(like.dtype)
        return torch.equal(own(sample), operator(sample))

    with suppress(RowDependenceError, RuntimeError):
        shared = [count for count in within if count in of_top]
        if _in_one_class(either, [*within, beyond], like) and all(map(agrees, shared)):
            return within
    return []


def _in_one_class(operator: Operator, counts: Iterable[int], weight: torch.Tensor) -> bool:
    """Whether it gives a row the same bits at all of these row counts.

    Raises:
        RowDependenceError: not even at one of them.
    """
    counts = list(counts)
    small = [count for count in counts if count <= LARGEST_SMALL]
    large = [count for count in counts if count > LARGEST_SMALL]
    width = weight.shape[-1]
    classes = probe_operator(operator, width, small, weight)
    return len(set(extended(operator, width, classes, large, weight).values())) == 1


def settle_kernels(
    found: dict[str, list[Member]], planned: dict[int, RowPlan], decoded: int
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
        plan, weight = planned.get(id(first.module)), first.module.weight
        if plan is None or not plan.by_kernel:
            continue
        start = time.monotonic()
        own = partial(invariant_matmul, weight=weight, bias=None)
        with torch.inference_mode(), _running(first.name):
            for count in kernel_counts(min(plan.by_kernel, decoded)):
                own(weight.new_zeros(count, weight.shape[-1]))
            if plan.by_kernel > decoded:
                try:
                    holds &= _in_one_class(own, kernel_counts(plan.by_kernel), weight)
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
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise GateError(
            f"--deterministic-gate planned to run {name} by SGLang's batch-invariant matmul, which "
            f"does not run here ({reason}): start once with --gate-probe fresh to plan without it."
        ) from error


def _microseconds(
    operators: Sequence[Operator], weight: torch.Tensor, counts: Sequence[int]
) -> dict[int, float]:
    """Time of one call by row count, in a CUDA graph as when it serves.

    Each call is another layer's, where there are several: a weight that was just used lies in the
    L2 cache, and the kernel that then is the fastest may not be when it comes from memory.
    """
    turns = [operators[i % len(operators)] for i in range(TIMED_CALLS)]
    sample = torch.randn(max(counts), weight.shape[-1], device=weight.device).to(weight)
    found = {}
    for count in counts:
        rows = sample[:count]
        turns[0](rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for operator in turns:
                operator(rows)
        found[count] = min(replay_us(graph) for _ in range(3)) / TIMED_CALLS
    return found
