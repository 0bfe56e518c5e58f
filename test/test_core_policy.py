"""Policy: every margin, under every policy, and its reason."""

import math

import pytest

from margingate.core.policy import POLICIES, Decision, Evidence, GatePolicy, Reason


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, Decision(True, Reason.BELOW)),
        (0.4999, Decision(True, Reason.BELOW)),
        (0.5, Decision(False, Reason.ABOVE)),
        (7.0, Decision(False, Reason.ABOVE)),
        (math.inf, Decision(False, Reason.ABOVE)),
        (-1.0, Decision(True, Reason.BELOW)),
        (-math.inf, Decision(True, Reason.NOT_FINITE)),
        (math.nan, Decision(True, Reason.NOT_FINITE)),
    ],
)
def test_margin_policy(margin: float, expected: Decision) -> None:
    assert GatePolicy("margin", 0.5).decide(Evidence(margin)) == expected


@pytest.mark.parametrize("margin", [0.0, 9.0, math.nan])
def test_the_other_policies_do_not_look_at_the_margin(margin: float) -> None:
    assert GatePolicy("always", 0.5).decide(Evidence(margin)) == Decision(True, Reason.ALWAYS)
    assert GatePolicy("observe", 0.5).decide(Evidence(margin)) == Decision(False, Reason.OBSERVED)


@pytest.mark.parametrize("margin", [0.0, math.nan])
def test_a_canonical_row_is_flagged_by_no_policy(margin: float) -> None:
    for policy in ("margin", "always"):
        decision = GatePolicy(policy, 0.5).decide(Evidence(margin, canonical=True))
        assert decision == Decision(False, Reason.CANONICAL)
    decision = GatePolicy("observe", 0.5).decide(Evidence(margin, canonical=True))
    assert decision == Decision(False, Reason.OBSERVED)


def test_thresholds_at_the_ends() -> None:
    assert GatePolicy("margin", 0.0).decide(Evidence(0.0)).reason is Reason.ABOVE
    assert GatePolicy("margin", math.inf).decide(Evidence(1e30)).reason is Reason.BELOW


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threshold", [math.nan, -0.1, -math.inf])
def test_bad_thresholds_are_refused(policy: str, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        GatePolicy(policy, threshold)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        GatePolicy("sometimes", 0.5)


def test_decisions_are_constants() -> None:
    gate = GatePolicy("margin", 0.5)
    assert gate.decide(Evidence(0.1)) is gate.decide(Evidence(0.2))
    assert gate.decide(Evidence(0.9)) is GatePolicy("margin", 0.1).decide(Evidence(0.9))


@pytest.mark.parametrize(
    ("margin", "router", "expected"),
    [
        (0.5, 0.25, Decision(False, Reason.ABOVE)),
        (0.5, math.inf, Decision(False, Reason.ABOVE)),
        (0.5, 0.2499, Decision(True, Reason.ROUTER)),
        (math.inf, 0.0, Decision(True, Reason.ROUTER)),
        (0.4999, 0.0, Decision(True, Reason.BELOW)),
        (0.4999, 9.0, Decision(True, Reason.BELOW)),
        (0.4999, math.nan, Decision(True, Reason.BELOW)),
        (9.0, math.nan, Decision(True, Reason.NOT_FINITE)),
        (math.nan, 9.0, Decision(True, Reason.NOT_FINITE)),
        (math.nan, 0.0, Decision(True, Reason.NOT_FINITE)),
    ],
)
def test_either_margin_flags_a_row(margin: float, router: float, expected: Decision) -> None:
    assert GatePolicy("margin", 0.5, 0.25).decide(Evidence(margin, router)) == expected


def test_without_a_threshold_the_routers_margin_flags_only_what_nobody_looked_at() -> None:
    gate = GatePolicy("margin", 0.5)
    assert gate.decide(Evidence(0.5, 0.0)).reason is Reason.ABOVE
    assert gate.decide(Evidence(0.5, math.nan)) == Decision(True, Reason.NOT_FINITE)


@pytest.mark.parametrize("router", [0.0, math.nan])
def test_the_routers_margin_comes_last(router: float) -> None:
    decisions = {
        Reason.OBSERVED: GatePolicy("observe", 0.5, 0.25).decide(Evidence(9.0, router)),
        Reason.CANONICAL: GatePolicy("margin", 0.5, 0.25).decide(Evidence(9.0, router, True)),
        Reason.ALWAYS: GatePolicy("always", 0.5, 0.25).decide(Evidence(9.0, router)),
        Reason.SIMULATED: GatePolicy("margin", 0.5, 0.25).decide(
            Evidence(9.0, router, simulated=False)
        ),
    }
    assert all(found.reason is reason for reason, found in decisions.items())


def test_a_model_without_routers_has_none_near() -> None:
    assert Evidence(0.7) == (0.7, math.inf, False, None)
    assert GatePolicy("margin", 0.5, 1e30).decide(Evidence(0.7)).reason is Reason.ABOVE


@pytest.mark.parametrize("threshold", [math.nan, -0.1, 0.0, -math.inf])
def test_bad_router_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="router_threshold must be a number > 0"):
        GatePolicy("margin", 0.5, threshold)
