r"""What Python's `re` does at the start of a text, step by step, so that steps can be counted.

It has no counter of its own. Places (`$`, `\b`), flags and lookbehind are not known here.
"""

from __future__ import annotations

import re._compiler as compiler  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Iterator
from itertools import chain, takewhile
from typing import Any

Groups = dict[int, tuple[int, int]]
State = tuple[int, Groups]  # a position and what groups hold


class TooManyError(Exception):
    """Steps, or ways."""


class Search:
    """Every way to match, in the order in which `re` takes them.

    Args:
        most: steps and ways; TooManyError beyond.
    """

    def __init__(self, expression: str, text: str, most: int) -> None:
        self._pattern, self._text, self._most = parser.parse(expression), text, most
        self.steps = 0

    def ends(self) -> list[int]:
        """Where the text that it matches ends, for each way."""
        found = []
        for end, _ in self._sequence(list(self._pattern), (0, {})):
            found.append(end)
            if len(found) > self._most:
                raise TooManyError
        return found

    def _count(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > self._most:
            raise TooManyError

    def _sequence(self, items: list[Any], state: State) -> Iterator[State]:
        if not items:
            yield state
            return
        for between in self._item(items[0], state):
            yield from self._sequence(items[1:], between)

    def _item(self, item: Any, state: State) -> Iterator[State]:
        token, value = item
        self._count()
        match str(token):
            case "SUBPATTERN":
                yield from self._group(value[0], value[3], state)
            case "BRANCH":
                yield from chain.from_iterable(self._sequence(list(b), state) for b in value[1])
            case "MAX_REPEAT" | "MIN_REPEAT":
                yield from self._repeat(str(token) == "MAX_REPEAT", *value, state, 0, -1)
            case "POSSESSIVE_REPEAT":
                yield from self._possessive(*value, state)
            case "ATOMIC_GROUP":
                yield from self._first(value, state)
            case "ASSERT" | "ASSERT_NOT":
                found = list(self._first(value[1], state))
                if bool(found) == (str(token) == "ASSERT"):
                    yield state[0], found[0][1] if found else state[1]
            case "GROUPREF":
                yield from self._reference(value, state)
            case "GROUPREF_EXISTS":
                body = value[1] if value[0] in state[1] else value[2]
                yield from self._sequence(list(body or ()), state)
            case _:
                yield from self._character(item, state)

    def _first(self, body: Any, state: State) -> Iterator[State]:
        for found in self._sequence(list(body), state):
            yield found
            return

    def _group(self, number: int | None, body: Any, state: State) -> Iterator[State]:
        for end, groups in self._sequence(list(body), state):
            yield end, groups if number is None else {**groups, number: (state[0], end)}

    def _repeat(
        self, greedy: bool, least: int, most: int, body: Any, state: State, done: int, last: int
    ) -> Iterator[State]:
        if not greedy and done >= least:
            yield state
        if done < most and (done < least or state[0] != last):
            began = last if done < least else state[0]
            for found in self._sequence(list(body), state):
                yield from self._repeat(greedy, least, most, body, found, done + 1, began)
        if greedy and done >= least:
            yield state

    def _possessive(self, least: int, most: int, body: Any, state: State) -> Iterator[State]:
        done = 0
        while done < most:
            found = list(self._first(body, state))
            if not found or (found[0][0] == state[0] and done >= least):
                break
            state, done = found[0], done + 1
        if done >= least:
            yield state

    def _reference(self, number: int, state: State) -> Iterator[State]:
        position, groups = state
        if number not in groups:
            return
        begin, end = groups[number]
        held, there = self._text[begin:end], self._text[position : position + end - begin]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, there)))
        self._count(same)
        if same == len(held):
            yield position + same, groups

    def _character(self, item: Any, state: State) -> Iterator[State]:
        position, groups = state
        if position < len(self._text) and _compiled(item).match(self._text[position]):
            yield position + 1, groups


def _compiled(item: Any) -> Any:
    """For items of one character."""
    if str(item) not in _KEPT:
        _KEPT[str(item)] = compiler.compile(parser.SubPattern(parser.State(), [item]))
    return _KEPT[str(item)]


_KEPT: dict[str, Any] = {}
