"""In how many ways a stop expression can be tried: SGLang searches on the scheduler's thread."""

from __future__ import annotations

import math
import re._parser as parser  # type: ignore[import-not-found]
from typing import Any

LIMIT = math.log(1e6)
_UNBOUNDED = 1000  # characters that a repeat without a bound is taken to have


def stalls(expression: str) -> bool:
    """Whether the expression may backtrack for too long. Raises re.error where it has no sense."""
    return _ways(parser.parse(expression)) > LIMIT + 1e-9


def _ways(pattern: Any) -> float:
    """The logarithm of a bound on the ways to match at one position."""
    return sum(_of(token, value) for token, value in pattern)


def _of(token: Any, value: Any) -> float:
    if token in (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT):
        least, most, body = value
        most = max(least, min(int(most), _UNBOUNDED))
        return math.log(most - least + 1) + most * _ways(body)
    if token is parser.BRANCH:
        inner = max(map(_ways, value[1]))
        return inner if _apart(value[1]) else inner + math.log(len(value[1]))
    parts = value if isinstance(value, tuple | list) else (value,)
    return sum(_ways(part) for part in parts if isinstance(part, parser.SubPattern))


def _apart(branches: Any) -> bool:
    """Whether the first character says which branch it is."""
    starts = [branch[0] if len(branch) else (None, None) for branch in branches]
    letters = {chr(int(value or 0)).lower() for token, value in starts if token is parser.LITERAL}
    return len(letters) == len(starts)
