"""What a client's value may be: a test of it, and the words for what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Kind = tuple[Callable[[Any], bool], str]
_SHOWN = 80  # characters of a value in a sentence


def is_text(value: Any) -> bool:
    return isinstance(value, str)


TEXT: Kind = (is_text, "a text")


def type_error(name: str, value: Any, kind: Kind) -> str:
    """The sentence for a value that is not of this kind, or an empty one; None is of any."""
    is_one, words = kind
    if value is None or is_one(value):
        return ""
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return f"{name} is {shown}: give {words}."
