"""How long a stop expression may be tried: SGLang searches on the scheduler's thread.

Bounds, not measurements. What remains is in docs/limits.md: the search begins at every position.
"""

from __future__ import annotations

import math
import re
import re._parser as parser  # type: ignore[import-not-found]
from typing import Any, NamedTuple

LIMIT = 1_000_000  # steps; two repeats without a bound that can share characters
UNBOUNDED = 1000  # characters that a repeat without a bound is taken to have
_MOST = 1e20  # too many by far; larger ones might become inf / inf
_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
_ASCII = 127
_APART = ({"digit", "space"}, {"word", "space"})  # classes without a common character


class _Cost(NamedTuple):
    """Bounds for one position of the text."""

    ways: float  # to match
    steps: float  # to find out that there is no other


def stalls(expression: str) -> bool:
    """Whether the expression may backtrack for too long. Raises re.error where it has no sense."""
    pattern = parser.parse(expression)
    return _of_all(pattern, _folds(pattern.state.flags)).steps >= LIMIT


def _folds(flags: int) -> bool:
    return bool(flags & re.IGNORECASE)


def _of_all(pattern: Any, folds: bool) -> _Cost:
    """Of items one after another: each is tried anew for each way of those before it.

    Args:
        folds: whether upper and lower case are the same somewhere: repeats are not told apart.
    """
    items = list(pattern)
    ways = steps = 1.0
    for item, after in zip(items, [*items[1:], None], strict=True) if items else ():
        cost = _of(item[0], item[1], folds)
        steps += ways * cost.steps
        if folds or not _is_settled(item, after):
            ways *= cost.ways
    return _bounded(ways, steps)


def _of(token: Any, value: Any, folds: bool) -> _Cost:
    if token in _REPEATS:
        least, most, body = value
        most = max(least, min(int(most), UNBOUNDED))
        return _repeated(_of_all(body, folds), most - least + 1, most)
    if token is parser.BRANCH:
        costs = [_of_all(each, folds) for each in value[1]]
        found = [each.ways for each in costs]
        steps = sum(each.steps for each in costs)
        return _bounded(max(found) if _apart(value[1], folds) else sum(found), steps)
    if token is parser.SUBPATTERN:
        folds = folds or _folds(value[1])
    parts = value if isinstance(value, tuple | list) else (value,)
    costs = [_of_all(part, folds) for part in parts if isinstance(part, parser.SubPattern)]
    ways = math.prod(each.ways for each in costs)
    return _bounded(ways, 1 + ways * sum(each.steps for each in costs))


def _bounded(ways: float, steps: float) -> _Cost:
    return _Cost(min(ways, _MOST), min(steps, _MOST))


def _repeated(body: _Cost, counts: int, most: int) -> _Cost:
    ways = math.exp(min(most * math.log(body.ways), math.log(_MOST)))
    return _bounded(counts * ways, max(most, 1) * ways * body.steps / body.ways)


def _is_settled(item: Any, after: Any) -> bool:
    """Whether the item repeats a character that what follows it cannot begin with: one way."""
    token, value = item
    if token not in _REPEATS or len(value[2]) != 1 or after is None:
        return False
    if after[0] in _REPEATS and after[1][0] > 0 and len(after[1][2]):
        after = after[1][2][0]
    return _excludes(value[2][0], after) or _excludes(after, value[2][0])


def _excludes(one: Any, other: Any) -> bool:
    """Whether two items of one character are known to have none in common."""
    if other[0] is parser.LITERAL:
        character = other[1]
        if one[0] is parser.LITERAL:
            return bool(one[1] != character)
        if one[0] is parser.NOT_LITERAL:
            return bool(one[1] == character)
        if one[0] is parser.IN:
            return not _holds(one[1], character)
    kinds = {_category(one), _category(other)}
    return kinds in _APART


def _category(item: Any) -> str | None:
    """`digit`, `space` or `word` if the item is that and nothing else."""
    token, value = item
    if token is not parser.IN or len(value) != 1 or value[0][0] is not parser.CATEGORY:
        return None
    return str(value[0][1]).removeprefix("CATEGORY_").lower()


def _holds(members: Any, character: int) -> bool:
    """Whether a class may hold the character; one that is not known holds every one."""
    inverted = members[0][0] is parser.NEGATE
    found = [_member(token, value, character) for token, value in members[int(inverted) :]]
    if None in found:
        return True
    return any(found) != inverted


def _member(token: Any, value: Any, character: int) -> bool | None:
    if token is parser.LITERAL:
        return bool(value == character)
    if token is parser.RANGE:
        return bool(value[0] <= character <= value[1])
    category = _CATEGORIES.get(str(value))
    if category is None:
        return None
    matches = category.match(chr(character)) is not None
    return None if matches and character > _ASCII else matches  # not in a group with (?a)


_CATEGORIES = {
    f"CATEGORY_{name}": re.compile(escape)
    for name, escape in {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}.items()
}


def _apart(branches: Any, folds: bool) -> bool:
    """Whether the first character says which branch it is.

    Letters of ASCII fold to others of it by their case alone. Others may have more than two forms.
    """
    starts = [branch[0] if len(branch) else (None, None) for branch in branches]
    letters = [int(value or 0) for token, value in starts if token is parser.LITERAL]
    if folds and max(letters, default=0) > _ASCII:
        return False
    return len({chr(each).lower() for each in letters}) == len(starts)
