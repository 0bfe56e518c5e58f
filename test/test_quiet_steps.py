"""A step after which nothing waits asks for nothing, and whatever waits is seen."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from margingate.config import GateConfig
from margingate.runtime.hooks import handlers
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest, Hold
from margingate.runtime.schedule.controller import GateController
from margingate.runtime.schedule.recording import Recorder
from margingate.runtime.schedule.stream import SettledStream
from margingate.runtime.verify.simulation import Simulator


def hold(requests: OpenRequests, req: Any) -> None:
    requests.withhold(req, Hold(None, None, 0.0))


def rejoin(requests: OpenRequests, req: Any) -> None:
    requests.mark_rejoining(req)


def retract(requests: OpenRequests, req: Any) -> None:
    requests.retract(req)


def prefill_again(requests: OpenRequests, req: Any) -> None:
    requests.mark_prefilled_again(req)


def flag(requests: OpenRequests, req: Any) -> None:
    requests.ledger.emit(req.gate.key, flagged=True)
    requests.queue.note(req.gate.key, requests.step)


def controller(
    guarantee: str = "sparse", *, windows: bool = False, drift: bool = True
) -> tuple[Any, Any, list[str]]:
    """One with a decoding request, the request, and what was asked of the rest.

    `windows`: they have a K/V pool of their own; `drift`: some steps are not canonical.
    """
    made, asked = cast(Any, GateController.__new__(GateController)), cast(list[str], [])
    made.config = GateConfig(guarantee=guarantee, rows=8, max_delay=0)
    made.requests = OpenRequests(made.config)
    made.checks = SimpleNamespace(drift=drift, verifier=SimpleNamespace(rows=8))
    made._windows = windows
    made.in_flight = SimpleNamespace(overlaps=True, bring_in_prefill=lambda: asked.append("in"))
    made.merged = SimpleNamespace(waiting=[], note_due=lambda due: asked.append(f"due {due}"))
    made._verify_what_waits = lambda _last: asked.append("waits")
    req = SimpleNamespace(gate=GateRequest("a", True), rid="a", stream=False)
    made.requests.open(req)
    made.requests.ledger.emit("a", flagged=False, canonical=True)
    return made, req, asked


def test_a_quiet_step_asks_for_nothing() -> None:
    gate, _, asked = controller()
    gate.before_next_batch(None)
    assert asked == ["in", "due None"], "and a pass that was due is due no more"


@pytest.mark.parametrize("happens", [hold, rejoin, retract, prefill_again, flag])
def test_whatever_waits_is_looked_at(happens) -> None:
    gate, req, asked = controller()
    happens(gate.requests, req)
    gate.before_next_batch(None)
    assert asked == ["in", "waits"]


def test_verdicts_that_wait_and_exact_streams_are_looked_at() -> None:
    gate, _, asked = controller()
    gate.merged.waiting = [object()]
    gate.before_next_batch(None)
    assert asked == ["in", "waits"]
    gate, _, asked = controller("exact")
    gate.before_next_batch(None)
    assert asked == ["in", "waits"]


@pytest.mark.parametrize("drift", [True, False])
def test_rows_that_nothing_flags_are_looked_at_where_their_windows_fill_a_pool(drift) -> None:
    gate, _, asked = controller(windows=True, drift=drift)
    gate.before_next_batch(None)
    assert asked == (["in", "waits"] if drift else ["in", "due None"])


@pytest.mark.parametrize("windows", [True, False])
def test_such_rows_are_verified_once_they_fill_a_pass(windows) -> None:
    """Else their request would keep what they see to its end."""
    gate, req, _ = controller(windows=windows)
    for rows in range(1, 9):
        gate.requests.ledger.emit("a", flagged=False)
        assert list(gate._full_tails([req])) == ([req] if windows and rows == 8 else [])
    req.stream = True
    assert list(gate._full_tails([req])) == ([req] if windows else []), "exact alone has streams"


@pytest.mark.parametrize("canonical", [True, False])
def test_ends_are_withheld_of_requests_alone_that_may_have_rows_to_verify(canonical) -> None:
    gate, settled, _ = controller()
    flagged, free = (SimpleNamespace(gate=GateRequest(key, key == "b")) for key in "bc")
    gate.requests.open(flagged)
    gate.requests.ledger.emit("b", flagged=True)
    reqs = [settled, flagged, free]
    for req in reqs:
        vars(req).update(finished_reason=None, is_retracted=False, inflight_middle_chunks=0)
    nothing = cast(Any, SimpleNamespace(overlaps=True))
    decode = cast(Any, SimpleNamespace(is_canonical=lambda *_: canonical))
    made = Recorder(
        *(nothing, gate.config, gate.requests, nothing, Simulator(gate.config)),
        decode=decode,
        unseen=math.inf,
    )
    mode = SimpleNamespace(is_extend=lambda: False)
    result = SimpleNamespace(logits_output=None, can_run_cuda_graph=True)
    found = made.record(SimpleNamespace(reqs=reqs, forward_mode=mode), result)
    assert found == (canonical, [flagged] if canonical else [settled, flagged])


def test_sglang_is_not_asked_to_send_for_nobody(monkeypatch) -> None:
    gate, gated, _ = controller()
    nothing = cast(Any, None)
    gate.output = SettledStream(nothing, gate.requests, nothing, nothing)
    monkeypatch.setattr(handlers, "_controller", gate)
    vars(gated).update(finished_reason=None, stream=True, send_token_offset=0, output_ids=[5])
    free = SimpleNamespace(finished_reason=None)
    sent: list[Any] = []

    def original(_streamer: Any, reqs: Any, *_rest: Any) -> None:
        sent.append(reqs)

    with gate.output.muted():
        handlers.stream_output(original, None, [gated], False)
        assert sent == []
        handlers.stream_output(original, None, [gated, free], False)
        handlers.stream_output(original, None, [], False)
    handlers.stream_output(original, None, [gated], False)
    assert sent == [[free], [], [gated]]


def without_overlap() -> tuple[Any, Any, list[str]]:
    """As `controller`, with no step in flight; `asked` is what a result is followed by."""
    gate, req, asked = controller()
    gate.in_flight = SimpleNamespace(
        overlaps=False, is_processed=lambda _: False, arrived=lambda *_: None
    )
    gate.recorder = SimpleNamespace(record=lambda *_: (False, []))
    gate.scheduler, gate.output = None, SimpleNamespace(muted=nullcontext)
    gate.merged = SimpleNamespace(
        waiting=[],
        process_results=lambda _: asked.append("verdicts"),
        put_back=lambda _: asked.append("put back"),
    )
    gate.verify = lambda _batch, reqs: asked.append(f"verify {len(reqs)}")
    return gate, req, asked


def free_batch() -> Any:
    free = SimpleNamespace(gate=GateRequest("free", False), stream=False, finished=lambda: False)
    mode = SimpleNamespace(is_extend=lambda: False, is_decode=lambda: True)
    return SimpleNamespace(reqs=[free], forward_mode=mode)


@pytest.mark.parametrize("waits", [True, False])
def test_a_withheld_end_is_looked_at_where_only_others_decode(waits) -> None:
    """Nobody else would, without overlap, for as long as they do."""
    gate, req, asked = without_overlap()
    if waits:
        hold(gate.requests, req)
    gate.process(lambda *_: None, free_batch(), None)
    assert asked == ["verdicts", "verify 0"][: 1 + waits]


def test_what_a_step_carried_is_put_back_where_its_result_fails() -> None:
    gate, _, asked = without_overlap()
    gate.recorder.record = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        gate.process(lambda *_: None, free_batch(), None)
    assert asked == ["put back"]
