"""Rotary tables, which have no parameters to measure: some rotate a row by what others need.

LongRoPE (Phi 3 and 4, MiniCPM 4) has two tables, for short contexts and for long ones. SGLang
rotates all rows of a forward by the second where one of them stands beyond the first. A row then
has other keys beside a long request, and a prompt has others where it is cut elsewhere. The checks
of the whole model are too short to see it. So do the modules of transformers, which make dynamic
tables anew besides, and what SGLang has of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from margingate.config import GateError

_LONG_ROPE = "Phi3LongRoPEScaledRotaryEmbedding"
_LONG, _DYNAMIC = "longrope", "dynamic"  # as transformers calls them; the latter in longer names
_ORIGINAL = "original_max_position_embeddings"


class Switch(NamedTuple):
    """Where a module goes over to another table, for all rows."""

    kind: str
    tokens: int  # of a context that needs the first table alone


def refuse(runner: Any) -> None:
    """Check a loaded model. Raises GateError where requests may reach another table."""
    context = runner.model_config.context_len
    for module in runner.model.modules():
        found = switch_of(module)
        if found is not None and context > found.tokens:
            raise GateError(
                f"this model has rotary tables for contexts of up to {found.tokens} tokens and for "
                f"longer ones ({found.kind}), and SGLang rotates all rows of a forward by those "
                f"that one of them needs, but the context has {context}: use --context-length "
                f"{found.tokens}, or serve this model without --deterministic-gate."
            )


def switch_of(module: Any) -> Switch | None:
    """Of any module; None where rows are rotated each by itself."""
    if type(module).__name__ == _LONG_ROPE:
        return Switch(_LONG, int(module.original_max_position_embeddings))
    kinds = getattr(module, "rope_type", None)  # by kind of layer in some
    named = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    kind = next((each for each in named if each == _LONG or _DYNAMIC in str(each)), None)
    if kind is None:
        return None
    said = _originals(module.config.rope_parameters)
    return Switch(kind, min((module.original_max_seq_len, *said)))


def _originals(parameters: Mapping[str, Any]) -> Iterator[int]:
    """Lengths that a configuration names, of all layers or by their kind."""
    for each in (parameters, *parameters.values()):
        if isinstance(each, Mapping) and _ORIGINAL in each:
            yield each[_ORIGINAL]
