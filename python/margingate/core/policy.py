"""Which emitted rows must be verified: evidence in, a decision with its reason out."""

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

POLICIES = ("margin", "always", "observe")


class Reason(enum.StrEnum):
    """Why a row is flagged or left alone; metrics and tests count these."""

    ABOVE = enum.auto()  # margin at or above the threshold
    BELOW = enum.auto()  # margin below the threshold
    ROUTER = enum.auto()  # margin at or above it, and the routers' margin below its own
    ALWAYS = enum.auto()  # policy "always": every row that is not canonical
    NOT_FINITE = enum.auto()  # NaN or -inf: a margin says nothing, so verify
    OBSERVED = enum.auto()  # policy "observe": counted, never verified
    CANONICAL = enum.auto()  # computed canonically already
    SIMULATED = enum.auto()  # flagged or left alone by a benchmark's hash, not by its margin
    INJECTED = enum.auto()  # flagged by a test or a fault drill, not by the policy


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen with one emitted row."""

    flagged: bool  # the row must be verified
    reason: Reason


# One object per outcome: a decision per token and row must not allocate.
ABOVE = Decision(False, Reason.ABOVE)
BELOW = Decision(True, Reason.BELOW)
ROUTER = Decision(True, Reason.ROUTER)
ALWAYS = Decision(True, Reason.ALWAYS)
NOT_FINITE = Decision(True, Reason.NOT_FINITE)
OBSERVED = Decision(False, Reason.OBSERVED)
CANONICAL = Decision(False, Reason.CANONICAL)
INJECTED = Decision(True, Reason.INJECTED)
SIMULATED = (Decision(False, Reason.SIMULATED), Decision(True, Reason.SIMULATED))


class Evidence(NamedTuple):
    """All that a policy may see of an emitted row."""

    margin: float  # logits: from the token to the runner-up
    # From chosen experts to others, the least of all layers, in the units of the routers' scores;
    # +inf: the model has no router. NaN: nobody looked.
    router_margin: float = math.inf
    canonical: bool = False  # the row and every row before it
    simulated: bool | None = None  # stands for what the margins say, in benchmarks


class GatePolicy:
    """Maps what is known of a row to one of the constant decisions above."""

    __slots__ = ("_always", "_observe", "_router", "policy", "threshold")

    def __init__(
        self, policy: str, threshold: float, router_threshold: float | None = None
    ) -> None:
        """ValueError on anything that is not as below.

        Args:
            policy: one of POLICIES.
            threshold: logits, 0 or more.
            router_threshold: above 0, in the units of the routers' scores; None: their margin
                flags a row only where it is no number.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        if math.isnan(threshold) or threshold < 0:
            raise ValueError(f"threshold must be a number of logits >= 0, not {threshold!r}")
        if router_threshold is not None and not router_threshold > 0:
            raise ValueError(f"router_threshold must be a number > 0, not {router_threshold!r}")
        self.policy = policy
        self.threshold = threshold
        self._router = -math.inf if router_threshold is None else router_threshold
        self._always = policy == "always"
        self._observe = policy == "observe"

    def decide(self, evidence: Evidence) -> Decision:
        """Decide on one row: "observe" comes first, then `canonical`, then "always", then what is
        simulated, then the margins.
        """
        if self._observe:
            return OBSERVED
        if evidence.canonical:
            return CANONICAL
        if self._always:
            return ALWAYS
        if evidence.simulated is not None:
            return SIMULATED[evidence.simulated]
        return self.judge(evidence.margin, evidence.router_margin)

    def judge(self, margin: float, router_margin: float) -> Decision:
        """What the margins alone say, whatever the policy.

        A margin equal to its threshold is ABOVE, and so is +inf (one token possible); NaN and -inf
        are flagged.
        """
        # All comparisons are false for NaN, which so ends in a last line.
        if margin >= self.threshold:
            if router_margin >= self._router:
                return ABOVE
            return ROUTER if router_margin > -math.inf else NOT_FINITE
        return BELOW if margin > -math.inf else NOT_FINITE
