"""Whether answers are the same, and where two of them part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from margingate.harness.client import Answer


def identical(reference: Iterable[Answer], answers: Iterable[Answer]) -> int:
    """How many of `answers` have the tokens that `reference` has for a prompt of that name.

    Raises:
        KeyError: an answer whose prompt `reference` lacks.
    """
    tokens = {answer.name: answer.tokens for answer in reference}
    return sum(tokens[answer.name] == answer.tokens for answer in answers)


def changed(reference: Iterable[Answer], answers: Iterable[Answer]) -> dict[str, int]:
    """By name of the answers with other tokens than in `reference`, how many lead up to the change.

    Raises:
        KeyError: an answer whose prompt `reference` lacks.
    """
    tokens = {answer.name: answer.tokens for answer in reference}
    return {
        answer.name: common_prefix(answer.tokens, tokens[answer.name])
        for answer in answers
        if answer.tokens != tokens[answer.name]
    }


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading elements are the same: the index at which two unequal sequences part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
