"""How long flagged rows wait, by what the last decode steps looked like."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.config import GateConfig
from margingate.core.costs import DELAYS, Costs, best_delay
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import Counts, GateRequest
from margingate.runtime.verify import delay
from margingate.runtime.verify.delay import EVERY, FEW, FIRST, Pacer

COSTS = Costs(step_ms=8.0, pass_ms=9.0, rows=256)


def make_requests() -> OpenRequests:
    return OpenRequests(GateConfig(rows=256, max_delay=0))


def step(pacer: Pacer, gated: int, times: int = EVERY, *, decode: bool = True) -> None:
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda: decode))
    for _ in range(times):
        pacer.stepped(batch, gated, False)


def test_the_first_delay_is_that_of_a_load_made_up(caplog):
    requests = make_requests()
    with caplog.at_level(logging.INFO):
        Pacer(requests, COSTS)
    assert requests.queue.max_delay == best_delay(FIRST, COSTS) > 0
    assert "(at start: 8.0 requests a step, 15.0 % flagged, 0.50 % flips" in caplog.text


def test_flips_shorten_the_wait_and_calm_makes_it_long_again(caplog):
    requests = make_requests()
    pacer = Pacer(requests, COSTS)
    first = requests.queue.max_delay
    with caplog.at_level(logging.INFO):
        requests.totals = Counts(steps=50_000, flagged=10_000, flips=10_000)
        step(pacer, 2, EVERY - 1)
        assert requests.queue.max_delay == first, "not yet"
        step(pacer, 2, 1)
    wild = requests.queue.max_delay
    assert wild in DELAYS and wild < first and "after 50000 rows: 2.0 requests" in caplog.text
    # What was seen before does not count again.
    requests.totals = Counts(steps=150_000, flagged=60_000, flips=10_000)
    step(pacer, 2)
    assert requests.queue.max_delay > wild


def test_open_requests_count_and_are_not_counted_twice_when_they_end(monkeypatch):
    seen = []
    monkeypatch.setattr(delay, "best_delay", lambda load, *_: seen.append(load) or 4)
    counts = Counts(steps=1000, flagged=1000)
    open_one = SimpleNamespace(gate=GateRequest("a", True, counts=counts))
    requests = make_requests()
    requests.open(open_one)
    pacer = Pacer(requests, COSTS)
    step(pacer, 3)
    assert seen[-1].requests == 3 and seen[-1].trigger_rate == pytest.approx((1000 + 150) / 2000)
    requests.close(open_one)
    step(pacer, 5)
    assert seen[-1].requests == 5 and seen[-1].trigger_rate == pytest.approx(FIRST.trigger_rate)
    assert seen[-1].flip_rate == pytest.approx(FIRST.flip_rate)


def test_prefills_and_steps_without_gated_requests_are_not_looked_at(monkeypatch):
    looks = []
    monkeypatch.setattr(delay, "best_delay", lambda load, *_: looks.append(load) or 4)
    pacer = Pacer(make_requests(), COSTS)
    step(pacer, 0, 3 * EVERY)
    step(pacer, 4, 3 * EVERY, decode=False)
    assert len(looks) == 1
    step(pacer, 4)
    assert len(looks) == 2


def test_a_delay_that_stays_is_not_told(caplog):
    pacer = Pacer(make_requests(), COSTS)
    with caplog.at_level(logging.INFO):
        step(pacer, int(FIRST.requests))
    assert not caplog.text


def observers(*, max_delay: int | None = None, device: str = "cuda", merges: bool = True) -> Any:
    """The queue's delay afterwards, and who is to be told."""
    scheduler = SimpleNamespace(server_args=SimpleNamespace(tp_size=1))
    verifier: Any = SimpleNamespace(device=device, rows=COSTS.rows)
    requests, config = make_requests(), GateConfig(max_delay=max_delay)
    found = delay.observers(scheduler, config, verifier, requests, merges=merges)
    return requests.queue.max_delay, found


@pytest.mark.parametrize(
    "changes", [{"max_delay": 0}, {"max_delay": 8}, {"merges": False}, {"device": "cpu"}]
)
def test_there_is_no_pacer_where_passes_are_not_to_be_spaced(changes, monkeypatch):
    monkeypatch.setattr(delay, "measure", None)
    assert observers(**changes) == (0, ())


def test_the_pacer_of_a_stock_path_on_a_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(delay, "measure", lambda _verifier: (COSTS.step_ms, COSTS.pass_ms))
    chosen, (pacer,) = observers()
    merging = replace(COSTS, merges=True)
    assert isinstance(pacer, Pacer) and chosen == best_delay(FIRST, merging)


@pytest.mark.parametrize(
    ("sizes", "few"), [([1, 2, 4, 8, 16], 8), ([1, 12, 16], 12), ([1, 2, 4], 4), (None, FEW)]
)
def test_a_step_of_a_few_rows_is_timed_with_graphs_or_without(sizes, few, monkeypatch):
    forwards = []

    class Verifier:
        def __init__(self, runner: Any, rows: int, *, graphs: Any = None) -> None:
            self.runner, self.rows, self.graphs = runner, rows, graphs

        def forward(self, rows: list[Any], count: int) -> None:
            forwards.append((len(rows), count, self.graphs))

    monkeypatch.setattr(delay, "Verifier", Verifier)
    monkeypatch.setattr(delay.torch.cuda, "synchronize", lambda: None)
    graphs = None if sizes is None else SimpleNamespace(capture_bs=sizes)
    own = Verifier(SimpleNamespace(decode_cuda_graph_runner=graphs), 256, graphs="own")
    assert all(each >= 0 for each in delay.measure(own))
    timed = delay.TIMED
    assert forwards == [(1, few, graphs)] * timed + [(1, 256, "own")] * timed
