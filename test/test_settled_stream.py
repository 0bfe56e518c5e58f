"""SGLang's streamer is given settled tokens alone; a failure for one request is nobody else's."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, FINISH_MATCHED_TOKEN

from margingate.config import GateConfig
from margingate.runtime.hooks import handlers
from margingate.runtime.hooks.scheduler_table import RUNTIME_HOOKS
from margingate.runtime.request import guard, lifecycle
from margingate.runtime.request.guard import Policy
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import GateRequest
from margingate.runtime.schedule.stream import SettledStream

TARGET = "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output"


class Req(SimpleNamespace):
    """One that streams, unless told otherwise."""

    def __init__(self, key: str, tokens: int = 4, *, gated: bool = True, **more: Any) -> None:
        given = {"finished_reason": None, "finished_output": False, "send_token_offset": 0}
        given |= {"finished_len": None, "to_finish": None, "stream": True, "return_logprob": False}
        outputs = array("q", range(5, 5 + tokens))
        gate = GateRequest(key, gated)
        super().__init__(rid=key, gate=gate, output_ids=outputs, extra_key=None, **(given | more))

    def finished(self) -> bool:
        return self.finished_reason is not None


class Streamer:
    """The gate's around one that sends all it is shown, as SGLang's does."""

    def __init__(self) -> None:
        self.requests = OpenRequests(GateConfig(rows=8))
        fingerprint = cast(Any, SimpleNamespace(of=lambda _seen: {}))
        nothing = cast(Any, None)
        self.gate = SettledStream(GateConfig(rows=8), self.requests, nothing, fingerprint)
        self.sent: dict[str, list[int]] = {}
        self.shown: list[Any] = []

    def add(self, key: str, tokens: int = 4, *, unsettled: int = 0, **more: Any) -> Any:
        """A gated request, whose last `unsettled` tokens wait for a verify pass."""
        req = Req(key, tokens, **more)
        self.requests.open(req)
        for row in range(1, tokens + 1):
            self.requests.ledger.emit(key, flagged=row > tokens - unsettled)
        return req

    def original(self, _streamer: Any, reqs: list[Any], *_: Any) -> None:
        for req in reqs:
            shown = req.output_ids[: req.finished_len]
            self.shown.append(shown)
            self.sent.setdefault(req.rid, []).extend(shown[req.send_token_offset :])
            req.send_token_offset = len(shown)
            req.finished_output = req.finished_output or req.finished()

    def send(self, *reqs: Any, skip: Any = None) -> None:
        self.gate.send(self.original, None, list(reqs), False, skip)


@pytest.mark.parametrize(("unsettled", "copied"), [(0, False), (1, True)])
def test_an_output_that_is_settled_is_not_copied(unsettled, copied):
    streamer = Streamer()
    req = streamer.add("a", unsettled=unsettled)
    tokens, seen = req.output_ids, []
    streamer.gate.send(lambda _s, reqs, *_: seen.append(reqs[0].output_ids), None, [req], False, 0)
    assert (seen[0] is not tokens) == copied
    assert list(seen[0]) == [5, 6, 7, 8][: 4 - unsettled]
    assert req.output_ids is tokens


def test_of_each_request_of_a_batch_the_settled_tokens_leave_and_no_others():
    """Once, in order, and whatever else is in the batch."""
    streamer = Streamer()
    settled, tail, none = (streamer.add(str(n), 4, unsettled=n) for n in (0, 2, 4))
    retracted, whole = streamer.add("kept"), streamer.add("whole", stream=False)
    retracted.gate.kept = object()
    free = Req("free", gated=False)
    ended = streamer.add("ended", finished_reason=FINISH_LENGTH(4))
    chunked = Req("chunked", 0, finished_reason=FINISH_LENGTH(4))
    told = Req("told", finished_reason=FINISH_LENGTH(4), finished_output=True)
    reqs = (settled, tail, none, retracted, whole, free, ended, chunked, told)
    outputs = [req.output_ids for req in reqs]
    streamer.send(*reqs, skip=chunked)
    every = [5, 6, 7, 8]
    assert streamer.sent == {"ended": every, "free": every, "0": every, "2": [5, 6]}
    assert all(req.output_ids is output for req, output in zip(reqs, outputs, strict=True))
    assert [streamer.requests.ledger.sent(req.gate.key) for req in (settled, tail)] == [4, 2]
    assert "ended" not in streamer.requests and "gate" in ended.customized_info
    streamer.send(settled, tail)
    assert len(streamer.shown) == 4, "nothing new is settled"


def test_a_score_has_no_log_prob_of_a_token_that_nobody_gets():
    """A forward of gated scores samples."""
    streamer = Streamer()
    for most, kept in ((0, []), (4, [-0.5])):
        lists = {"output_token_logprobs_val": [-0.5], "output_token_logprobs_idx": [5]}
        kind = {"return_logprob": True, "logprob": SimpleNamespace(**lists), "logprob_start_len": 9}
        kind |= {"sampling_params": SimpleNamespace(max_new_tokens=most), "origin_input_ids": [1]}
        req = streamer.add(str(most), 1, finished_reason=FINISH_LENGTH(most), **kind)
        streamer.send(req)
        assert req.logprob.output_token_logprobs_val == kept
        assert len(req.logprob.output_token_logprobs_idx) == len(kept)


def test_outputs_are_whole_again_whatever_sglang_does():
    streamer = Streamer()
    req, whole = streamer.add("a", unsettled=1), array("q", [5, 6, 7, 8])

    def original(*_: Any) -> None:
        raise ValueError("of SGLang")

    with pytest.raises(ValueError, match="of SGLang"):
        streamer.gate.send(original, None, [req], False, None)
    assert req.output_ids == whole


def is_ended(req: Any) -> bool:
    reason = req.finished_reason or req.to_finish
    return getattr(reason, "status_code", None) == 500


@pytest.mark.parametrize("where", ["settled_length", "mark_sent"])
def test_what_raises_for_one_that_streams_ends_that_one_alone(monkeypatch, where):
    streamer = Streamer()
    good, bad, after = (streamer.add(key, unsettled=1) for key in ("good", "bad", "after"))
    ledger = streamer.requests.ledger
    real = getattr(ledger, where)

    def raising(rid: str, *rest: Any) -> Any:
        if rid == "bad":
            raise RuntimeError("ours")
        return real(rid, *rest)

    monkeypatch.setattr(ledger, where, raising)
    streamer.send(good, bad, after)
    assert [is_ended(req) for req in (good, bad, after)] == [False, True, False]
    assert streamer.sent["good"] == streamer.sent["after"] == [5, 6, 7]
    assert len(streamer.sent.get("bad", ())) == (3 if where == "mark_sent" else 0)
    assert all(len(req.output_ids) == 4 for req in (good, bad, after))


@pytest.mark.parametrize("where", ["summary", "close"])
def test_what_raises_for_one_that_ends_ends_that_one_alone(monkeypatch, where):
    """Before it was told, with HTTP 500 and nothing more; afterwards, it was told."""
    streamer = Streamer()
    reqs = [streamer.add(key, finished_reason=FINISH_LENGTH(4)) for key in ("good", "bad", "after")]
    bad = reqs[1]
    owner = GateRequest if where == "summary" else OpenRequests
    real = getattr(owner, where)

    def raising(self: Any, given: Any) -> Any:
        if bad.gate in (self, getattr(given, "gate", None)):
            raise RuntimeError("ours")
        return real(self, given)

    monkeypatch.setattr(owner, where, raising)
    streamer.send(*reqs)
    assert [is_ended(req) for req in reqs] == [False, where == "summary", False]
    assert streamer.sent["good"] == streamer.sent["after"] == [5, 6, 7, 8]
    assert streamer.sent["bad"] == ([] if where == "summary" else [5, 6, 7, 8])
    assert all(req.finished_output for req in reqs)
    assert list(streamer.requests) == ([bad] if where == "close" else [])


def test_a_failure_of_the_hook_itself_ends_the_gated_requests_and_tells_ends_alone(monkeypatch):
    """None of them with a token that was not settled."""
    streamer = Streamer()
    tail, ended = streamer.add("tail", unsettled=1), streamer.add("ended", unsettled=1)
    ended.finished_reason, free = FINISH_LENGTH(4), Req("free", gated=False)
    (hook,) = (each for each in RUNTIME_HOOKS if each.target == TARGET)
    assert hook.policy is Policy.BATCH
    monkeypatch.setattr(SettledStream, "_settled", lambda *_: 1 / 0)
    monkeypatch.setattr(handlers, "_controller", SimpleNamespace(output=streamer.gate))
    guarded = guard.wrap("toy", hook.function, hook.policy, around=True, instead=hook.instead)
    guarded(streamer.original, None, [tail, ended, free], False)
    assert is_ended(tail) and is_ended(ended) and not is_ended(free)
    assert streamer.sent == {"ended": [], "free": [5, 6, 7, 8]}
    assert list(streamer.requests) == [tail], "its next finish check ends it"


def test_an_end_that_was_not_withheld_is_not_told_with_rows_to_verify():
    """SGLang would have found it in another way than it does."""
    streamer = Streamer()
    bad, good = (
        streamer.add(k, unsettled=k == "a", finished_reason=FINISH_LENGTH(4)) for k in "ab"
    )
    streamer.send(bad, good)
    assert streamer.sent == {"a": [], "b": [5, 6, 7, 8]} and is_ended(bad)


def test_what_a_request_stopped_at_leaves_with_its_end():
    """SGLang's detokenizer takes a stop token off the text that an end comes with, and no other."""
    streamer = Streamer()
    req = streamer.add("a", 4)
    streamer.requests.ledger.emit("a", flagged=True)  # and behind it the last one, which is not
    streamer.requests.ledger.emit("a", flagged=False)
    req.output_ids.extend([9, 99])
    streamer.send(req)
    rows = streamer.requests.ledger.take("a", 8)
    req.finished_reason, req.finished_len = FINISH_MATCHED_TOKEN(matched=99), 6
    lifecycle.finish_checked(streamer.requests, req)
    assert streamer.requests.is_held(req)
    for row in rows:
        streamer.requests.ledger.verdict(row, match=True)
    assert streamer.requests.is_settled(req)
    streamer.send(req)
    assert streamer.sent == {"a": [5, 6, 7, 8]}
    held = streamer.requests.unhold(req)
    req.finished_reason = held.reason
    streamer.send(req)
    assert streamer.sent == {"a": [5, 6, 7, 8, 9, 99]} and req.finished_output


def test_an_aborted_request_that_is_not_open_tells_nothing_more():
    """Nothing is known of what it has."""
    streamer = Streamer()
    req = streamer.add("a", finished_reason=FINISH_ABORT("made up"), send_token_offset=1)
    streamer.requests.close(req)
    free = Req("free", gated=False, finished_reason=FINISH_ABORT("made up"))
    streamer.send(req, free)
    assert streamer.sent == {"a": [], "free": [5, 6, 7, 8]}


def test_as_a_result_is_processed_only_ends_and_what_is_not_gated_may_be_sent():
    streamer = Streamer()
    decoding, ended = streamer.add("a"), streamer.add("b", finished_reason=FINISH_LENGTH(4))
    free, early = Req("c", gated=False), Req("d")
    del early.gate  # made before the gate was up
    with streamer.gate.muted():
        streamer.send(decoding, ended, free, early)
    assert list(streamer.sent) == ["b", "c", "d"]
    streamer.send(decoding)
    assert list(streamer.sent) == ["b", "c", "d", "a"]
