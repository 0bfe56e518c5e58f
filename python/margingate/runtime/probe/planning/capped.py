"""Operators whose rows depend on each other above some row count, so that more run in pieces."""

from __future__ import annotations

from collections.abc import Mapping

from margingate.config import GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.probe.operators.operator import Operator

FEWEST = 32  # rows of a piece, below which a prefill by such an operator is not served on a GPU


def large_enough(classes: Mapping[int, int], busiest: int | None = None) -> dict[int, int]:
    """The classes that large pieces belong to, where there are such; else all.

    Pieces of FEWEST rows are large, or of half the largest step where there are only steps. Among
    the other classes may be one that is faster in decode steps of few rows.

    Args:
        busiest: rows of the largest step, where `decodes_only`; else None.
    """
    fewest = FEWEST if busiest is None else min(FEWEST, -(-busiest // 2))
    enough = {key for count, key in classes.items() if count >= fewest}
    return {count: key for count, key in classes.items() if key in enough or not enough}


def decodes_only(operator: Operator) -> bool:
    """Whether it is capped and only decode steps reach it.

    Then the largest step that there can be decides which class is the fastest: one that small calls
    are not padded to, or one that large calls are fewer pieces of.
    """
    return operator.is_capped and not operator.sees_prefill


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
