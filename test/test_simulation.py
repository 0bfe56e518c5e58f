"""Simulated verdicts: which rows, of whom, and where they are refused."""

from __future__ import annotations

import logging
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.config import GateConfig, GateError, make_config
from margingate.core.ledger import Row
from margingate.core.policy import Decision, Evidence, GatePolicy, Reason
from margingate.core.simulation import Simulation
from margingate.runtime.observe.tally import Tally
from margingate.runtime.request.record import GateRequest
from margingate.runtime.start.refusals import refuse_simulation
from margingate.runtime.verify.simulation import Simulator
from margingate.runtime.verify.verifier import RowResult

STOCK = {"fast_path": "stock"}
VOCABULARY = 100


def shares(simulation: Simulation, rows: int = 20_000) -> tuple[float, float]:
    flags = sum(bool(simulation.flags("a", row)) for row in range(rows))
    flips = sum(simulation.flips("a", row) for row in range(rows))
    return flags / rows, flips / rows


def test_the_shares_are_those_asked_for():
    assert shares(Simulation(0.1856, 0.05)) == pytest.approx((0.1856, 0.05), abs=0.01)
    assert shares(Simulation(0.0, 0.0)) == (0, 0)
    assert shares(Simulation(1.0, 1.0)) == (1, 1)


def test_a_row_has_one_fate_and_prompts_differ():
    one, other = Simulation(0.5, 0.5), Simulation(0.5, 0.5)
    flags = [one.flags("a", row) for row in range(200)]
    assert flags == [other.flags("a", row) for row in range(200)]
    assert flags != [one.flags("b", row) for row in range(200)]
    assert flags != [one.flips("a", row) for row in range(200)], "drawn apart"
    assert Simulation(None, 0.5).flags("a", 1) is None


@pytest.mark.parametrize("margin", [0.0, 9.0, float("nan")])
def test_a_simulated_flag_stands_for_the_margin_only(margin):
    policy = GatePolicy("margin", 0.5)
    for flagged in (False, True):
        found = policy.decide(Evidence(margin, simulated=flagged))
        assert found == Decision(flagged, Reason.SIMULATED)
    canonical = Evidence(margin, canonical=True, simulated=True)
    assert policy.decide(canonical).reason is Reason.CANONICAL
    always = GatePolicy("always", 0.5).decide(Evidence(margin, simulated=False))
    assert always.reason is Reason.ALWAYS


def request(prompt: list[int], flags: list[bool]) -> Any:
    gate = GateRequest("1:a", True, prompt=str(prompt))
    for flagged in flags:
        gate.note_row(1.0, flagged=flagged, canonical=False)
    return SimpleNamespace(origin_input_ids=array("q", prompt), gate=gate, vocab_size=VOCABULARY)


def test_only_flagged_rows_flip_and_always_to_the_same_token():
    simulator = Simulator(make_config({**STOCK, "simulate_flip_rate": "1"}, {}))
    req = request([3, 4], [False, True])
    tokens = [RowResult(VOCABULARY - 1, 0.0, None), RowResult(5, 0.0, None)]
    unflagged, flagged, dropped = (Row("1:a", index, 0) for index in (1, 2, 3))
    assert simulator.verdict(req, unflagged, tokens[0]) is tokens[0]
    assert simulator.verdict(req, dropped, tokens[0]) is tokens[0], "rolled back meanwhile"
    assert [simulator.verdict(req, flagged, each).token for each in tokens] == [0, 6]
    assert simulator.flag(req, 1) is None


def test_prompts_stand_for_requests():
    simulator = Simulator(make_config({**STOCK, "simulate_trigger_rate": "0.5"}, {}))
    found = [
        [simulator.flag(request(prompt, []), row) for row in range(1, 65)]
        for prompt in ([1, 2], [1, 2], [2, 1])
    ]
    assert found[0] == found[1] != found[2]
    assert simulator.verdict(request([1], [True]), Row("a", 1, 0), token := RowResult(1, 0.0, None))
    assert token.token == 1


def test_a_simulation_is_announced(caplog):
    with caplog.at_level(logging.WARNING):
        Simulator(GateConfig())
        assert not caplog.records
        Simulator(GateConfig(simulate_flip_rate=0.5))
    assert "VERDICTS ARE SIMULATED (trigger rate None, flip rate 0.5)" in caplog.text


# The options


@pytest.mark.parametrize("name", ["simulate_trigger_rate", "simulate_flip_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), True, [1]])
def test_a_rate_is_a_share(name, value):
    option = "--gate-" + name.replace("_", "-")
    with pytest.raises(GateError, match=f"{option} is .*: give a number from 0 to 1"):
        GateConfig(**{**STOCK, name: value})


@pytest.mark.parametrize("other", [{"policy": "always"}, {"fast_path": "invariant"}])
def test_flags_are_simulated_where_margins_would_decide(other):
    assert GateConfig(**STOCK, simulate_trigger_rate=0.0).simulates
    with pytest.raises(GateError, match="use --gate-policy margin and --gate-fast-path stock"):
        GateConfig(**{**STOCK, "simulate_trigger_rate": 0.1, **other})


@pytest.mark.parametrize("other", [{"policy": "observe"}, {"audit_rate": 0.5}])
def test_flips_are_not_simulated_where_they_are_lost_or_found_wrong(other):
    with pytest.raises(GateError, match="makes verdicts up: drop it"):
        GateConfig(simulate_flip_rate=0.1, **other)


def test_real_weights_are_refused():
    real, dummy = SimpleNamespace(load_format="auto"), SimpleNamespace(load_format="dummy")
    config = GateConfig(simulate_flip_rate=0.1)
    refuse_simulation(dummy, config)
    refuse_simulation(real, GateConfig())
    with pytest.raises(GateError, match="serve made-up weights with --load-format dummy"):
        refuse_simulation(real, config)


# The sums beside it


@pytest.mark.parametrize(("exact", "quiet"), [(False, 2), (True, 1)])
def test_quiet_steps_asked_for_no_verification(exact, quiet):
    tally = Tally(exact)
    decode, prefill = (
        SimpleNamespace(forward_mode=SimpleNamespace(is_decode=lambda is_decode=d: is_decode))
        for d in (True, False)
    )
    tally.stepped(prefill, 1, True)
    tally.stepped(decode, 0, True)
    tally.flagged(None, 3, 0.1, "below")
    tally.stepped(decode, 2, False)
    tally.stepped(decode, 2, False)
    tally.stepped(decode, 2, True)
    assert (tally.decode_steps, tally.quiet_steps) == (3, quiet)
