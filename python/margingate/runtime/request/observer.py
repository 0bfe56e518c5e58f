"""What metrics and events are told of the gate's work."""

from __future__ import annotations

from typing import Any

from margingate.core.ledger import Outcome
from margingate.runtime.request import guard


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


_METHODS = tuple(name for name in vars(Observer) if not name.startswith("_"))


class Observers(Observer):
    """Tells several observers, in the order in which they were added; what one raises is noted."""

    def __init__(self) -> None:
        # By method: those that do something there. Most do in few, and some methods run each step.
        self._told: dict[str, tuple[Observer, ...]] = dict.fromkeys(_METHODS, ())

    def add(self, *observers: Observer) -> None:
        """Tell these too."""
        for method, told in self._told.items():
            idle = getattr(Observer, method)
            more = (each for each in observers if getattr(type(each), method, None) is not idle)
            self._told[method] = (*told, *more)

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        guard.tell(self._told["stepped"], "stepped", batch, gated, canonical)

    def flagged(self, req: Any, row: int, margin: float, reason: str) -> None:
        guard.tell(self._told["flagged"], "flagged", req, row, margin, reason)

    def passed(self, rows: int, requests: int, seconds: float, due: str) -> None:
        guard.tell(self._told["passed"], "passed", rows, requests, seconds, due)

    def judged(self, req: Any, row: int, outcome: Outcome, token: int, verified: int) -> None:
        guard.tell(self._told["judged"], "judged", req, row, outcome, token, verified)

    def settled(self, req: Any, seconds: float) -> None:
        guard.tell(self._told["settled"], "settled", req, seconds)

    def ended(self, req: Any) -> None:
        guard.tell(self._told["ended"], "ended", req)

    def audited(self, rid: str) -> None:
        guard.tell(self._told["audited"], "audited", rid)

    def turned(self) -> None:
        guard.tell(self._told["turned"], "turned")
