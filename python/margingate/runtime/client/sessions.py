"""Session parameters over which SGLang's scheduler would end: HTTP 400, gated or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from margingate.runtime.client.kinds import TEXT, Kind, type_error

_FLAG: Kind = (lambda value: isinstance(value, bool), "true or false")
_OBJECT: Kind = (lambda value: isinstance(value, Mapping), "an object")
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("id", "rid"), TEXT),
    **dict.fromkeys(("replace", "drop_previous_output"), _FLAG),
    "offset": (lambda value: type(value) is int, "a whole number"),
}


def refusal(given: Any) -> str:
    """The sentence for the first of them of another type, or an empty one.

    Args:
        given: as a client gave them; None: the request is of no session.
    """
    if given is None:
        return ""
    if sentence := type_error("session_params", given, _OBJECT):
        return sentence
    for name, value in given.items():
        if name not in _KINDS:
            return f"session_params.{name} is {value!r}: drop it, or check its spelling."
        if sentence := type_error(f"session_params.{name}", value, _KINDS[name]):
            return sentence
    if given.get("replace"):  # without a rid, or where two requests had the same one
        return (
            "session_params.replace is not served with the deterministic gate, since SGLang's "
            "scheduler may end over it: drop it, or open another session."
        )
    return ""


def has_tokens(given: Any) -> bool:
    """Whether the session, or SGLang's sentence that there is none, stands for an empty prompt."""
    return bool(given) and given.get("id") is not None
