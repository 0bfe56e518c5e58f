"""SGLang's batch-invariant matmul in the place of linear layers: whether it has their bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch

from margingate.config import GateError
from margingate.core import rowclass
from margingate.core.rowclass import RowPlan
from margingate.errors import first_line
from margingate.runtime.compat.compute.batch_invariant_matmul import (
    NOT_RUNNING,
    invariant_matmul,
    is_deep_gemm,
    kernel_counts,
)
from margingate.runtime.probe.measuring.classes import RowDependenceError, extended, probe_operator
from margingate.runtime.probe.operators.operator import MadeUp, Operator

logger = logging.getLogger(__name__)

LARGEST_SMALL = 256  # row counts up to this are compared in windows, larger ones in blocks


def may_join(operator: Operator) -> bool:
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


def by_kernel(same: Iterable[Operator]) -> list[MadeUp]:
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


def joins(operator: Operator, own: MadeUp, classes: Mapping[int, int]) -> list[int]:
    """The row counts, from the first on, at which the kernel has the bits of the top class.

    All of those up to one of `rowclass.reaches`, or none. At row counts of that class it is held to
    the operator's own results.

    Args:
        own: the kernel in the operator's place.
    """
    if not may_join(operator):
        return []
    of_top = set(rowclass.top(classes))

    def agrees(count: int) -> bool:
        sample = torch.randn(count, own.width, device=own.device).to(own.like.dtype)
        return torch.equal(own.run(sample), operator.run(sample))

    for most in rowclass.reaches(classes):
        within = [count for count in classes if count <= most]
        beyond = min(count for count in of_top if count > most)
        with suppress(RowDependenceError, *NOT_RUNNING):
            tried = replace(own, function=partial(_either, own, operator, most))
            if in_one_class(tried, [*within, beyond]) and all(
                map(agrees, of_top.intersection(within))
            ):
                return within
    return []


def _either(own: MadeUp, operator: Operator, most: int, x: torch.Tensor) -> torch.Tensor:
    return own.run(x) if len(x) <= most else operator.run(x)


def in_one_class(operator: Operator, counts: Iterable[int]) -> bool:
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
        (own,) = by_kernel([first])
        with torch.inference_mode(), _running(first.name):
            for count in kernel_counts(min(plan.by_kernel, decoded)):
                own.run(own.like.new_zeros(count, own.width))
            if plan.by_kernel > decoded:
                try:
                    holds &= in_one_class(own, kernel_counts(plan.by_kernel))
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
