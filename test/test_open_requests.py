"""The rows of a canonical step, entered at once, leave what entering them one by one leaves."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.config import GateConfig
from margingate.core.histogram import EDGES, MarginHistogram
from margingate.core.policy import ALWAYS, CANONICAL
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest, gated_of


def request(key: str, *, gated: bool = True) -> Any:
    return SimpleNamespace(gate=GateRequest(key, gated), rid=key, output_ids=[])


def opened(guarantee: str, reqs: list[Any]) -> OpenRequests:
    requests = OpenRequests(GateConfig(rows=8, guarantee=guarantee))
    for req in reqs:
        requests.open(req)
        requests.enter_row(req, 1.0, CANONICAL, canonical=True)
    return requests


def state(requests: OpenRequests, reqs: list[Any]) -> Any:
    return requests.ledger._accounts, requests.reasons, [req.gate for req in reqs]


@pytest.mark.parametrize("guarantee", ["sparse", "exact"])
def test_rows_entered_at_once_are_as_rows_entered_one_by_one(guarantee: str) -> None:
    ours, theirs = ([request(key) for key in "abc"] for _ in range(2))
    at_once, one_by_one = opened(guarantee, ours), opened(guarantee, theirs)
    for margins in ([0.5, math.inf, 0.0], [2.0, 3.0, 4.0]):
        assert at_once.enter_canonical(list(enumerate(ours)), margins) == []
        for req, margin in zip(theirs, margins, strict=True):
            one_by_one.enter_row(req, margin, CANONICAL, canonical=True)
    assert state(at_once, ours) == state(one_by_one, theirs)
    assert at_once.reasons == {"canonical": 9}


def test_a_row_with_which_something_is_the_matter_is_left() -> None:
    reqs = [request(key) for key in ("fine", "drifted", "faulty", "no number")]
    requests = opened("sparse", reqs)
    requests.enter_row(reqs[1], 0.1, ALWAYS, canonical=False)
    reqs[2].gate.faults = frozenset({3})
    new, free = request("new"), request("free", gated=False)
    rows = list(enumerate([*reqs, new, free]))
    left = requests.enter_canonical(rows, [1.0, 1.0, 1.0, math.nan, 1.0, 1.0])
    assert left == rows[1:]
    assert [len(req.gate.margins) for req in reqs] == [2, 2, 1, 1]
    assert requests.reasons == {"canonical": 5, "always": 1}


def test_who_keeps_tokens_of_before_a_retraction_is_known_until_they_are_replayed() -> None:
    a, b = request("a"), request("b")
    requests = opened("sparse", [a, b])
    assert not requests.any_retracted()
    assert requests.retract(a) == requests.retract(b) == 1
    requests.replay(a)
    assert requests.any_retracted()
    requests.close(b)
    assert not requests.any_retracted()


def test_gated_requests_are_told_from_those_of_before_the_gate() -> None:
    a, b, early = request("a"), request("b", gated=False), SimpleNamespace()
    assert gated_of([a, b, early]) == [a]


def test_margins_that_wait_for_their_bins_are_in_the_record() -> None:
    histogram = MarginHistogram()
    for i in range(10_000):  # more different ones than may wait
        histogram.add_steps([i / 1000, math.nan])
    histogram.add_steps([-1.0, math.inf])
    counts = histogram.record()["steps"]
    assert sum(counts) == 10_002 and counts == histogram.record()["steps"]
    assert counts[0] == 63 + 1 and counts[-1] == 1  # below 1/16 logit; at infinity
    assert counts[EDGES.index(2.5)] == 500
