"""The ledger: of each open request, which rows are settled, wanted, in flight or sent.

Rows count from 1; row j is the forward that predicts output token o_j. The lines kept are

    0 <= sent <= settled <= emitted        canonical <= emitted

`canonical` is the end of the leading run of canonical rows. The settled length never falls below
`sent`, and never decreases except by a FLIP (which drops rows that no client has seen).
"""

import enum
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

GUARANTEES = ("sparse", "exact")
REPAIRS = ("span", "column")


class Outcome(enum.StrEnum):
    """What a verdict did to its request."""

    MATCH = enum.auto()  # the emitted token is the verifier's
    FLIP = enum.auto()  # mismatch above what was sent: the caller rolls back to the row
    MISSED = enum.auto()  # mismatch at a row the client already has: the token stands
    STALE = enum.auto()  # the row was rolled back, retracted or closed meanwhile: ignored


@dataclass(frozen=True, slots=True)
class Row:
    """One row handed to the verifier."""

    rid: str
    index: int  # from 1
    epoch: int  # the request's history it belongs to; no two histories of a rid share one


@dataclass(slots=True)
class _Account:
    """The state of one open request. In span repair the integers say all but the flags."""

    epoch: int
    emitted: int = 0
    canonical: int = 0  # rows 1..canonical are canonical
    sent: int = 0  # tokens the client has
    kept: int = 0  # settled rows that survived a retraction
    goal: int = 0  # span: rows canonical+1..goal are to be verified
    stopped: bool = False
    retracted: bool = False  # kept rows have no columns until `replay`
    flags: deque[int] = field(default_factory=deque)  # flagged and not verified, ascending
    flight: deque[int] = field(default_factory=deque)  # taken, no verdict yet, ascending
    todo: list[int] = field(default_factory=list)  # column: to be verified, ascending
    checked: set[int] = field(default_factory=set)  # column: verified beyond `canonical`

    def verified(self, row: int) -> None:
        """Count `row` as verified. Canonical, too, if every row before it is."""
        if self.flags and self.flags[0] == row:
            self.flags.popleft()
        if self.canonical == row - 1:
            self.canonical = row
        else:
            self.checked.add(row)  # computed on columns that may not be canonical

    def cut(self, row: int) -> None:
        """Begin a new history that ends with `row`: what lies above is dropped."""
        self.epoch += 1
        self.emitted = row
        self.canonical = min(self.canonical, row)
        self.kept = min(self.kept, row)
        self.goal = min(self.goal, row)
        self.stopped = False
        self.flight.clear()
        self.flags.clear()
        self.todo = [index for index in self.todo if index <= row]
        self.checked = {index for index in self.checked if index <= row}


class Ledger:
    """Rows of all open requests. Every method but `verdict`, `is_open` and `emit_canonical` raises
    KeyError for a request that is not open. `emit` and the other per-token calls are O(1)."""

    def __init__(self, guarantee: str, repair: str) -> None:
        """ValueError for unknown words, and for exact with column: column repair leaves rows
        unverified between the flagged ones, so that no row behind them can be canonical."""
        if guarantee not in GUARANTEES:
            raise ValueError(f"guarantee must be one of {', '.join(GUARANTEES)}, not {guarantee!r}")
        if repair not in REPAIRS:
            raise ValueError(f"repair must be one of {', '.join(REPAIRS)}, not {repair!r}")
        if guarantee == "exact" and repair == "column":
            raise ValueError("guarantee 'exact' needs repair 'span': 'column' leaves gaps")
        self.guarantee = guarantee
        self.repair = repair
        self._exact = guarantee == "exact"
        self._span = repair == "span"
        self._accounts: dict[str, _Account] = {}
        self._first_epoch = 0  # above every epoch of a closed request: a reused rid starts there

    # -- the life of a request

    def open(self, rid: str) -> None:
        """Begin to keep `rid`, with no rows. ValueError if it is open."""
        if rid in self._accounts:
            raise ValueError(f"request {rid!r} is open already")
        self._accounts[rid] = _Account(self._first_epoch)

    def emit(self, rid: str, *, flagged: bool, canonical: bool = False) -> int:
        """Add the next row and return its index. ValueError if the request is stopped, or is
        retracted and not replayed.

        `canonical` counts only if every earlier row is canonical (a canonical computation on
        drifted columns is not canonical); a flag on a row that is canonical is dropped.
        """
        account = self._account(rid)
        self._require_running(rid, account)
        account.emitted += 1
        if canonical and account.canonical == account.emitted - 1:
            account.canonical = account.emitted
        elif flagged:
            self._want(account, account.emitted)
        return account.emitted

    def emit_canonical(self, rid: str) -> bool:
        """`emit` of a canonical row behind canonical ones. False, and nothing done, elsewhere."""
        account = self._accounts.get(rid)
        running = account and not (account.stopped or account.retracted)
        if not (account and running and account.canonical == account.emitted):
            return False
        account.emitted = account.canonical = account.emitted + 1
        return True

    def stop(self, rid: str) -> None:
        """The request reached its end: no more rows. Exact: its whole tail is wanted.

        Idempotent. A flip or a retraction takes it back: the caller decides anew whether what is
        left still ends the request. ValueError if retracted and not replayed.
        """
        account = self._account(rid)
        if account.stopped:
            return
        self._require_running(rid, account)
        account.stopped = True
        if self._exact:
            self._want_all(account)

    def retract(self, rid: str) -> int:
        """The request lost its columns to memory pressure. Returns how many tokens it keeps.

        The settled rows 1..settled stay settled, though not canonical any more; rows above are
        dropped, and so are flags and rows in flight. If rows are kept, `replay` must follow.
        """
        account = self._account(rid)
        account.kept = self._settled_length(account)
        account.cut(account.kept)
        account.canonical = account.goal = 0
        account.todo.clear()
        account.checked.clear()
        account.retracted = account.kept > 0
        return account.kept

    def replay(self, rid: str) -> None:
        """The prompt of a retracted request was prefilled again, which makes row 1 canonical:
        its kept rows from 2 on are wanted. Does nothing if no kept rows wait for it."""
        account = self._account(rid)
        if account.retracted:
            account.retracted = False
            account.canonical = 1
            self._want_all(account)

    def close(self, rid: str) -> None:
        """Forget a request, finished or aborted. Verdicts still to come for it are STALE."""
        account = self._account(rid)
        self._first_epoch = max(self._first_epoch, account.epoch + 1)
        del self._accounts[rid]

    # -- verification

    def request_tail(self, rid: str) -> None:
        """Want every row emitted so far that is not verified (exact streaming, audits)."""
        account = self._account(rid)
        if not account.retracted:  # `replay` will want them; until then they have no columns
            self._want_all(account)

    def wanted(self, rid: str) -> Sequence[int]:
        """Rows to be verified, ascending. Empty while rows of this request are in flight, for
        their verdicts may change what is left."""
        return self._wanted(self._account(rid))

    def pending(self, rid: str) -> bool:
        """Whether rows are wanted or in flight."""
        account = self._account(rid)
        return bool(account.flight or self._wanted(account))

    def take(self, rid: str, count: int) -> tuple[Row, ...]:
        """Mark the first `count` wanted rows (or as many as there are) in flight; return them."""
        account = self._account(rid)
        taken = self._wanted(account)[: max(count, 0)]
        account.flight.extend(taken)
        del account.todo[: len(taken)]  # span repair has none: its rows follow from `canonical`
        return tuple(Row(rid, index, account.epoch) for index in taken)

    def put_back(self, rid: str) -> None:
        """The pass with this request's rows failed: those without a verdict are wanted again.

        Not those of an earlier epoch: a flip or a retraction leaves nothing to put back.
        """
        account = self._account(rid)
        if not self._span:
            account.todo = sorted([*account.flight, *account.todo])
        account.flight.clear()

    def verdict(self, row: Row, match: bool) -> Outcome:
        """Enter the verifier's word on a taken row. ValueError unless given in ascending order.

        FLIP at j: row j now holds the verifier's token and is settled, rows above j are gone,
        a new epoch begins, the request runs again. MISSED: counted as verified, nothing changes.
        """
        account = self._accounts.get(row.rid)
        if account is None or account.epoch != row.epoch:
            return Outcome.STALE
        if not account.flight or account.flight[0] != row.index:
            due = account.flight[0] if account.flight else "none"
            raise ValueError(f"verdict for row {row.index} of {row.rid!r}, but {due} is due")
        account.flight.popleft()
        account.verified(row.index)
        if match:
            return Outcome.MATCH
        if row.index <= account.sent:
            return Outcome.MISSED
        account.cut(row.index)
        return Outcome.FLIP

    # -- output

    def settled_length(self, rid: str) -> int:
        """Settled tokens. Sparse: the rows before the first pending flag. Exact: the canonical
        rows, and those that were when the request was retracted."""
        return self._settled_length(self._account(rid))

    def mark_sent(self, rid: str, count: int) -> None:
        """The client has tokens 1..count. ValueError above the settled or below the last count."""
        account = self._account(rid)
        if not account.sent <= count <= self._settled_length(account):
            raise ValueError(
                f"cannot mark {count} tokens of {rid!r} sent: {account.sent} are, "
                f"{self._settled_length(account)} are settled"
            )
        account.sent = count

    # -- reading

    def is_open(self, rid: str) -> bool:
        """Whether `rid` is kept; never raises."""
        return rid in self._accounts

    def requests(self) -> Iterator[str]:
        """Open requests in the order they were opened; a snapshot, so that closing is safe."""
        return iter(tuple(self._accounts))

    def stopped(self, rid: str) -> bool:
        """Whether `stop` holds: called, and neither a flip nor a retraction since."""
        return self._account(rid).stopped

    def emitted(self, rid: str) -> int:
        """Rows emitted and not rolled back."""
        return self._account(rid).emitted

    def canonical(self, rid: str) -> int:
        """Length of the leading run of canonical rows."""
        return self._account(rid).canonical

    def sent(self, rid: str) -> int:
        """Tokens the client has."""
        return self._account(rid).sent

    def epoch(self, rid: str) -> int:
        """The present history: one more after each flip and each retraction."""
        return self._account(rid).epoch

    def check_integrity(self) -> None:
        """AssertionError with a sentence on the first broken invariant. For idle time, tests."""
        for rid, account in self._accounts.items():
            for holds, sentence in self._invariants(account):
                if not holds:
                    raise AssertionError(f"request {rid!r}: {sentence}: {account}")

    # -- inside

    def _account(self, rid: str) -> _Account:
        try:
            return self._accounts[rid]
        except KeyError:
            raise KeyError(f"request {rid!r} is not open in the ledger") from None

    @staticmethod
    def _require_running(rid: str, account: _Account) -> None:
        if account.stopped:
            raise ValueError(f"request {rid!r} is stopped")
        if account.retracted:
            raise ValueError(f"request {rid!r} is retracted and was not replayed")

    def _want(self, account: _Account, row: int) -> None:
        account.flags.append(row)
        if self._span:
            account.goal = row
        else:
            account.todo.append(row)

    def _want_all(self, account: _Account) -> None:
        if self._span:
            account.goal = account.emitted
            return
        known = account.checked.union(account.flight)
        rows = range(account.canonical + 1, account.emitted + 1)
        account.todo = [row for row in rows if row not in known]

    def _wanted(self, account: _Account) -> Sequence[int]:
        if account.flight:
            return ()
        if self._span:
            return range(account.canonical + 1, account.goal + 1)
        return tuple(account.todo)

    def _settled_length(self, account: _Account) -> int:
        if self._exact:
            return max(account.canonical, account.kept)
        return account.flags[0] - 1 if account.flags else account.emitted

    def _invariants(self, account: _Account) -> Iterator[tuple[bool, str]]:
        open_rows = range(account.canonical + 1, account.emitted + 1)
        settled = self._settled_length(account)
        lists = [list(account.flags), list(account.flight), account.todo]
        busy = {*account.flight, *account.todo}
        span_flight = [*range(account.canonical + 1, account.canonical + 1 + len(account.flight))]
        yield 0 <= account.sent <= settled <= account.emitted, "sent, settled, emitted in order"
        yield 0 <= account.canonical <= account.emitted, "canonical rows are emitted rows"
        yield account.kept <= settled, "rows kept by a retraction are settled"
        yield 0 <= account.goal <= account.emitted, "the goal is an emitted row"
        yield all(rows == sorted(set(rows)) for rows in lists), "flags and rows ascend, each once"
        yield all(row in open_rows for rows in lists for row in rows), "open rows are not canonical"
        yield all(row in open_rows for row in account.checked), "checked rows are emitted rows"
        yield not (account.retracted and (busy or account.goal)), "retracted: nothing to verify"
        yield not account.checked & busy, "no checked row is to be verified again"
        if self._span:
            yield not account.todo and not account.checked, "span repair keeps no row lists"
            yield list(account.flight) == span_flight, "rows in flight follow the canonical ones"
            last = max([0, *account.flags, *account.flight])
            yield last <= account.goal, "flags and rows in flight lie within the goal"
        else:
            yield set(account.flags) <= busy, "every flag is to be verified or in flight"
            yield len(busy) == len(account.flight) + len(account.todo), "no row in flight is wanted"
