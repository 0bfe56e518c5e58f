"""Data-parallel replicas: one plan, each gate confirmed, one fingerprint, counters summed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from margingate import api
from margingate.config import GateConfig, GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.client import replica_counters
from margingate.runtime.compat.arguments import server_args
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.probe.measuring.classes import Finding
from margingate.runtime.probe.planning import shared_plans
from margingate.runtime.request.record import Counts
from margingate.runtime.start import refusals, replicas_alike

ARGS = {"tp_size": 1, "nnodes": 1}
HERE = threading.local()  # a thread plays a replica


def arguments(count: int = 2, **more: Any) -> Any:
    return SimpleNamespace(**{**ARGS, "dp_size": count, **more})


@pytest.fixture
def as_replicas(monkeypatch) -> Callable[..., list[Any]]:
    """Calls a function in each replica at once, with its number; results by replica."""
    monkeypatch.setattr(ranks, "dp_rank", lambda: HERE.replica)
    monkeypatch.setattr(ranks, "tp_rank", lambda: 0)

    def run(count: int, function: Callable[[int], Any]) -> list[Any]:
        def play(replica: int) -> Any:
            HERE.replica = replica
            return function(replica)

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(play, range(count)))

    return run


# Meeting


def test_the_first_alone_makes_and_all_have_it(as_replicas):
    args, made = arguments(3), []
    with replicas.rendezvous(args):

        def find(replica: int) -> Any:
            return replicas.first(args, "plan", lambda: made.append(replica) or {"by": replica})

        assert as_replicas(3, find) == [{"by": 0}] * 3
        assert made == [0]
        of_all = as_replicas(3, lambda replica: replicas.of_all(args, "rows", 8 >> replica))
        assert of_all == [[8, 4, 2]] * 3


def test_one_replica_meets_nobody():
    args = arguments(1)
    with replicas.rendezvous(args):
        assert not hasattr(args, server_args.RENDEZVOUS)
    assert replicas.first(args, "plan", lambda: object) is object
    assert replicas.of_all(args, "rows", 8) == [8]
    replicas.announce(args, {})


def test_what_never_comes_is_a_sentence(as_replicas, monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr(replicas, "WAIT", timedelta(seconds=0.1))
    args = arguments(2)
    with replicas.rendezvous(args), pytest.raises(GateError, match="in vain for rows of replica 0"):
        as_replicas(2, lambda replica: replica and replicas.of_all(args, "rows", 8))


def test_without_the_launchers_file_nothing_is_shared(as_replicas):
    with pytest.raises(GateError, match="--dp-size is 2, but the launcher gave replicas no place"):
        as_replicas(2, lambda _: replicas.of_all(arguments(2), "rows", 8))


# One plan


def finding(name: str = "a", counts: tuple[int, ...] = (1, 2)) -> Finding:
    return Finding(
        "linear", name, (2, 2), 1, dict.fromkeys(counts, 0), RowPlan([(counts[0], counts[-1])]), 0.1
    )


def test_all_replicas_have_the_plan_of_the_first(as_replicas):
    args, identity = arguments(2), {"threads": 2, "prefill": (1, 2)}
    found = [[finding()], [replace(finding(), plan=None, classes={1: 0, 2: 1})]]
    with replicas.rendezvous(args):
        shared = as_replicas(
            2, lambda n: shared_plans.of_first_replica(args, identity, lambda: found[n])
        )
    assert shared == [found[0], found[0]]


def test_a_replica_on_another_device_is_refused(as_replicas):
    args = arguments(2)

    def find(replica: int) -> Any:
        identity = {"device": f"device {replica}", "threads": 2}
        return shared_plans.of_first_replica(args, identity, lambda: [finding()])

    with (
        replicas.rendezvous(args),
        pytest.raises(GateError, match="in replica 1 device differ from those of replica 0: give"),
    ):
        as_replicas(2, find)


# Every gate is up, and all are alike

PARTS = {"weights": "ab", "machine": {"longest": 100, "threads": 2}, "plan": {"kept": {"x": 1}}}
STATE = {"gate": {"version": "1"}, "fingerprint_of": PARTS, "bits": "00"}


def announced(as_replicas, *states: dict[str, Any] | None) -> tuple[Any, Callable[[], Any]]:
    args = arguments(len(states))

    def say(replica: int) -> None:
        state = states[replica]
        if state is not None:
            replicas.announce(args, state)

    def confirm() -> Any:
        with replicas.rendezvous(args):
            as_replicas(len(states), say)
            return replicas_alike.confirm(args)

    return args, confirm


def test_replicas_that_are_alike_start(as_replicas):
    _, confirm = announced(as_replicas, STATE, STATE, STATE)
    assert confirm() == {"version": "1"}


def test_a_replica_without_its_gate_ends_the_start(as_replicas):
    _, confirm = announced(as_replicas, STATE, None)
    with pytest.raises(GateError, match=r"^scheduler 0 of replica 1 came up without the gate"):
        confirm()


def test_a_tensor_parallel_rank_of_a_replica_without_its_gate_ends_the_start():
    found = {(0, 0): STATE, (0, 1): STATE, (1, 0): STATE, (1, 1): None}
    with pytest.raises(GateError, match=r"^scheduler 1 of replica 1 came up without the gate"):
        replicas_alike.refuse_absent(found)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"fingerprint_of": {**PARTS, "weights": "cd"}}, "by weights, so"),
        (
            {"fingerprint_of": {**PARTS, "machine": {"longest": 90, "threads": 2}}},
            "by machine.longest, so",
        ),
        ({"fingerprint_of": {**PARTS, "plan": {"kept": {"x": 2}}}}, "by plan.kept, so"),
        ({"fingerprint_of": {"weights": "ab"}}, "by machine, plan, so"),
        ({"bits": "01"}, "gives the same rows other bits than replica 0"),
    ],
)
def test_replicas_that_would_answer_apart_do_not_start(as_replicas, state, said):
    _, confirm = announced(as_replicas, STATE, STATE, {**STATE, **state})
    with pytest.raises(GateError) as caught:
        confirm()
    assert str(caught.value).startswith("replica 2 ") and said in str(caught.value)


def test_the_launcher_asks_replicas_where_there_are_several(as_replicas, monkeypatch):
    from margingate.runtime.start import install

    args, _ = announced(as_replicas, STATE, None)
    args._margingate = GateConfig()
    infos: list[dict[str, Any]] = [{"max_req_input_len": 1}]
    launched = (SimpleNamespace(server_args=args), 0, 0, SimpleNamespace(scheduler_infos=infos))
    with pytest.raises(GateError, match="scheduler 0 of replica 0"), replicas.rendezvous(args):
        install.confirm_schedulers(launched)
    monkeypatch.setattr(replicas_alike, "confirm", lambda _: {"version": "1"})
    install.confirm_schedulers(launched)
    assert infos[0]["margingate"] == {"version": "1"}


def test_what_replicas_cannot_share_is_refused():
    refusals.refuse_replicas(arguments(1, nnodes=2), GateConfig())
    refusals.refuse_replicas(arguments(2), GateConfig())
    with pytest.raises(GateError, match="--dp-size is 2, but --nnodes is 2, and"):
        refusals.refuse_replicas(arguments(2, nnodes=2), GateConfig())
    study = GateConfig(policy="observe", study=True)
    with pytest.raises(GateError, match=r"--gate-study .* but --dp-size is 2: use --dp-size 1"):
        refusals.refuse_replicas(arguments(2), study)


@pytest.mark.parametrize("count", [1, 2])
def test_a_scheduler_of_several_takes_its_controller_along(monkeypatch, count):
    import os
    import signal

    sent = []
    monkeypatch.setattr(os, "kill", lambda *what: sent.append(what))
    replicas.end_all(count)
    assert sent == ([] if count == 1 else [(os.getppid(), signal.SIGQUIT)])


# Counters


def gate_state(replica: int, **more: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(replica_counters.NUMBERS, replica + 1)
    by_name = {name: {"a": replica + 1} for name in replica_counters.BY_NAME}
    said = {"replica": replica, "largest_batch": 4 - replica, "fingerprint": "f", "integrity": "ok"}
    return {"margingate": {**numbers, **by_name, **said, **more}}


def test_states_are_in_order_with_sums_of_their_counters():
    states = [gate_state(1, steps=10, flagged=5, reasons={"b": 0}), gate_state(0, steps=10)]
    listed = replica_counters.with_totals(states)
    assert [state["margingate"]["replica"] for state in listed] == [0, 1]
    together = listed[0]["margingate"]["all_replicas"]
    assert listed[1]["margingate"]["all_replicas"] == together
    assert (together["count"], together["steps"], together["open"]) == (2, 20, 3)
    assert together["trigger_rate"] == pytest.approx(6 / 20)
    assert together["reasons"] == {"a": 1, "b": 0}
    assert together["passes_by_reason"] == {"a": 3}
    assert (together["largest_batch"], together["integrity"]) == (4, "ok")
    assert together["fingerprint"] == "f" and "fingerprint_because" not in together
    listed_names = {entry.name for entry in (*api.REPLICAS, *api.COUNTS)}
    assert together.keys() | {"fingerprint_because"} == listed_names
    assert set(Counts.__slots__) <= together.keys()


def test_a_state_that_is_alone_is_left_as_it_is():
    state = gate_state(0)

    async def original(manager: Any) -> list[dict[str, Any]]:
        return [state]

    found = asyncio.run(replica_counters.internal_states(original, None))
    assert found == [gate_state(0)]


def test_what_one_replica_lacks_all_lack():
    stale = gate_state(1, fingerprint=None, fingerprint_because="the weights were updated")
    broken = gate_state(0, integrity="a slot is lost")
    together = replica_counters.totals([each["margingate"] for each in (broken, stale)])
    assert together["integrity"] == "replica 0: a slot is lost"
    assert together["fingerprint"] is None
    assert together["fingerprint_because"] == "replica 1: the weights were updated"
    apart = [gate_state(0)["margingate"], gate_state(1, fingerprint="g")["margingate"]]
    found = replica_counters.shared_fingerprint(apart)
    assert found["fingerprint"] is None
    assert found["fingerprint_because"] == "replicas have different ones: f, g"
