"""The gate's work as events on a ZeroMQ socket: one message per scheduler step."""

from __future__ import annotations

from dataclasses import asdict
from time import monotonic as now
from typing import Any

from margingate.core.ledger import Outcome
from margingate.events import End, Flag, Pass, Settled, Step, Totals, Verdict
from margingate.runtime.compat.process import ranks
from margingate.runtime.observe.event_socket import Publisher, endpoint_of
from margingate.runtime.request.observer import Observer
from margingate.runtime.request.open_requests import OpenRequests

TOTALS_S = 1.0  # between two records of the sums


def observers(endpoint: str | None, requests: OpenRequests) -> tuple[Observer, ...]:
    """One for the option, on rank 0 of tensor parallelism; GateError where it cannot bind."""
    if endpoint is None or ranks.tp_rank() != 0:
        return ()
    return (GateEvents(requests, Publisher(endpoint_of(endpoint, ranks.dp_rank()))),)


class GateEvents(Observer):
    """Tells a publisher of the gate's work; while nobody listens, next to nothing is done."""

    def __init__(self, requests: OpenRequests, publisher: Publisher) -> None:
        self._requests = requests
        self._out = publisher
        self._decodes = 0
        self._totals_due = 0.0  # on the clock of `now`

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        decode = batch.forward_mode.is_decode()
        self._decodes += decode
        mode, size, open_ = "decode" if decode else "prefill", len(batch.reqs), self._requests
        self._out.tell(
            lambda: Step(open_.step, mode, size, gated, canonical, len(open_), len(open_.held))
        )

    def flagged(self, req: Any, row: int, margin: float, reason: str) -> None:
        self._out.tell(lambda: Flag(req.rid, row, margin, str(reason)))

    def judged(self, req: Any, row: int, outcome: Outcome, token: int, verified: int) -> None:
        self._out.tell(lambda: _verdict(req, row, outcome, token, verified))

    def passed(self, rows: int, requests: int, seconds: float, due: str) -> None:
        self._out.tell(lambda: Pass(rows, requests, seconds, str(due)))

    def settled(self, req: Any, seconds: float) -> None:
        self._out.tell(lambda: Settled(req.rid, seconds))

    def ended(self, req: Any) -> None:
        self._out.tell(lambda: _end(req))

    def turned(self) -> None:
        if self._out.look() or (self._out.listening and now() >= self._totals_due):
            self._totals_due = now() + TOTALS_S
            self._out.tell(self._totals)
        self._out.send()

    def idle(self) -> None:
        self.turned()

    def _totals(self) -> Totals:
        requests = self._requests
        return Totals(
            requests.step,
            self._decodes,
            requests.canonical_steps,
            len(requests),
            len(requests.held),
            asdict(requests.summed()),
        )


def _verdict(req: Any, row: int, outcome: Outcome, token: int, verified: int) -> Verdict:
    gate, stale = req.gate, outcome is Outcome.STALE
    return Verdict(
        req.rid,
        row,
        str(outcome),
        None if stale else token,
        verified,
        None if stale else gate.margins[row - 1],
        row > 1 and not stale,
        len(gate.margins) - row + 1 if outcome is Outcome.FLIP else 0,
    )


def _end(req: Any) -> End:
    finish = req.finished_reason.to_json()["type"] if req.finished_reason is not None else None
    return End(req.rid, finish, len(req.output_ids), asdict(req.gate.counts))
