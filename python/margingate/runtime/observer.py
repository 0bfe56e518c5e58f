"""What metrics and events are told of the gate's work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from margingate.core.ledger import Outcome
from margingate.runtime.record import Counts

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController


class Observer:
    """Told of the gate's work, on the scheduler's thread, while requests wait.

    Every method does nothing here; one that does something returns at once, raises nothing and
    changes nothing of what it is given. `req` is SGLang's request, with `req.gate`.
    """

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        """A forward of `batch`, prefill or decode, was committed; `gated` of its requests are."""

    def flagged(self, req: Any, row: int, margin: float, reason: str) -> None:
        """Row `row` (from 1) is to be verified; `margin` in logits."""

    def passed(self, rows: int, requests: int, seconds: float, due: str) -> None:
        """A verify pass over `rows` rows of so many requests was run, judged and settled."""

    def judged(self, req: Any, row: int, outcome: Outcome, token: int, verified: int) -> None:
        """The verdict on a row: the token emitted (-1: rolled back meanwhile), the verifier's."""

    def settled(self, req: Any, seconds: float) -> None:
        """Everything emitted is settled again, `seconds` after the first token that was not."""

    def ended(self, req: Any) -> None:
        """The request's last output is on its way; `req.gate.counts` are final."""

    def audited(self, rid: str) -> None:
        """A replay of this finished request ended, or was interrupted; the audits count which."""

    def turned(self) -> None:
        """The scheduler's loop comes round: all of a step is told, or there was none."""


def summed(controller: GateController) -> Counts:
    """What ended requests have come to, and the open ones so far; each number only ever rises."""
    counts = replace(controller.totals)
    for req in controller.requests.values():
        counts.add(req.gate.counts)
    counts.passes = controller.totals.passes  # a pass is shared; the totals count each once
    return counts
