"""What a stop expression may do to the scheduler, on whose thread SGLang searches.

Bounds, not measurements. What remains is in docs/limits.md: the search begins at every position.
"""

from __future__ import annotations

import math
import re
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

LIMIT = 1_000_000  # steps; two repeats without a bound that can share characters
UNBOUNDED = 1000  # characters that a repeat without a bound is taken to have
_MOST = 1e20  # too many by far; larger ones might become inf / inf
_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
_ASCII = 127
_APART = ({"digit", "space"}, {"word", "space"})  # classes without a common character


class Cost(NamedTuple):
    """Bounds for one position of the text."""

    ways: float  # to match
    steps: float  # to find out that there is no other


class _Place(NamedTuple):
    """Of a part of an expression."""

    folds: bool  # upper and lower case are the same here or around it: repeats are not told apart
    after: Any  # the item that follows the part in every match; None where that is not known
    widths: Sequence[Any]  # by group: the least and the most characters


def is_served(expression: str) -> bool:
    """Whether it has a sense, cannot backtrack for too long, and breaks nothing in Python."""
    try:
        re.compile(expression)  # finds more than the parser, as a look-behind of any width
        pattern = parser.parse(expression)
        return bound(pattern).steps < LIMIT and not breaks(pattern)
    except (re.error, RecursionError, OverflowError):
        return False


def breaks(pattern: parser.SubPattern) -> bool:
    """Whether Python may raise SystemError for a text that matches: it restores groups wrongly.

    3.11 to 3.13 do. SGLang's scheduler ends then.
    """
    return _captures(pattern, False)


def _captures(pattern: Any, possessive: bool) -> bool:
    """Whether a possessive repeat has a group that captures, or is `possessive` and has one."""
    for token, value in pattern:
        if possessive and token is parser.SUBPATTERN and value[0] is not None:
            return True
        within = possessive or token is parser.POSSESSIVE_REPEAT
        if any(_captures(part, within) for part in _parts(value)):
            return True
    return False


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _parts(each)


def bound(pattern: parser.SubPattern) -> Cost:
    """Of the whole expression, as Python parsed it."""
    place = _Place(_folds(pattern.state.flags), None, pattern.state.groupwidths)
    return _of_all(pattern, place)


def _folds(flags: int) -> bool:
    return bool(flags & re.IGNORECASE)


def _of_all(pattern: Any, place: _Place) -> Cost:
    """Of items one after another: each is tried anew for each way of those before it."""
    items = list(pattern)
    ways = steps = 1.0
    for item, after in zip(items, [*items[1:], place.after], strict=True) if items else ():
        cost = _of(item[0], item[1], place._replace(after=after))
        steps += ways * cost.steps
        if place.folds or not _is_settled(item, after):
            ways *= cost.ways
    return _bounded(ways, steps)


def _of(token: Any, value: Any, place: _Place) -> Cost:
    if token is parser.SUBPATTERN:
        _, flags, _, body = value
        return _of_all(body, place._replace(folds=place.folds or _folds(flags)))
    if token is parser.BRANCH:
        costs = [_of_all(each, place) for each in value[1]]
        found = [each.ways for each in costs]
        ways = max(found) if _apart(value[1], place.folds) else sum(found)
        return _bounded(ways, sum(each.steps for each in costs))
    if token is parser.GROUPREF:
        return Cost(1, 1 + min(int(place.widths[value][1]), UNBOUNDED))
    within = place._replace(after=None)
    if token in _REPEATS:
        least, most, body = value
        most = max(least, min(int(most), UNBOUNDED))
        cost = _of_all(body, within)
        if token is parser.POSSESSIVE_REPEAT:
            return _bounded(1, max(most, 1) * cost.steps)
        return _repeated(cost, most - least + 1, most)
    costs = [_of_all(part, within) for part in _parts(value)]
    # Assertions and atomic groups are left at their first match.
    ways = max(each.ways for each in costs) if token is parser.GROUPREF_EXISTS else 1
    return _bounded(ways, 1 + sum(each.steps for each in costs))


def _bounded(ways: float, steps: float) -> Cost:
    return Cost(min(ways, _MOST), min(steps, _MOST))


def _repeated(body: Cost, counts: int, most: int) -> Cost:
    ways = math.exp(min(most * math.log(body.ways), math.log(_MOST)))
    return _bounded(counts * ways, max(most, 1) * ways * body.steps / body.ways)


def _is_settled(item: Any, after: Any) -> bool:
    """Whether the item repeats a character that what follows it cannot begin with: one way."""
    token, value = item
    if token not in _REPEATS or len(value[2]) != 1 or after is None:
        return False
    after = _first(after)
    return _excludes(value[2][0], after) or _excludes(after, value[2][0])


def _first(item: Any) -> Any:
    """What the item begins with: an item that is neither a group nor repeated, where possible."""
    token, value = item
    if token in _REPEATS and value[0] > 0 and len(value[2]):
        return _first(value[2][0])
    if token is parser.SUBPATTERN and not _folds(value[1]) and len(value[3]):
        return _first(value[3][0])
    return item


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
