"""Policy: every margin, under every policy, and its reason."""

import math

import pytest

from margingate.core.policy import POLICIES, Decision, GatePolicy, Reason


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
    assert GatePolicy("margin", 0.5).decide(margin) == expected


@pytest.mark.parametrize("margin", [0.0, 9.0, math.nan])
def test_the_other_policies_do_not_look_at_the_margin(margin: float) -> None:
    assert GatePolicy("always", 0.5).decide(margin) == Decision(True, Reason.ALWAYS)
    assert GatePolicy("observe", 0.5).decide(margin) == Decision(False, Reason.OBSERVED)


@pytest.mark.parametrize("margin", [0.0, math.nan])
def test_a_canonical_row_is_flagged_by_no_policy(margin: float) -> None:
    for policy in ("margin", "always"):
        decision = GatePolicy(policy, 0.5).decide(margin, canonical=True)
        assert decision == Decision(False, Reason.CANONICAL)
    decision = GatePolicy("observe", 0.5).decide(margin, canonical=True)
    assert decision == Decision(False, Reason.OBSERVED)


def test_thresholds_at_the_ends() -> None:
    assert GatePolicy("margin", 0.0).decide(0.0).reason is Reason.ABOVE
    assert GatePolicy("margin", math.inf).decide(1e30).reason is Reason.BELOW


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
    assert gate.decide(0.1) is gate.decide(0.2)
    assert gate.decide(0.9) is GatePolicy("margin", 0.1).decide(0.9)
