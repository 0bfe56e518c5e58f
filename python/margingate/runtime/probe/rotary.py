"""Rotary tables, which have no parameters to measure: one kind rotates a row by what others need.

SGLang's LongRoPE (Phi 3 and 4, MiniCPM 4) has two tables, for short contexts and for long ones. It
rotates all rows of a forward by the second where one of them stands beyond the first. A row then
has other keys beside a long request, and a prompt has others where it is cut elsewhere. The checks
of the whole model are too short to see it.
"""

from __future__ import annotations

from typing import Any

from margingate.config import GateError

LONG_ROPE = "Phi3LongRoPEScaledRotaryEmbedding"


def refuse(runner: Any) -> None:
    """Check a loaded model. Raises GateError where requests may reach the second table."""
    context = runner.model_config.context_len
    for module in runner.model.modules():
        if type(module).__name__ != LONG_ROPE:
            continue
        first = module.original_max_position_embeddings
        if context > first:
            raise GateError(
                f"this model has rotary tables for contexts of up to {first} tokens and for longer "
                f"ones (longrope), and SGLang rotates all rows of a forward by those that one of "
                f"them needs, but the context has {context}: use --context-length {first}, or "
                "serve this model without --deterministic-gate."
            )
