"""Operators whose rows depend on each other above some row count, so that more run in pieces."""

from __future__ import annotations

from collections.abc import Mapping

from margingate.config import GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.probe.operators import Operator

FEWEST = 32  # rows of a piece, below which a prefill by such an operator is not served on a GPU


def large_enough(classes: Mapping[int, int]) -> dict[int, int]:
    """The classes that pieces of FEWEST rows or more belong to, where there are such; else all.

    Among the others may be one that is faster in decode steps of few rows.
    """
    enough = {key for count, key in classes.items() if count >= FEWEST}
    return {count: key for count, key in classes.items() if key in enough or not enough}


def refuse_small_pieces(operator: Operator, plan: RowPlan) -> None:
    """A capped operator that takes few rows at a time on a GPU. Raises GateError.

    A prefill of some thousand rows would take seconds a layer, and its graphs the memory.
    """
    served = operator.sees_prefill and operator.device.type == "cuda"
    if operator.is_capped and served and plan.high < FEWEST:
        raise GateError(
            f"--deterministic-gate would call {operator.name} with {plan.high} rows at a time, "
            "since more depend on each other, and a prompt would take minutes: "
            f"{operator.instead}, or this model without the flag."
        )
