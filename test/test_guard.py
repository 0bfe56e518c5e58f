"""The guard around hooks: an original runs once, and its exceptions are its own."""

import contextlib
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from margingate.runtime.request import guard
from margingate.runtime.request.guard import Policy
from margingate.runtime.request.observer import Observer, Observers
from margingate.runtime.request.record import GateRequest
from margingate.runtime.schedule import prefill_admission


def raising(*_args, **_kwargs):
    raise RuntimeError("ours")


CONTAINING = tuple(each for each in Policy if each not in (Policy.FATAL, Policy.CLIENT))


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("around", [True, False])
def test_a_hook_is_counted_when_it_runs_and_not_before(monkeypatch, policy, around):
    """Whatever it ends, and whether it raises: what must have run is asked for by these counts."""
    monkeypatch.setattr(guard, "_tallies", {})
    given = (lambda: None,) if around else ()
    for name, function in (("runs", lambda *_: None), ("fails", raising)):
        hook = guard.wrap(name, function, policy, around=around)
        assert guard.tallies()[name].fired == 0
        for count in (1, 2):
            with contextlib.suppress(RuntimeError):
                hook(*given)
            tally = guard.tallies()[name]
            assert (tally.fired, tally.failed) == (count, count * (name == "fails"))


@pytest.mark.parametrize("policy", CONTAINING)
@pytest.mark.parametrize("first", [True, False])
def test_an_around_hook_that_raises_calls_the_original_once(policy, first):
    calls = []

    def original(value):
        calls.append(value)
        return value + 1

    def hook(original, value):
        if first:
            original(value)
        raise RuntimeError("ours")

    assert guard.wrap("toy", hook, policy, around=True)(original, 1) == 2
    assert calls == [1]


@pytest.mark.parametrize("policy", Policy)
def test_an_exception_of_the_original_passes_unchanged_and_is_not_counted(policy):
    error = ValueError("theirs")

    def original():
        raise error

    # Two hooks, one within the other's original, as result processing within scheduling.
    inner = guard.wrap("toy.theirs", lambda original: original(), Policy.BATCH, around=True)
    outer = guard.wrap("toy.theirs", lambda f: f(original), policy, around=True)
    with pytest.raises(ValueError) as caught:
        outer(inner)
    assert caught.value is error
    if policy in CONTAINING:
        assert "toy.theirs" not in guard.failures()


def test_hooks_before_and_after_change_nothing_where_they_raise():
    hook = guard.wrap("toy.before", raising, Policy.OBSERVE, around=False)
    assert hook("argument") is None
    assert guard.failures()["toy.before"] == 1


@pytest.mark.parametrize("policy", [Policy.FATAL, Policy.CLIENT])
def test_what_is_not_contained_passes_and_is_counted(policy):
    with pytest.raises(RuntimeError, match="ours"):
        guard.wrap(f"toy.{policy}", raising, policy, around=False)()
    assert guard.failures()[f"toy.{policy}"] == 1


def test_an_observer_that_raises_keeps_the_others_informed():
    told = []
    observers = (SimpleNamespace(turned=raising), SimpleNamespace(turned=lambda: told.append(1)))
    guard.tell(observers, "turned")
    assert told == [1]


def test_an_observer_is_told_of_what_it_does_something_about():
    class Turns(Observer):
        def turned(self) -> None:
            told.append(self)

    told: list[Observer] = []
    turns, observers = Turns(), Observers()
    observers.add(turns, Observer())
    observers.add(Turns())
    observers.turned()
    observers.audited("rid")
    assert told[0] is turns and len(told) == 2
    assert [len(each) for each in observers._told.values()].count(0) == len(observers._told) - 1


def made(key: str, gated: bool = True) -> SimpleNamespace:
    gate = GateRequest(key, gated)
    return SimpleNamespace(gate=gate, rid=key, to_finish=None, finished=lambda: False)


def test_a_failure_within_a_forward_ends_the_gated_requests_of_that_forward():
    before, gated, other = made("before"), made("gated"), made("other", gated=False)
    guard.launches(SimpleNamespace(reqs=[before]))
    guard.launches(SimpleNamespace(reqs=[gated, other]))
    hook = guard.wrap("toy.sample", raising, Policy.FORWARD, around=True)
    assert hook(lambda *_: "tokens", "runner") == "tokens", "those of the others go on"
    assert gated.to_finish.status_code == 500 and gated.gate.failed
    assert before.to_finish is None and other.to_finish is None
    guard.launches(None)


def test_a_failure_of_a_pause_ends_the_open_gated_requests():
    reqs = [made("a"), made("b")]
    guard.serve(reqs)
    guard.wrap("toy.pause", raising, Policy.OPEN, around=False)("scheduler", "received")
    assert all("toy.pause (RuntimeError: ours)" in req.to_finish.message for req in reqs)
    guard.serve(())


def test_what_is_called_instead_takes_the_place_of_an_original_that_was_not_called():
    calls = []
    hook = guard.wrap(
        "toy.abort", raising, Policy.OBSERVE, around=True, instead=lambda *given: given
    )
    assert hook(calls.append, "scheduler", "received") == (calls.append, "scheduler", "received")
    assert not calls


@pytest.mark.parametrize("kept", [None, "tokens"])
def test_a_request_that_failed_before_its_prefill_is_refused_away_from_gated_columns(kept):
    """Not one that was retracted, which has tokens and goes on as SGLang decides."""
    gate = SimpleNamespace(gated=True, kept=kept, ungated_because="")
    reason = SimpleNamespace(message="a sentence")
    req = SimpleNamespace(gate=gate, to_finish=reason, extra_key="key")

    def finish(message):
        req.to_finish, req.prompt = None, message

    req.set_finish_with_abort = finish
    given = prefill_admission.refuse_failed(lambda _adder, _req: "original", None, req)
    if kept:
        assert given == "original" and gate.gated and req.extra_key == "key"
        return
    assert given is AddReqResult.OTHER
    assert (req.prompt, req.to_finish, req.extra_key) == ("a sentence", reason, "not-key")
    assert not gate.gated and gate.ungated_because == "margingate failed on it"
