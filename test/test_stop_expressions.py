"""Bounds of stop expressions, against what `re` does: counted, and measured."""

from __future__ import annotations

import itertools
import re
import re._parser as parser
import time

import pytest
from backtracking import Search, TooManyError

from margingate.runtime.client import stop_expressions
from margingate.runtime.client.parameter_types import refusal

TEXTS = ("aaaaaaaa", "abababab", "aabaabaa", "11111111")
SERVED = (
    (r"(\d+)", "1"),
    (r"(a+)b", "a"),
    (r"Answer: (\d+)\.", "1"),
    (r"\((\d+)\)\n", "1"),
    (r"(\d+)\.((\d+))b", "1"),
    (r"(\d+|[a-z]+):x+", "a"),
    (r"(x?(a+))b+", "a"),
    (r"(?=a+)a+x", "a"),
    (r"(?=(a+)a?)(?!b+)a+x", "a"),
    (r"(?>a+)a+x", "a"),
    (r"a++a++a++x", "a"),
    (r"(?>a*)(?>a*)(?>a*)x", "b"),
    (r"(a)?(?(1)a+|b+)x", "a"),
    (r"(a{1,20})\1x", "a"),
    (r"(a+)b\1x", "a"),
)
REFUSED = (
    "(a+)+",
    "((a+)b?)+",
    "(a|a)+",
    "(a|ab?)+x",
    "(a+)(a+)",
    "(a+)(a+)(a+)x",
    "(a+)((a+)x)",
    "(x?(a+))a+b",
    "((a+)|b)a+x",
    "(?=(a+)+x)",
    "(?!(a|a)+x)",
    "(?:(?=a+)a)+x",
    "(?>(a+)+x)",
    "(?:a+a+x)++",
    r"(a+)\1x",
    r"(?=(a+))a*\1x",
    "(a)?(?(1)(a+)+|b)x",
)
PARTS = (
    *("a", "[ab]+", "(a+)", "(a|ab)", "(?:|a)", "(?>a*)", "a++", "(?=a*)", "(?!a+b)", "(a+?)"),
    *("(?:a{1,3}){2}", "(?:ab?)*+", "(a)?(?(1)a+|b+)", "(a*)b"),
)


@pytest.mark.parametrize(("expression", "letter"), SERVED)
def test_what_is_served_takes_no_time_in_python(expression, letter):
    assert stop_expressions.is_served(expression)
    began = time.thread_time()
    re.search(expression, letter * 300)
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize("expression", REFUSED)
def test_what_is_refused_takes_the_order_of_a_square_at_one_place(expression):
    assert not stop_expressions.is_served(expression)
    search = Search(expression, "a" * 60, 60 * 60 // 5)
    with pytest.raises(TooManyError):
        search.ends()


def expressions() -> list[str]:
    pairs = [one + other for one, other in itertools.product(PARTS, PARTS) if "(?(" not in other]
    forms = ("{}b", "(?:{})+", "({}){{1,3}}a", r"(a|b)?{}\1", "(?={})a*", "(?>{})*b")
    shown = [form.format(pairs[i]) for i, form in zip(range(len(pairs)), itertools.cycle(forms))]
    return [*shown, *(expression for expression, _ in SERVED), *REFUSED]


def test_no_expression_takes_more_than_its_bound(monkeypatch):
    """A repeat that is settled tries what follows it once a character: at most twice as many."""
    monkeypatch.setattr(stop_expressions, "UNBOUNDED", len(TEXTS[0]) + 1)
    counted = 0
    for expression, text in itertools.product(expressions(), TEXTS):
        cost = stop_expressions.bound(parser.parse(expression))
        search = Search(expression, text, 3000)
        try:
            ends = search.ends()
        except TooManyError:
            assert 2 * cost.steps > 3000 or cost.ways > 3000, expression
            continue
        counted += 1
        assert len(ends) <= cost.ways, (expression, text)
        assert search.steps <= 2 * cost.steps, (expression, text)
        found = re.match(expression, text)
        assert (found and found.end()) == (ends[0] if ends else None), (expression, text)
    assert counted > 500


@pytest.mark.parametrize(
    ("expression", "broken"),
    [
        ("(.?(?:a|(b)))*+", True),
        ("(?:.?(?:a|(b))){0,2}+", True),
        ("(?=(?>.?(?:a|(b)))++)", True),
        ("x|(?:.?(?:a|(b)))*+", True),
        ("(?:.?(?:a|b))*+", False),
        ("(?>(.)b)+c", False),
        ("(.)?(?:a|b)*+(b)?", False),
    ],
)
def test_groups_that_python_restores_wrongly(expression, broken):
    """`re` raises SystemError over the former, which is no error of an expression."""
    assert stop_expressions.breaks(parser.parse(expression)) == broken
    assert bool(refusal({"stop_regex": expression})) == broken
    if not broken:
        re.search(expression, "aba")
