"""Measures, operator by operator, which row counts give a row the same bits.

Every row of one random input is computed at each row count, in windows of that many rows, and
once more in another order: equal bits put two row counts into one class; a row whose bits change
with its place or its neighbours at a fixed row count is an operator the gate cannot use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, choose

SAMPLE_ROWS = 64  # rows computed at every count; twice that from counts above it
SEED = 20260530
Operator = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """What the probe found of one operator."""

    name: str  # of one module that runs it
    shape: tuple[int, ...]  # of its weight: [outputs, inputs]
    modules: int  # how many modules of the model share it
    classes: dict[int, int]  # row count -> class, numbered from 0 in order of appearance
    plan: RowPlan | None  # None: every measured row count is in one class
    seconds: float


def row_counts(largest: int) -> list[int]:
    """The row counts that are measured: all small ones, then multiples of 8, up to `largest`."""
    small = range(1, min(largest, 16) + 1)
    return sorted({*small, *range(24, largest + 1, 8), largest})


def probe_operator(
    operator: Operator, width: int, counts: Sequence[int], like: torch.Tensor
) -> dict[int, int]:
    """Classes of `counts` for one operator over inputs [rows, width].

    Args:
        like: dtype and device of the input.

    Raises:
        RowDependence: at a fixed row count a row's bits depend on its place or neighbours.
    """
    total = max(SAMPLE_ROWS, *counts)
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randn(total, width, generator=generator).to(like)
    order = torch.randperm(total, generator=generator).to(like.device)
    seen: list[torch.Tensor] = []
    classes: dict[int, int] = {}
    for count in counts:
        used = max(count, SAMPLE_ROWS // count * count)
        outputs = _in_windows(operator, rows[:used], count)
        shuffled = order[order < used]
        again = _in_windows(operator, rows[shuffled], count)
        if not torch.equal(again, outputs[shuffled]):
            raise RowDependenceError(count)
        classes[count] = _class_of(outputs, seen)
    return classes


class RowDependenceError(Exception):
    """At this fixed row count a row's bits depend on the other rows."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = rows


def _in_windows(operator: Operator, rows: torch.Tensor, count: int) -> torch.Tensor:
    windows = [operator(rows[i : i + count]) for i in range(0, len(rows), count)]
    return torch.cat(windows)


def _class_of(outputs: torch.Tensor, seen: list[torch.Tensor]) -> int:
    """The first class whose rows agree with `outputs` on all rows both have; or a new one."""
    for number, other in enumerate(seen):
        shared = min(len(outputs), len(other))
        if torch.equal(outputs[:shared], other[:shared]):
            if len(outputs) > len(other):
                seen[number] = outputs
            return number
    seen.append(outputs)
    return len(seen) - 1


def operators(model: Any) -> Iterator[tuple[str, Any, Operator]]:
    """(name, module, operator) of every linear layer of an SGLang model, lm_head included."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            yield name, module, partial(_apply, method, module)
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "weight"):
        yield "lm_head", head, lambda x: torch.matmul(x, head.weight.T)


def _apply(method: Any, module: Any, x: torch.Tensor) -> torch.Tensor:
    return method.apply(module, x, None)


def probe_model(model: Any, largest: int) -> tuple[list[Finding], dict[int, RowPlan]]:
    """Probe each distinct linear operator of a model once.

    Returns the findings, and the plans by id of the module they are for.

    Raises:
        GateError: an operator whose rows depend on each other at a fixed row count.
    """
    groups: dict[tuple[Any, ...], list[tuple[str, Any, Operator]]] = {}
    for entry in operators(model):
        weight = entry[1].weight
        key = (entry[0].rsplit(".", 1)[-1], tuple(weight.shape), weight.dtype)
        groups.setdefault(key, []).append(entry)
    findings, plans = [], {}
    for members in groups.values():
        finding = _probe_group(members, row_counts(largest))
        findings.append(finding)
        if finding.plan is not None:
            plans.update({id(module): finding.plan for _, module, _ in members})
    return findings, plans


def _probe_group(members: list[tuple[str, Any, Operator]], counts: Sequence[int]) -> Finding:
    name, module, operator = members[0]
    start = time.monotonic()
    try:
        with torch.inference_mode():
            classes = probe_operator(operator, module.weight.shape[1], counts, module.weight)
    except RowDependenceError as error:
        raise GateError(
            f"--deterministic-gate cannot use {name}: with {error.rows} rows, a row's result "
            "depends on the other rows; serve this model without the flag, or use "
            "--gate-fast-path stock with --gate-policy observe to study it."
        ) from None
    shape = tuple(module.weight.shape)
    seconds = time.monotonic() - start
    return Finding(name, shape, len(members), classes, choose(classes), seconds)
