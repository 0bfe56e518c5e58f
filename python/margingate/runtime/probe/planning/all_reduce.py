"""All-reduce among tensor-parallel ranks, kept within one class of row counts.

SGLang picks an algorithm by the size of the input: kernels of its own for what fits into their
buffers, NCCL's for more. They add in other orders, or round between additions, so that a row's bits
may depend on how many rows share its forward. That is measured at start, with rows that each rank
has others of; inputs of other sizes then run in pieces of, or padded up to, measured ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, choose
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe.measuring.classes import (
    Finding,
    RowDependenceError,
    extended,
    probe_operator,
)
from margingate.runtime.probe.operators.operator import MadeUp
from margingate.runtime.probe.planning.execute import run_in_class

NAME = "all-reduce"

_plan: RowPlan | None = None
_width = 0  # of the rows that it is for


def settle(runner: Any, counts: Sequence[int], prefill: Sequence[int]) -> list[Finding]:
    """Measure, and keep to what was found from now on; [] where there is one rank.

    All ranks must call this with the same row counts.

    Raises:
        GateError: a row's sum depends on its place at a fixed row count.
    """
    global _plan, _width  # noqa: PLW0603
    group = ranks.group()
    if group is None:
        return []
    _plan = None
    start, width = time.monotonic(), int(runner.model_config.hidden_size)
    like = torch.empty(0, dtype=runner.dtype, device=runner.device)

    def summed(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = group.all_reduce(x.roll(group.rank_in_group, dims=1))
        return result

    operator = MadeUp(NAME, group, function=summed, width=width, like=like)
    with torch.inference_mode():
        try:
            classes = probe_operator(operator, counts)
        except RowDependenceError as error:
            raise GateError(
                f"--deterministic-gate cannot use the all-reduce of --tp-size {group.world_size}: "
                f"with {error.rows} rows, a row's sum depends on its place among them; use "
                "--tp-size 2 or 1, or serve without the flag."
            ) from None
        if prefill:
            classes = extended(operator, classes, prefill)
    classes = merged(ranks.of_all(classes))
    _plan, _width = choose(classes), width
    shape = (group.world_size, width)
    seconds = time.monotonic() - start
    return [Finding(NAME, NAME, shape, 1, classes, _plan, seconds, bool(prefill))]


def merged(of_ranks: Sequence[dict[int, int]]) -> dict[int, int]:
    """Classes that hold on every rank: row counts are in one where all ranks have them in one."""
    numbers: dict[tuple[int, ...], int] = {}
    keys = {count: tuple(classes[count] for classes in of_ranks) for count in of_ranks[0]}
    return {count: numbers.setdefault(key, len(numbers)) for count, key in keys.items()}


def all_reduce(original: Any, group: Any, input_: torch.Tensor) -> torch.Tensor:
    """AROUND GroupCoordinator.all_reduce."""
    plan = _plan
    if plan is None or group.world_size == 1 or input_.dim() != 2 or input_.shape[1] != _width:
        return original(group, input_)
    if plan.runs_as_is(input_.shape[0]):
        return original(group, input_)
    return run_in_class(plan, input_, lambda piece: original(group, piece))
