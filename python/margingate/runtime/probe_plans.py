"""Probes each operator of a model, and plans how each linear layer is kept within one class."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch

from margingate.config import GateError
from margingate.core.rowclass import NoPlanError, RowPlan, Times, choose, timed_counts
from margingate.runtime import probe

logger = logging.getLogger(__name__)

Operator = Callable[[torch.Tensor], torch.Tensor]
TIMED_CALLS = 20
LARGEST_SMALL = 256  # row counts up to this are compared in windows, larger ones in blocks


def probe_groups(
    found: dict[str, list[probe.Member]], largest: int, prefill: Sequence[int] = ()
) -> list[probe.Finding]:
    """Probe each distinct operator once.

    Args:
        prefill: larger row counts; plans are to hold for them too, where that can be had.

    Raises:
        GateError: an operator whose rows depend on each other at a fixed row count.
    """
    return [_probe_group(same, probe.row_counts(largest), prefill) for same in found.values()]


def plans(
    found: dict[str, list[probe.Member]], findings: Sequence[probe.Finding]
) -> dict[int, RowPlan]:
    """The plans of `probe_groups`, by id of the module that each is for."""
    named = {finding.name: finding.plan for finding in findings if finding.plan is not None}
    return {
        id(member.module): named[same[0].name]
        for same in found.values()
        for member in same
        if same[0].name in named
    }


def _probe_group(
    same: list[probe.Member], counts: Sequence[int], prefill: Sequence[int]
) -> probe.Finding:
    first, start = same[0], time.monotonic()
    weight = first.module.weight
    with torch.inference_mode(), probe.refusing(first.name):
        width = weight.shape[-1]
        classes = probe.probe_operator(first.operator, width, counts, weight)
        wide, head = classes, first.name == probe.HEAD  # which has a row a request
        if prefill and not head:
            wide = probe.extended(first.operator, width, classes, prefill, weight)
        plan, holds = None, bool(prefill) and len(set(wide.values())) == 1
        if first.kind == "linear":
            many = wide if prefill and not head else None
            plan, holds = plan_of(first.operator, weight, classes, many, widened=first.widened)
            holds |= bool(prefill) and head  # more rows run in pieces
    seconds = time.monotonic() - start
    shape = tuple(weight.shape)
    return probe.Finding(first.kind, first.name, shape, len(same), wide, plan, seconds, holds)


def plan_of(
    operator: Operator,
    weight: torch.Tensor,
    classes: dict[int, int],
    wide: dict[int, int] | None,
    *,
    widened: bool = False,
) -> tuple[RowPlan | None, bool]:
    """A plan for a linear layer, and whether it holds for prefill too.

    Args:
        wide: `classes` with the row counts of prefill; None: they do not matter.
        widened: as the operator's `probe.Member`; the batch-invariant kernel does not widen.
    """
    if wide is not None:
        with suppress(NoPlanError):
            return _plan(operator, weight, wide, to_the_top=True, widened=widened), True
    return _plan(operator, weight, classes, to_the_top=False, widened=widened), False


def _plan(
    operator: Operator,
    weight: torch.Tensor,
    classes: dict[int, int],
    *,
    to_the_top: bool,
    widened: bool,
) -> RowPlan | None:
    """By measured times on a GPU; elsewhere the plan must not depend on the clock."""
    if len(set(classes.values())) == 1:
        return None
    if not weight.is_cuda:
        return choose(classes, to_the_top=to_the_top)
    counts = timed_counts(classes)
    kernel = None
    own = partial(invariant_matmul, weight=weight, bias=None)
    # RuntimeError: it does not run here, as where DeepGEMM has nothing to compile its kernels with
    with suppress(probe.RowDependenceError, RuntimeError):
        if not widened and _in_one_class(own, classes, weight):
            kernel = _microseconds(own, weight, counts)
    times = Times(_microseconds(operator, weight, counts), kernel)
    return choose(classes, times, to_the_top=to_the_top)


def _in_one_class(operator: Operator, counts: Iterable[int], weight: torch.Tensor) -> bool:
    """Whether it gives a row the same bits at all of these row counts.

    Raises:
        RowDependenceError: not even at one of them.
    """
    small = [count for count in counts if count <= LARGEST_SMALL]
    large = [count for count in counts if count > LARGEST_SMALL]
    width = weight.shape[-1]
    classes = probe.probe_operator(operator, width, small, weight)
    return len(set(probe.extended(operator, width, classes, large, weight).values())) == 1


def settle_kernels(
    found: dict[str, list[probe.Member]], planned: dict[int, RowPlan], decoded: int
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
        if plan is None or not plan.own_kernel:
            continue
        start = time.monotonic()
        own = partial(invariant_matmul, weight=weight, bias=None)
        with torch.inference_mode(), _running(first.name):
            for count in _kernel_counts(min(plan.high, decoded)):
                own(weight.new_zeros(count, weight.shape[-1]))
            if plan.high > decoded:
                try:
                    holds &= _in_one_class(own, _kernel_counts(plan.high), weight)
                except probe.RowDependenceError:
                    holds = False
        seconds = time.monotonic() - start
        if seconds > 1:
            logger.info("margingate: kernels for %s are ready (%.1f s)", first.name, seconds)
    return holds


def _kernel_counts(largest: int) -> list[int]:
    """Row counts up to `largest` that meet every kernel the batch-invariant matmul has for them.

    Its tiles have 16 rows, 32 or a multiple of 64; Triton compiles multiples of 16 apart.
    """
    counts = {1, 16, 17, 33, 49, *range(65, largest, 64), largest}
    return sorted(count for count in counts if count <= largest)


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


def invariant_matmul(
    x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """SGLang's batch-invariant kernel: x [rows, inputs] by weight [outputs, inputs]."""
    from sglang.srt.batch_invariant_ops import matmul_persistent

    return matmul_persistent(x.contiguous(), weight.T, bias)


def _microseconds(
    operator: Operator, weight: torch.Tensor, counts: Sequence[int]
) -> dict[int, float]:
    """Time of one call by row count, in a CUDA graph as when it serves."""
    sample = torch.randn(max(counts), weight.shape[-1], device=weight.device).to(weight)
    found = {}
    for count in counts:
        rows = sample[:count]
        operator(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(TIMED_CALLS):
                operator(rows)
        found[count] = min(_replay_ms(graph) for _ in range(3)) / TIMED_CALLS * 1e3
    return found


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
