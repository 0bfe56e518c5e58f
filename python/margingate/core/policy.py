"""Which emitted rows must be verified: a margin in, a decision with its reason out."""

import enum
import math
from dataclasses import dataclass

POLICIES = ("margin", "always", "observe")


class Reason(enum.StrEnum):
    """Why a row is flagged or left alone; metrics and tests count these."""

    ABOVE = enum.auto()  # margin at or above the threshold
    BELOW = enum.auto()  # margin below the threshold
    ALWAYS = enum.auto()  # policy "always": every row that is not canonical
    NOT_FINITE = enum.auto()  # NaN or -inf: the margin says nothing, so verify
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
ALWAYS = Decision(True, Reason.ALWAYS)
NOT_FINITE = Decision(True, Reason.NOT_FINITE)
OBSERVED = Decision(False, Reason.OBSERVED)
CANONICAL = Decision(False, Reason.CANONICAL)
INJECTED = Decision(True, Reason.INJECTED)
SIMULATED = (Decision(False, Reason.SIMULATED), Decision(True, Reason.SIMULATED))


class GatePolicy:
    """Maps a row's margin (logits, float32) to one of the constant decisions above."""

    __slots__ = ("_always", "_observe", "policy", "threshold")

    def __init__(self, policy: str, threshold: float) -> None:
        """`policy` is one of POLICIES, `threshold` in logits; ValueError on anything else."""
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
        if math.isnan(threshold) or threshold < 0:
            raise ValueError(f"threshold must be a number of logits >= 0, not {threshold!r}")
        self.policy = policy
        self.threshold = threshold
        self._always = policy == "always"
        self._observe = policy == "observe"

    def decide(
        self, margin: float, *, canonical: bool = False, simulated: bool | None = None
    ) -> Decision:
        """Decide on one row. `canonical`: the row and every row before it are canonical.
        `simulated`: stands for what the margin says, in benchmarks.

        "observe" comes first, then `canonical`, then "always", then the margin: a margin equal
        to the threshold is ABOVE, and so is +inf (one token possible); NaN and -inf are flagged.
        """
        if self._observe:
            return OBSERVED
        if canonical:
            return CANONICAL
        if self._always:
            return ALWAYS
        if simulated is not None:
            return SIMULATED[simulated]
        if margin >= self.threshold:
            return ABOVE
        # Both comparisons are false for NaN, which so ends in the last line.
        return BELOW if margin > -math.inf else NOT_FINITE
