"""What `margingate watch` shows: one picture of the newest records, or a JSON line for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from margingate.events import AnyRecord, Received, Settled, Step, Totals, Verdict

RATE_S = 5.0  # rates are taken over the sums of this time
FLIPS = 6  # shown
WAITS = 200  # of settled requests, for the settle lag


def lines(received: Received) -> Iterator[str]:
    """A JSON object per record; before them {"type": "lost"} where messages are missing."""
    message = received.message
    head = {"stream": message.stream, "seq": message.seq, "time": message.time}
    if received.lost:
        yield _line({**head, "type": "lost", "messages": received.lost})
    for record in message.records:
        yield _line({**head, **msgspec.to_builtins(record)})


def _line(record: dict[str, object]) -> str:
    return msgspec.json.encode(record).decode()  # NaN and infinity become null


class View:
    """Sums up what was received; times are time.monotonic, seconds."""

    def __init__(self, endpoint: str, quiet_s: float) -> None:
        self._endpoint, self._quiet_s = endpoint, quiet_s
        self.messages = self.lost = 0
        self._heard_at = 0.0
        self._stream = ""
        self._open = self._held = self._steps = 0
        self._totals: deque[tuple[float, Totals]] = deque()  # of the last RATE_S, oldest first
        self._flips: deque[Verdict] = deque(maxlen=FLIPS)
        self._waits: deque[float] = deque(maxlen=WAITS)  # seconds

    def feed(self, received: Received, at: float) -> None:
        """Take in one message."""
        message = received.message
        if message.stream != self._stream:  # another server, whose sums begin anew
            self._stream = message.stream
            self._totals.clear()
        self.messages += 1
        self.lost += received.lost
        self._heard_at = at
        for record in message.records:
            self._take(record, message.time)

    def _take(self, record: AnyRecord, time_s: float) -> None:
        if isinstance(record, Step | Totals):
            self._open, self._held = record.open, record.held
            self._steps = record.step if isinstance(record, Step) else record.steps
        if isinstance(record, Totals):
            self._totals.append((time_s, record))
            while len(self._totals) > 2 and self._totals[1][0] <= time_s - RATE_S:
                self._totals.popleft()
        elif isinstance(record, Settled):
            self._waits.append(record.seconds)
        elif isinstance(record, Verdict) and record.outcome in ("flip", "missed"):
            self._flips.append(record)

    def render(self, at: float) -> Group:
        """The picture at this time."""
        status = f"events from {self._endpoint}"
        if not self.messages:
            return Group(Text(f"waiting for {status}"))
        if (quiet := at - self._heard_at) >= self._quiet_s:
            status = f"waiting for {status}: none for {quiet:.0f} s"
        return Group(Text(status), self._figures(), self._last_flips())

    def _figures(self) -> Table:
        table = Table(show_header=False)
        for name, value in self._cells().items():
            table.add_row(name, value)
        return table

    def _cells(self) -> dict[str, str]:
        totals = self._totals[-1][1] if self._totals else None
        counts = totals.counts if totals else {}
        decodes, canonical = (totals.decodes, totals.canonical) if totals else (0, 0)
        return {
            "open requests": f"{self._open}, {self._held} of them waiting for their end",
            "steps": f"{self._steps} ({self._rate('steps')}/s)",
            "tokens": f"{counts.get('steps', 0)} ({self._rate('tokens')}/s)",
            "trigger rate": _share(counts.get("flagged", 0), counts.get("steps", 0)),
            "canonical steps": _share(canonical, decodes),
            "verify passes": f"{counts.get('passes', 0)} ({self._rate('passes')}/s)",
            "flips": f"{counts.get('flips', 0)}",
            "missed": f"{counts.get('missed', 0)}",
            "rolled back": f"{counts.get('rolled_back', 0)} tokens",
            "settle lag": self._settle_lag(),
            "lost messages": f"{self.lost} of {self.lost + self.messages}",
        }

    def _rate(self, name: str) -> str:
        """Per second over the sums at hand; a dash while there are not two of them."""
        if len(self._totals) < 2:
            return "-"
        (start, first), (end, last) = self._totals[0], self._totals[-1]
        return f"{(_sum(last, name) - _sum(first, name)) / max(end - start, 1e-3):.1f}"

    def _settle_lag(self) -> str:
        if not self._waits:
            return "no token waited"
        mean_ms = 1e3 * sum(self._waits) / len(self._waits)
        return f"{mean_ms:.0f} ms, at most {1e3 * max(self._waits):.0f} ms"

    def _last_flips(self) -> Table | str:
        if not self._flips:
            return "no flips yet"
        table = Table("request", "row", "margin", "token", "verified", "", title="last flips")
        for flip in reversed(self._flips):
            margin = "-" if flip.margin is None else f"{flip.margin:.4f}"
            note = "sent already" if flip.outcome == "missed" else ""
            cells = (flip.rid, flip.row, margin, flip.token, flip.verified, note)
            table.add_row(*(Text(str(cell)) for cell in cells))
        return table


def _sum(totals: Totals, name: str) -> float:
    named = {"steps": totals.steps, "tokens": totals.counts.get("steps", 0)}
    return named[name] if name in named else totals.counts.get(name, 0)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%} ({part:.0f} of {whole:.0f})" if whole else "-"
