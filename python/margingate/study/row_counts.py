"""Row counts with the same bits, as text: what a probe found of an operator or a whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from margingate.core.rowclass import runs

MOST_SPANS = 6  # more of them do not fit into a cell


def spans(classes: Sequence[Sequence[int]]) -> str:
    """Runs of row counts with one class, or how many classes there are.

    Args:
        classes: pairs of a row count and its class.
    """
    found = runs({count: key for count, key in classes})
    if len(found) > MOST_SPANS:
        return f"{len({key for _, key in classes})} classes"
    return " | ".join(
        f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        for counts, _ in found
    )


def classes_of_steps(measured: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Pairs of a row count and a class, 0 where a whole decode step has the bits of a verify pass.

    Args:
        measured: pairs of a row count and whether it has.
    """
    return [[count, 0 if same else 1] for count, same in measured]


def short_name(operator: str) -> str:
    """Of an operator, without the modules that hold it."""
    return operator.rsplit(".", 1)[-1]


def grid(operators: Sequence[dict[str, Any]]) -> dict[str, dict[int, int]]:
    """By operator's short name, the class of each row count: what `plots.plot_classes` draws."""
    return {short_name(one["name"]): dict(one["classes"]) for one in operators}
