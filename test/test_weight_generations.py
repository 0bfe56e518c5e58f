"""Requests across a change of weights: which ones gave their tokens, and what of them stands."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.utils.weight_versions import compute_weight_version_spans
from weights_world import Gate, scheduler

from margingate.runtime.compat.kv import columns
from margingate.runtime.compat.model import weights
from margingate.runtime.hooks import handlers
from margingate.runtime.observe.fingerprint import CROSSED, STALE
from margingate.runtime.request.record import GateRequest
from margingate.runtime.schedule import next_batch


def request(output: list[int], *, holds: bool = True) -> Any:
    kv = ReqKvInfo(req_pool_idx=1) if holds else ReqKvInfo()
    record = GateRequest("a", True)
    record.begins(0, 0)
    found = SimpleNamespace(kv=kv, gate=record, output_ids=output, weight_version_events=[])
    found.finished = lambda: False
    assert columns.holds(found) is holds
    return found


def updated(gate: Any) -> None:
    done = SimpleNamespace(success=True)
    gate.weights.around(lambda *_: done, None, SimpleNamespace(flush_cache=False))


def admitted(gate: Any, req: Any) -> None:
    gate.weights.begun(SimpleNamespace(can_run_list=[req]), req)


@pytest.mark.parametrize("guarantee", ["exact", "sparse"])
def test_with_exact_all_that_was_emitted_is_verified_by_the_weights_that_emitted_it(guarantee):
    """Afterwards it stands, whatever the verifier would have said."""
    gate: Any = Gate(scheduler(), guarantee=guarantee)
    running, kept, ended = request([1, 2]), request([1]), request([1, 2])
    kept.gate.kept = SimpleNamespace(tokens=[1, 2])
    ended.finished = lambda: True
    for key, req in zip("abc", (running, kept, ended), strict=True):
        req.gate.key = key
        gate.requests.open(req)
        for canonical in (True, False):
            gate.requests.ledger.emit(key, flagged=False, canonical=canonical)
    seen: list[Any] = []
    gate.weights._settle = lambda: seen.append(
        [list(gate.requests.ledger.wanted(key)) for key in "abc"]
    )
    updated(gate)
    assert seen[-1] == [[2] if guarantee == "exact" else [], [], []]


def test_a_request_says_the_weights_that_computed_it():
    """A running one sees both; one that waits, the new ones; one that ends at once, the old."""
    gate: Any = Gate(scheduler(waiting=1))
    running, chunked, ended = request([1, 2]), request([]), request([1, 2, 3])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[running, ended])
    gate.scheduler.chunked_req = chunked
    waits, retracted = request([], holds=False), request([], holds=False)
    retracted.gate.kept = SimpleNamespace(tokens=[1, 2, 3])
    updated(gate)
    admitted(gate, waits)
    admitted(gate, retracted)
    assert (running.gate.generations(3), chunked.gate.generations(1)) == ([0, 1], [0, 1])
    assert ended.gate.generations(3) == [0], "no token followed"
    assert waits.gate.generations(3) == [1]
    assert retracted.gate.generations(4) == [0, 1]
    assert [each.gate.mixed for each in (running, chunked, waits, retracted)] == [1, 1, 0, 0]
    assert [each.gate.stands for each in (running, chunked, waits, retracted)] == [2, 0, 0, 3]
    assert gate.fingerprint.of(waits.gate.generations(3)) == gate.fingerprint.of()
    assert gate.fingerprint.of(running.gate.generations(3))["fingerprint_because"] == CROSSED


def test_weights_that_cannot_be_read_leave_answers_without_a_fingerprint(monkeypatch):
    """And the request goes on, gated or not."""
    gate: Any = Gate(scheduler())
    updated(gate)
    monkeypatch.setattr(gate.fingerprint, "_weights_now", lambda: 1 / 0)
    req = request([], holds=False)
    admitted(gate, req)
    assert req.gate.generations(1) == [1]
    assert gate.fingerprint.of([1])["fingerprint_because"] == STALE


def test_weights_that_gave_nothing_that_is_left_are_not_named():
    gate: Any = GateRequest("a", True)
    gate.begins(0, 0)
    gate.crosses(1, 5)
    gate.forget_rows(5)  # retracted: what the second weights gave is gone
    gate.begins(2, 5)
    assert gate.generations(10) == [0, 2] and gate.stands == 5
    gate.crosses(3, 8)
    gate.crosses(4, 9)
    gate.forget_rows(3)
    gate.begins(4, 3)
    assert gate.generations(10) == [0, 4] and gate.stands == 3


def test_a_request_is_not_begun_where_it_was_not_admitted():
    gate: Any = Gate(scheduler())
    waits, other = request([], holds=False), request([], holds=False)
    updated(gate)
    for admitted_ones in ([], [other]):
        gate.weights.begun(SimpleNamespace(can_run_list=admitted_ones), waits)
    assert waits.gate.generations(1) == [0]


def test_retracted_for_memory_after_an_update_in_place_its_columns_are_new_and_its_tokens_stand():
    gate: Any = Gate(scheduler())
    req = request([1, 2])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[req])
    updated(gate)
    req.output_ids += [3, 4]  # by new weights, on old columns
    req.kv = ReqKvInfo()
    admitted(gate, req)
    assert (req.gate.mixed, req.gate.stands, req.gate.generations(5)) == (False, 4, [0, 1])


def test_the_tokens_of_a_request_whose_prompt_is_prefilled_again_stand_too():
    """Its output is what that prefill chose; its tokens are given back and replayed later."""
    gate: Any = Gate(scheduler())
    req = request([7])
    req.gate.kept = SimpleNamespace(tokens=[1, 2, 3])
    gate.scheduler.running_batch = SimpleNamespace(reqs=[req])
    updated(gate)
    assert (req.gate.stands, req.gate.generations(3), req.gate.generations(4)) == (3, [0], [0, 1])


def test_sglang_s_versions_of_output_that_the_gate_keeps_apart(monkeypatch):
    """SGLang notes nothing where it sees no output: all would be of the new version."""
    monkeypatch.setattr(weights, "get_serving", lambda: SimpleNamespace(weight_version="one"))
    gate: Any = Gate(scheduler())
    kept, waits = request([], holds=False), request([], holds=False)
    kept.gate.kept, waits.gate.key = SimpleNamespace(tokens=[1, 2, 3]), "b"
    for req in (kept, waits):
        gate.requests.open(req)
    for label in (None, "one", "two"):
        gate.weights.relabelled(label)
    spans = compute_weight_version_spans(kept.weight_version_events, "two", 5)
    assert [(s.version, s.start, s.end) for s in spans] == [("one", 0, 3), ("two", 3, 5)]
    assert waits.weight_version_events == []


def test_a_pause_finds_those_that_flipped_at_their_end_in_the_running_batch(monkeypatch):
    """Else they would hold columns while SGLang retracts all others, and no flush could succeed."""
    gate: Any = Gate(scheduler())
    req = request([1, 2])
    gate.verify_everything = lambda: gate.requests.mark_rejoining(req)
    monkeypatch.setattr(handlers, "_controller", gate)
    monkeypatch.setattr(next_batch.rollback, "rejoin", lambda _, running, reqs: [running, *reqs])
    running = gate.scheduler.running_batch
    handlers.pause_generation(None, None)
    assert gate.scheduler.running_batch == [running, req] and not gate.requests.outside()
