"""Which passes ride in a decode step, and when their verdicts are entered."""

from __future__ import annotations

from time import monotonic as now
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.core.ledger import Ledger
from margingate.core.queue import MicroBatchQueue
from margingate.runtime import ends, rides, verdicts
from margingate.runtime.rides import PATIENCE, Ride, Rides
from margingate.runtime.verifier import RowInput, RowResult, Verifier
from margingate_kernels import Top2

V = 8
DECODE = SimpleNamespace(is_decode=lambda: True)
PREFILL = SimpleNamespace(is_decode=lambda: False)


def make_request(key: str, **changes: Any) -> SimpleNamespace:
    given = {"return_logprob": False, "output_ids": list(range(100, 130)), **changes}
    given.setdefault("origin_input_ids", [0] * 8)  # and IN_FLIGHT: a row sees at most 40 keys
    given.setdefault("grammar", None)
    given["sampling_params"] = SimpleNamespace(logit_bias=given.pop("bias", None))
    gate = SimpleNamespace(key=key, draw=given.pop("draw", None), grammar_start=None)
    gate.grammar_failed = False
    gate.penalties = None
    return SimpleNamespace(gate=gate, rid=key, **given)


class Controller:
    """What rides look at; the ledger and the queue are the real ones."""

    def __init__(self, delay: int = 2, **changes: Any) -> None:
        self.ledger, self.queue = Ledger("sparse", "span"), MicroBatchQueue(V, delay)
        self.requests: dict[str, Any] = {}
        self.held: set[str] = set()
        self.step = 0
        self.canonical, self.observes_only = None, False
        self.verifier = SimpleNamespace(rows=V, backend=object())
        self.scheduler = SimpleNamespace(running_batch=SimpleNamespace(reqs=[]))
        self.simulator = SimpleNamespace(verdict=lambda _req, _row, result: result)
        vars(self).update(changes)
        self.rides = Rides(self)  # type: ignore[arg-type]

    def is_held(self, req: Any) -> bool:
        return req.gate.key in self.held

    def add(self, key: str, rows: int, flagged: int, **changes: Any) -> Any:
        """A decoding request with `rows` rows, the one at `flagged` flagged now."""
        req = self.requests[key] = make_request(key, **changes)
        self.scheduler.running_batch.reqs.append(req)
        self.ledger.open(key)
        for row in range(1, rows + 1):
            self.ledger.emit(key, flagged=row == flagged, canonical=row == 1)
        self.queue.note(key, self.step)
        return req

    def board(self, mode: Any = DECODE, rows: int | None = None) -> Any:
        count = len(self.scheduler.running_batch.reqs) if rows is None else rows
        return self.rides.board(SimpleNamespace(forward_mode=mode, batch_size=count))


def best(tokens: list[int], margin: float = 1.0) -> Top2:
    ids, margins = torch.tensor(tokens), torch.full((len(tokens),), margin)
    return Top2(ids, ids + 1, margins, -margins)


def land(controller: Controller, boarded: Any, tokens: list[int]) -> None:
    rows, due = boarded
    ride = Ride(rows, due, now(), best(tokens))
    controller.rides.land(SimpleNamespace(logits_output=SimpleNamespace(gate_ride=ride)))


@pytest.fixture
def entered(monkeypatch) -> list[Any]:
    """What is entered, in place of entering it."""
    calls: list[Any] = []
    monkeypatch.setattr(
        verdicts, "enter", lambda _c, rows, results, *_: calls.append((rows, results))
    )
    return calls


def test_a_due_pass_rides_in_the_next_decode_step_and_in_no_prefill():
    controller = Controller(delay=2)
    controller.add("a", 6, 5)
    assert controller.board() is None, "it may wait two steps"
    controller.step = 2
    assert controller.rides.expected("delay")
    assert controller.board(PREFILL) is None
    rows, due = controller.board()
    assert [row.index for row in rows] == [2, 3, 4, 5] and due == "delay"
    assert controller.rides.count == 1
    assert controller.board() is None, "its rows are in flight"


def test_a_step_carries_as_many_rows_as_it_leaves_room_for():
    controller = Controller(delay=1)
    for key in "abc":
        controller.add(key, 9, 9)
    controller.step = 1
    rows, _ = controller.board()
    assert len(rows) == V - 3 and {row.rid for row in rows} == {"a"}


@pytest.mark.parametrize(
    ("delay", "decoding", "changes"),
    [
        (0, 1, {}),
        (1, V // 2 + 1, {}),
        *((1, 1, {"return_logprob": True}), (1, 1, {"draw": object()})),
        *((1, 1, {"grammar": object()}), (1, 1, {"bias": {"5": 1.0}})),
    ],
)
def test_passes_that_go_alone(delay: int, decoding: int, changes: dict[str, Any]):
    controller = Controller(delay)
    controller.add("a", 4, 3, **changes)
    running = controller.scheduler.running_batch.reqs
    running += [make_request(f"other-{i}") for i in range(decoding - 1)]
    controller.step = 1
    assert controller.board() is None and not controller.rides.expected("delay")


@pytest.mark.parametrize(("room", "taken"), [(10_000, 5), (320, 5), (240, 3), (239, 0), (120, 0)])
def test_with_the_gates_own_attention_a_step_has_room_for_so_many_keys(room: int, taken: int):
    own = SimpleNamespace(margingate=SimpleNamespace(room=room))
    controller = Controller(1, verifier=SimpleNamespace(rows=V, backend=own))
    for key in "abc":  # a step of theirs sees up to 120 keys
        controller.add(key, 9, 9)
    controller.step = 1
    assert controller.rides.expected("delay") is bool(taken)
    rows, _ = controller.board() or ((), None)
    assert len(rows) == taken


@pytest.mark.parametrize(
    "changes", [{"canonical": object()}, {"observes_only": True}], ids=["canonical", "observes"]
)
def test_servers_without_rides(changes: dict[str, Any]):
    controller = Controller(1, **changes)
    controller.add("a", 4, 3)
    controller.step = 1
    assert controller.board() is None and not controller.rides.expected("delay")


def test_a_pass_does_not_wait_where_nothing_decodes_or_for_long():
    controller = Controller(1)
    req = controller.add("a", 4, 3)
    controller.held.add("a")
    assert not controller.rides.expected("draining")
    controller.held.clear()
    assert controller.rides.expected("delay")
    controller.step = PATIENCE
    assert controller.rides.expected("delay")
    controller.step = PATIENCE + 1
    assert not controller.rides.expected("delay")
    assert not controller.rides.expected(None) and controller.rides.expected("delay")
    controller.scheduler.running_batch.reqs.remove(req)
    assert not controller.rides.expected("delay")


def test_verdicts_that_agree_are_entered_at_once(entered):
    controller = Controller(1)
    controller.add("a", 6, 4)
    controller.step = 1
    boarded = controller.board()
    land(controller, boarded, [101, 102, 103])
    assert not controller.rides.landed
    [(rows, results)] = entered
    assert rows == boarded[0] and [each.token for each in results] == [101, 102, 103]


def test_a_flip_waits_for_a_moment_with_nothing_in_flight(entered):
    controller = Controller(1)
    controller.add("a", 6, 4)
    controller.step = 1
    land(controller, controller.board(), [101, 7, 103])
    assert not entered and len(controller.rides.landed) == 1
    controller.add("b", 6, 4)
    controller.step = 2
    land(controller, controller.board(), [101, 102, 103])
    assert not entered, "the next ones wait behind it"
    controller.rides.enter()
    assert len(entered) == 2 and not controller.rides.landed


@pytest.mark.parametrize("gone", ["retracted", "closed"])
def test_verdicts_on_rows_that_are_gone_take_nothing_back(gone: str, entered):
    controller = Controller(1)
    req = controller.add("a", 6, 4)
    controller.step = 1
    boarded = controller.board()
    if gone == "retracted":
        controller.ledger.retract("a")
        req.output_ids = []
    else:
        controller.ledger.close("a")
        del controller.requests["a"]
    land(controller, boarded, [1, 2, 3])
    assert len(entered) == 1


def test_a_result_without_a_pass_lands_nothing(entered):
    controller = Controller(1)
    controller.rides.land(SimpleNamespace(logits_output=None))
    controller.rides.land(SimpleNamespace(logits_output=SimpleNamespace()))
    assert not entered and not controller.rides.landed


def test_the_first_row_is_judged_by_the_prefill():
    rows = Ledger("exact", "span")
    rows.open("a")
    rows.emit("a", flagged=True)
    rows.emit("a", flagged=True)
    ride = Ride(rows.take("a", 2), "full", now(), best([9], 0.5))
    assert ride.results() == [None, RowResult(9, 0.5, None)]


def test_the_steps_rows_come_first_in_the_forward():
    table = torch.arange(12).view(2, 6) + 50
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table), attn_backend=None, device="cpu"
    )
    beside = SimpleNamespace(
        batch_size=2,
        req_pool_indices=torch.tensor([7, 8]),
        positions=torch.tensor([3, 4]),
        input_ids=torch.tensor([30, 40]),
        out_cache_loc=torch.tensor([300, 400]),
        seq_lens_cpu=torch.tensor([4, 5]),
    )
    batch = Verifier(runner, 5).batch([RowInput(1, 2, 11), RowInput(1, 3, 12)], 5, beside)
    assert batch.batch_size == 5
    assert batch.req_pool_indices.tolist() == [7, 8, 1, 1, 0]
    assert batch.input_ids.tolist() == [30, 40, 11, 12, 0]
    assert batch.positions.tolist() == [3, 4, 2, 3, 0]
    assert batch.out_cache_loc.tolist() == [300, 400, 58, 59, 50]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [4, 5, 3, 4, 1]
    assert batch.seq_lens_sum == 17


def test_a_forward_without_a_gate_is_sglangs_own(monkeypatch):
    monkeypatch.setattr(rides.state, "active", lambda: None)
    assert rides.forward(lambda *given: given, "runner", "batch", None) == ("runner", "batch", None)


def grammar_fails_at(controller: Controller, key: str) -> Any:
    """A request in whose verify pass the grammar gives up."""
    req = controller.add(key, 4, 3, grammar=object())
    req.gate.grammar_failed = True
    req.gate.counts = SimpleNamespace(passes=0)
    req.finished_reason = req.to_finish = None
    req.finished = lambda: req.finished_reason is not None
    req.update_finish_state = lambda _n: vars(req).update(finished_reason=req.to_finish)
    return req


def test_a_grammar_that_fails_in_a_pass_aborts_its_request_and_nothing_else(monkeypatch):
    """Whatever token a row without its mask says, it is no verdict."""
    freed: list[Any] = []
    monkeypatch.setattr(ends, "end", lambda _c, req: freed.append(req))
    controller = Controller(1, rejoining=[], observers=(), dues={}, totals=SimpleNamespace())
    controller.totals.passes = 0
    judged: list[int] = []
    monkeypatch.setattr(verdicts, "_judge", lambda _c, row, _r: judged.append(row.rid))
    controller.note_settled = lambda _req: None
    bad, good = grammar_fails_at(controller, "bad"), controller.add("good", 4, 3)
    good.gate.counts, good.finished = SimpleNamespace(passes=0), lambda: False
    controller.held = {"bad": bad}  # type: ignore[assignment]
    bad.gate.hold = SimpleNamespace(since=0.0)
    bad.gate.counts.drain_s = 0.0
    rows = controller.queue.next_batch(controller.ledger)
    assert {row.rid for row in rows} == {"bad", "good"}
    results = [RowResult(999, 1.0, None)] * len(rows)
    for row, result in zip(rows, results, strict=True):
        assert row.rid == "good" or not verdicts.matches(controller, row, result)
    verdicts.enter(controller, rows, results, now(), "full")
    assert isinstance(bad.finished_reason, FINISH_ABORT) and freed == [bad]
    assert set(judged) == {"good"} and not controller.held
    controller.queue.note("good", 1)
    assert all(row.rid != "bad" for row in controller.queue.next_batch(controller.ledger))
