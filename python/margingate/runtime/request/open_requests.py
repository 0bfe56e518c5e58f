"""The open gated requests of a scheduler: one owner of all that is known and counted of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isnan
from time import monotonic as now
from typing import Any

from margingate.config import GateConfig
from margingate.core.histogram import MarginHistogram
from margingate.core.ledger import Ledger, Outcome, Row
from margingate.core.policy import CANONICAL, INJECTED, Decision
from margingate.core.queue import Due, MicroBatchQueue
from margingate.runtime.request.observer import Observer, Observers
from margingate.runtime.request.record import Counts, GateRequest, Hold, is_gated


class OpenRequests:
    """Gated requests from their first row until their last output is on its way.

    Others ask, and say what became of a request; the lists are changed here alone. A request is
    SGLang's, with its record as `req.gate`; it is known by `req.gate.key`. SGLang's own attributes
    of it are neither read nor written here, but for its tokens' number. On the scheduler's thread.
    """

    def __init__(self, config: GateConfig) -> None:
        assert config.rows is not None
        self.ledger = Ledger(config.guarantee, config.repair)
        self.queue = MicroBatchQueue(config.rows, config.max_delay or 0)
        self.observers = Observers()
        self.totals = Counts()  # of requests that ended, and of passes
        self.histogram = MarginHistogram()
        self.reasons: dict[str, int] = {}  # rows by why they are flagged or not
        self.dues: dict[str, int] = {}  # passes by why they were due
        self.step = 0  # batches processed
        self.canonical_steps = 0  # decode steps that needed no verification
        self.largest_batch = 0  # requests in one decode step
        self._open: dict[str, Any] = {}
        self._held: dict[str, Any] = {}  # those whose end is withheld
        self._rejoining: list[Any] = []  # flipped after they had left the batch
        self._retracted: set[str] = set()  # keep tokens that are not given back yet
        self._prefilled_again: list[Any] = []  # retracted, their prompt just computed anew
        self._ended: list[Any] = []  # their end is to be sent

    # -- asked

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._open.values())

    def __contains__(self, key: object) -> bool:
        return key in self._open

    def __getitem__(self, key: str) -> Any:
        """The open request; KeyError if there is none."""
        return self._open[key]

    def of_row(self, row: Row) -> Any:
        """The row's request, None if it is gone."""
        return self._open.get(row.rid)

    @property
    def held(self) -> Sequence[Any]:
        """Those whose end is withheld."""
        return tuple(self._held.values())

    @property
    def rejoining(self) -> Sequence[Any]:
        """Those that are in no batch and are to decode on."""
        return tuple(self._rejoining)

    @property
    def prefilled_again(self) -> Sequence[Any]:
        """Those whose output is to be given back and replayed."""
        return tuple(self._prefilled_again)

    def outside(self) -> bool:
        """Whether a request is held or rejoins: it owns slots, and no batch of SGLang has it."""
        return bool(self._held or self._rejoining)

    def failed(self) -> list[Any]:
        """Held and rejoining ones that an exception of ours ended: no finish check will see it."""
        return [req for req in (*self._held.values(), *self._rejoining) if req.gate.failed]

    def is_held(self, req: Any) -> bool:
        """Whether the end of the request is withheld."""
        return is_gated(req) and req.gate.key in self._held

    def opened(self, reqs: Sequence[Any]) -> list[Any]:
        """Those of `reqs` that have a row, or ended before they had one."""
        return [req for req in reqs if req.gate.key in self._open or req.finished()]

    def is_settled(self, req: Any) -> bool:
        """Whether all that was emitted may be sent."""
        key = req.gate.key
        return self.ledger.settled_length(key) == self.ledger.emitted(key)

    def columns_are_canonical(self, req: Any) -> bool:
        """Whether each row so far is canonical, and so the columns that the next one reads."""
        key = req.gate.key
        return self.ledger.canonical(key) == self.ledger.emitted(key)

    def canonical_columns(self, req: Any) -> int:
        """Columns from the prompt's first on that are canonical; of a request not open, none.

        The row of token j writes the column of token j-1.
        """
        if req.gate.key not in self._open:
            return 0
        rows = self.ledger.canonical(req.gate.key)
        return len(req.origin_input_ids) + rows - 1 if rows else 0

    def is_current(self, row: Row) -> bool:
        """Whether the row was neither rolled back nor retracted. Its request must be open."""
        return self.ledger.epoch(row.rid) == row.epoch

    def due(self, *, idle: bool) -> Due | None:
        """Why a verify pass is due, if one is."""
        return self.queue.due(self.ledger, self.step, idle)

    def waiting(self) -> list[Any]:
        """The requests with rows that a pass may take now."""
        return [self._open[key] for key in self.queue.waiting(self.ledger)]

    def any_retracted(self) -> bool:
        """Whether a request keeps tokens of before a retraction, to be given back and replayed."""
        return bool(self._retracted)

    def any_pending(self) -> bool:
        """Whether a row of any request is still to be verified."""
        return any(self.ledger.pending(key) for key in self._open)

    def to_release(self) -> Sequence[Any]:
        """Held requests with nothing left to verify."""
        return [req for key, req in self._held.items() if not self.ledger.pending(key)]

    def summed(self) -> Counts:
        """What ended requests have come to, and the open ones so far; each number only rises."""
        counts = replace(self.totals)
        for req in self:
            counts.add(req.gate.counts)
        counts.passes = self.totals.passes  # a pass is shared; the totals count each once
        return counts

    # -- rows

    def open(self, req: Any) -> None:
        """The request is about to get its first row."""
        self.ledger.open(req.gate.key)
        self._open[req.gate.key] = req

    def enter_canonical(
        self, rows: Sequence[tuple[int, Any]], margins: Sequence[float]
    ) -> list[tuple[int, Any]]:
        """The rows of a canonical step: `enter_row` for each whose columns are canonical too, and
        with which nothing else is the matter. Returns the others.

        Args:
            rows: index and request.
            margins: in logits, by index.
        """
        others, emit = [], self.ledger.emit_canonical
        for row in rows:
            gate, margin = row[1].gate, margins[row[0]]
            if isnan(margin) or gate.faults or not emit(gate.key):
                others.append(row)
                continue
            gate.margins.append(margin)
            gate.counts.steps += 1
        if entered := len(rows) - len(others):
            self.reasons[CANONICAL.reason] = self.reasons.get(CANONICAL.reason, 0) + entered
        return others

    def enter_row(self, req: Any, margin: float, decision: Decision, *, canonical: bool) -> None:
        """A row was emitted. `margin` in logits; `canonical`: its arithmetic and its columns."""
        gate: GateRequest = req.gate
        settled = canonical and decision is not INJECTED
        self.reasons[decision.reason] = self.reasons.get(decision.reason, 0) + 1
        self.ledger.emit(gate.key, flagged=decision.flagged, canonical=settled)
        gate.note_row(margin, flagged=decision.flagged, canonical=canonical)
        gate.counts.steps += 1
        if decision.flagged:
            gate.counts.flagged += 1
            self.queue.note(gate.key, self.step)
            self.observers.flagged(req, len(gate.margins), margin, decision.reason)
        if gate.waits_since is None and not self.is_settled(req):
            gate.waits_since = now()

    def count_observed(self, req: Any, *, flagged: bool) -> None:
        """An ungated row was emitted; `flagged`: the threshold would have flagged it."""
        self.reasons["observed"] = self.reasons.get("observed", 0) + 1
        for counts in (self.totals, req.gate.counts):
            counts.steps += 1
            counts.flagged += flagged

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        """A forward of `batch` was committed; `gated` of its requests are gated."""
        self.step += 1
        if batch.forward_mode.is_decode():
            self.largest_batch = max(self.largest_batch, len(batch.reqs))
            self.canonical_steps += canonical
        self.observers.stepped(batch, gated, canonical)

    def want_tail(self, req: Any) -> None:
        """Every row that is not canonical is to be verified."""
        self.ledger.request_tail(req.gate.key)
        self.queue.note(req.gate.key, self.step)

    def next_batch(self, room: int | None = None) -> tuple[Row, ...]:
        """Take the rows of the next pass, at most `room`; they are in flight afterwards."""
        return self.queue.next_batch(self.ledger, room)

    def put_back(self, key: str) -> None:
        """No verdict came on rows of the open request that are in flight: they are wanted again."""
        self.ledger.put_back(key)
        self.queue.settle(self.ledger, key, self.step)

    def pass_began(self, reqs: Sequence[Any], due: str) -> None:
        """The verdicts of a pass with rows of `reqs` are about to be entered."""
        self.totals.passes += 1
        self.dues[due] = self.dues.get(due, 0) + 1
        for req in reqs:
            req.gate.counts.passes += 1

    def judged(self, req: Any, row: Row, outcome: Outcome, token: int, verified: int) -> None:
        """The verdict on a row. `token` is the one emitted, -1 if rolled back since."""
        counts: Counts = req.gate.counts
        self.observers.judged(req, row.index, outcome, token, verified)
        counts.verified += 1
        if outcome is Outcome.STALE:
            return
        counts.repaired += row.index > 1
        counts.replayed += not req.gate.was_flagged(row.index)
        counts.missed += outcome is Outcome.MISSED

    def pass_entered(self, reqs: Sequence[Any]) -> None:
        """The verdicts of a pass with rows of `reqs` are in."""
        for req in reqs:
            self.queue.settle(self.ledger, req.gate.key, self.step)
            self._note_settled(req)

    def flipped(self, req: Any, row: int, emitted: int) -> None:
        """The token of `row` (from 1) of `emitted` rows is not the verifier's."""
        gate: GateRequest = req.gate
        self.histogram.add_flip(gate.margins[row - 1])
        gate.forget_rows(row)
        gate.counts.flips += 1
        gate.counts.rolled_back += emitted - row + 1

    def _note_settled(self, req: Any) -> None:
        """A wait ends when all that was emitted is settled; whatever waits on starts anew."""
        gate: GateRequest = req.gate
        if gate.waits_since is None or not self.is_settled(req):
            return
        waited, gate.waits_since = now() - gate.waits_since, None
        gate.counts.settle_s += waited
        self.observers.settled(req, waited)

    # -- ends

    def withhold(self, req: Any, hold: Hold) -> None:
        """The request stopped while rows are pending: its end waits for them."""
        req.gate.hold = hold
        self._held[req.gate.key] = req
        self.queue.note(req.gate.key, self.step)
        self.queue.drain(req.gate.key)

    def unhold(self, req: Any) -> Hold | None:
        """The request decodes on, or ends: what was withheld of it, if anything was."""
        hold: Hold | None = req.gate.hold
        if hold is None or self._held.pop(req.gate.key, None) is None:
            return None
        req.gate.counts.drain_s += now() - hold.since
        req.gate.hold = None
        return hold

    def verify_no_more(self, req: Any) -> None:
        """The request is aborted: it is not held, does not rejoin, and no pass takes its rows."""
        self._held.pop(req.gate.key, None)
        req.gate.hold = None
        self._rejoining = [other for other in self._rejoining if other is not req]
        self.queue.forget(req.gate.key)

    def mark_ended(self, req: Any) -> None:
        """The request's end is to be sent."""
        self._ended.append(req)

    def take_ended(self) -> list[Any]:
        """Those marked since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def close(self, req: Any) -> None:
        """The request's last output is on its way (or it vanished). Nothing if it is not open."""
        gate: GateRequest = req.gate
        if self._open.pop(gate.key, None) is None:
            return
        self._held.pop(gate.key, None)
        self._retracted.discard(gate.key)
        self.ledger.close(gate.key)
        self.queue.forget(gate.key)
        self.totals.add(replace(gate.counts, passes=0))  # passes are shared: the total has its own
        self.observers.ended(req)

    def close_all(self) -> None:
        """SGLang is idle, so nothing is open: drop what an abort in its queues left behind."""
        for req in list(self):
            self.close(req)

    # -- back to decoding

    def mark_rejoining(self, req: Any) -> None:
        """The request is in no batch, and is to decode on."""
        self._rejoining.append(req)

    def take_rejoining(self) -> list[Any]:
        """Those marked since the last call; they are about to be in a batch."""
        rejoining, self._rejoining = self._rejoining, []
        return rejoining

    def retract(self, req: Any) -> int:
        """The request lost its columns. Returns how many tokens it keeps: the settled ones."""
        self._prefilled_again = [other for other in self._prefilled_again if other is not req]
        self.queue.forget(req.gate.key)
        if kept := self.ledger.retract(req.gate.key):
            self._retracted.add(req.gate.key)
        return kept

    def mark_prefilled_again(self, req: Any) -> None:
        """The prompt of a retracted request was computed anew."""
        self._prefilled_again.append(req)

    def take_prefilled_again(self) -> list[Any]:
        """Those marked since the last call."""
        again, self._prefilled_again = self._prefilled_again, []
        return again

    def replay(self, req: Any) -> None:
        """The output of a retracted request was given back: its rows are to be computed anew."""
        self._retracted.discard(req.gate.key)
        self.ledger.replay(req.gate.key)
        self.queue.note(req.gate.key, self.step)

    def observe(self, *observers: Observer) -> None:
        """Tell them of all that happens from now on."""
        self.observers.add(*observers)
