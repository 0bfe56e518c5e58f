"""When a verify pass runs, and which rows share it."""

import enum
import math
from collections.abc import Iterator

from margingate.core.ledger import Ledger, Row


class Due(enum.StrEnum):
    """Why a verify pass is due; the first that holds, in this order."""

    FULL = enum.auto()  # a whole micro-batch is wanted
    DELAY = enum.auto()  # the oldest request has waited long enough
    DRAINING = enum.auto()  # a stopped request waits for nothing else
    IDLE = enum.auto()  # there is nothing else to run


class MicroBatchQueue:
    """The requests with wanted rows and since when; which rows those are, only the ledger says.

    Holds no rows itself, so that a flip or a retraction needs no repair here. Requests that the
    ledger closed are skipped; `forget` frees their entry.
    """

    def __init__(self, rows: int, max_delay: int) -> None:
        """`rows` in a micro-batch (>= 1), `max_delay` in decode steps (>= 0); else ValueError."""
        if rows < 1:
            raise ValueError(f"a micro-batch needs at least one row, not {rows}")
        if max_delay < 0:
            raise ValueError(f"max_delay counts decode steps from 0, not {max_delay}")
        self.rows = rows
        self.max_delay = max_delay
        self._since: dict[str, int] = {}  # rid -> decode step of its oldest note
        self._draining: set[str] = set()

    def note(self, rid: str, step: int) -> None:
        """`rid` has wanted rows since decode step `step`. An older note stands."""
        self._since[rid] = min(step, self._since.get(rid, step))

    def drain(self, rid: str) -> None:
        """`rid` is stopped and waits only for its rows: it goes first, noted or not."""
        self._draining.add(rid)

    def forget(self, rid: str) -> None:
        """Drop `rid`, whether known or not."""
        self._since.pop(rid, None)
        self._draining.discard(rid)

    def waits(self) -> bool:
        """Whether any request has wanted rows, or had; after most steps none is known."""
        return bool(self._since or self._draining)

    def due(self, ledger: Ledger, step: int, idle: bool) -> Due | None:
        """Whether a pass should run at decode step `step`, and why; None if nothing is wanted.

        `idle`: no decode work is left. Rows of a request with rows in flight do not count.
        """
        if not self.waits():
            return None
        wanted = dict(self._wanted(ledger))
        if not wanted:
            return None
        if sum(wanted.values()) >= self.rows:
            return Due.FULL
        if step - min(self._since.get(rid, step) for rid in wanted) >= self.max_delay:
            return Due.DELAY
        if not self._draining.isdisjoint(wanted):
            return Due.DRAINING
        return Due.IDLE if idle else None

    def waiting(self, ledger: Ledger) -> list[str]:
        """The requests that have rows to take now."""
        return [rid for rid, _ in self._wanted(ledger)]

    def next_batch(self, ledger: Ledger, room: int | None = None) -> tuple[Row, ...]:
        """Take up to `room` rows, `rows` at most, from `ledger` (they are in flight afterwards).

        Draining requests first, then by oldest note; rows of one request are adjacent and
        ascending, and a span longer than what is left of the micro-batch is cut.
        """
        batch: list[Row] = []
        room = self.rows if room is None else min(room, self.rows)
        for rid in sorted((rid for rid, _ in self._wanted(ledger)), key=self._rank):
            if len(batch) == room:
                break
            batch += ledger.take(rid, room - len(batch))
        return tuple(batch)

    def settle(self, ledger: Ledger, rid: str, step: int) -> None:
        """Call once the verdicts of a pass for `rid` are in, at decode step `step`.

        Forgets a request that has nothing left to verify, or is closed; otherwise it keeps its
        age (`step` if it had none), and its turn among the draining while it is stopped.
        """
        if not ledger.is_open(rid) or not ledger.pending(rid):
            self.forget(rid)
            return
        self._since.setdefault(rid, step)
        if not ledger.stopped(rid):  # a flip or a retraction set it running again
            self._draining.discard(rid)

    def _wanted(self, ledger: Ledger) -> Iterator[tuple[str, int]]:
        """Each known request that has rows to take now, with their number."""
        # A dict keeps the order of the notes; the draining set has none that can be relied on.
        for rid in dict.fromkeys((*self._since, *sorted(self._draining))):
            if ledger.is_open(rid) and (rows := len(ledger.wanted(rid))):
                yield rid, rows

    def _rank(self, rid: str) -> tuple[bool, float]:
        return rid not in self._draining, self._since.get(rid, math.inf)
