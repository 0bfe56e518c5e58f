"""Plans of row counts, and operators whose bits depend on the row count."""

from __future__ import annotations

from typing import Any

import torch

from margingate.core.rowclass import RowPlan, spans
from margingate.runtime.probe.operators.operator import MadeUp, Run


def kept(low: int, high: int, **more: Any) -> RowPlan:
    """All counts from `low` to `high` were measured, and are in one class."""
    return RowPlan(((low, high),), **more)


def of(classes: dict[int, int], key: int, **more: Any) -> RowPlan:
    """The measured counts of a class."""
    return RowPlan(spans(count for count in classes if classes[count] == key), **more)


WEIGHT = torch.randn(512, 40, generator=torch.Generator().manual_seed(1)).bfloat16()


def split_by_count(x: torch.Tensor) -> torch.Tensor:
    """Reduces in two halves from 9 rows on, as a GEMM might.

    In float64, rounded: a CPU's own product of BF16 may depend on the row count.
    """
    x, weight = x.double(), WEIGHT.double()
    if x.shape[0] <= 8:
        return (x @ weight.T).bfloat16()
    return (x[:, :20] @ weight[:, :20].T).bfloat16() + (x[:, 20:] @ weight[:, 20:].T).bfloat16()


def made_up(function: Run) -> MadeUp:
    return MadeUp("made up", None, function=function, width=WEIGHT.shape[1], like=WEIGHT)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """As if it reduced in one order: in float64 the order is lost in rounding."""
    return (x.double() @ WEIGHT.double().T).to(x.dtype)


class Layer:
    def __init__(self) -> None:
        self.weight = WEIGHT
