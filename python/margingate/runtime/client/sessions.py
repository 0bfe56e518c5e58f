"""Session parameters over which SGLang's scheduler would end: HTTP 400, gated or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TEXTS, _FLAGS = ("id", "rid"), ("replace", "drop_previous_output")


def refusal(given: Any) -> str:
    """The sentence for the first of them of another type, or an empty one.

    Args:
        given: as a client gave them; None: the request is of no session.
    """
    if given is None:
        return ""
    if not isinstance(given, Mapping):
        return f"session_params is {given!r}: give an object."
    for name, value in given.items():
        if words := _wanted(name, value):
            return f"session_params.{name} is {value!r}: {words}."
    if given.get("replace"):  # without a rid, or where two requests had the same one
        return (
            "session_params.replace is not served with the deterministic gate, since SGLang's "
            "scheduler may end over it: drop it, or open another session."
        )
    return ""


def has_tokens(given: Any) -> bool:
    """Whether the session, or SGLang's sentence that there is none, stands for an empty prompt."""
    return bool(given) and given.get("id") is not None


def _wanted(name: str, value: Any) -> str:
    """What to do about a value of another type; empty for one that is as SGLang takes it."""
    if name in _TEXTS:
        return "" if value is None or isinstance(value, str) else "give a text"
    if name in _FLAGS:
        return "" if value is None or isinstance(value, bool) else "give true or false"
    if name == "offset":
        return "" if value is None or type(value) is int else "give a whole number"
    return "drop it, or check its spelling"
