"""Queue: one example per rule; then ledger and queue together against a brute-force model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from margingate.core.ledger import Ledger, Outcome, Row
from margingate.core.queue import Due, MicroBatchQueue


def ledger_of(**wanted: int) -> Ledger:
    """Requests by name, each with that many wanted rows, from row 2 on."""
    ledger = Ledger("sparse", "span")
    for rid, rows in wanted.items():
        ledger.open(rid)
        for row in range(rows + 1):
            ledger.emit(rid, flagged=row > 0, canonical=row == 0)
    return ledger


def names(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return [(row.rid, row.index) for row in rows]


@pytest.mark.parametrize(("rows", "max_delay"), [(0, 1), (1, -1)])
def test_bad_sizes_are_refused(rows: int, max_delay: int) -> None:
    with pytest.raises(ValueError, match=r"0|-1"):
        MicroBatchQueue(rows, max_delay)


def test_nothing_wanted_is_never_due() -> None:
    queue, ledger = MicroBatchQueue(1, 0), ledger_of(a=0)
    queue.note("a", 0)
    queue.drain("gone")
    assert queue.due(ledger, 100, True) is None
    assert queue.next_batch(ledger) == ()


def test_full_counts_rows_over_requests() -> None:
    queue, ledger = MicroBatchQueue(4, 9), ledger_of(a=2, b=2)
    queue.note("a", 0)
    assert queue.due(ledger, 0, False) is None
    queue.note("b", 0)
    assert queue.due(ledger, 0, False) is Due.FULL


def test_delay_counts_from_the_oldest_note() -> None:
    queue, ledger = MicroBatchQueue(8, 3), ledger_of(a=1, b=1)
    queue.note("b", 6)
    queue.note("a", 5)
    queue.note("a", 7)
    assert queue.due(ledger, 7, False) is None
    assert queue.due(ledger, 8, False) is Due.DELAY
    assert MicroBatchQueue(8, 3).due(ledger, 8, False) is None


def test_no_delay_makes_all_due_at_once() -> None:
    queue, ledger = MicroBatchQueue(8, 0), ledger_of(a=1)
    queue.note("a", 5)
    assert queue.due(ledger, 5, False) is Due.DELAY


def test_draining_and_idle_are_due() -> None:
    queue, ledger = MicroBatchQueue(8, 9), ledger_of(a=1)
    queue.note("a", 0)
    assert queue.due(ledger, 1, False) is None
    assert queue.due(ledger, 1, True) is Due.IDLE
    queue.drain("a")
    assert queue.due(ledger, 1, False) is Due.DRAINING
    queue.forget("a")
    assert queue.due(ledger, 1, True) is None


def test_batch_takes_draining_first_then_the_oldest_and_cuts_the_last() -> None:
    queue, ledger = MicroBatchQueue(6, 9), ledger_of(a=3, b=2, c=2, d=1)
    for step, rid in enumerate("bac"):
        queue.note(rid, step)
    queue.drain("c")
    expected = [("c", 2), ("c", 3), ("b", 2), ("b", 3), ("a", 2), ("a", 3)]
    assert names(queue.next_batch(ledger)) == expected
    assert queue.due(ledger, 99, True) is None  # every known request has rows in flight
    assert queue.next_batch(ledger) == ()


def test_a_closed_request_is_skipped() -> None:
    queue, ledger = MicroBatchQueue(8, 0), ledger_of(a=1, b=1)
    queue.note("a", 0)
    queue.note("b", 0)
    ledger.close("a")
    assert names(queue.next_batch(ledger)) == [("b", 2)]
    queue.settle(ledger, "a", 1)


def test_settle_forgets_or_keeps_the_age() -> None:
    queue, ledger = MicroBatchQueue(2, 4), ledger_of(a=3)
    queue.note("a", 0)
    for row in queue.next_batch(ledger):
        ledger.verdict(row, True)
    queue.settle(ledger, "a", 3)
    assert queue.due(ledger, 3, False) is None
    assert queue.due(ledger, 4, False) is Due.DELAY
    for row in queue.next_batch(ledger):
        ledger.verdict(row, True)
    queue.settle(ledger, "a", 4)
    ledger.emit("a", flagged=True)
    assert queue.due(ledger, 9, True) is None  # forgotten: it must be noted anew
    queue.note("a", 9)
    assert queue.due(ledger, 9, False) is None


def test_settle_ends_the_draining_of_a_request_that_runs_again() -> None:
    queue, ledger = MicroBatchQueue(8, 9), ledger_of(a=2)
    ledger.stop("a")
    queue.drain("a")
    assert queue.due(ledger, 0, False) is Due.DRAINING
    ledger.retract("a")
    ledger.replay("a")
    ledger.emit("a", flagged=True)
    queue.settle(ledger, "a", 3)
    assert queue.due(ledger, 11, False) is None
    assert queue.due(ledger, 12, False) is Due.DELAY


# -- ledger and queue against a model

LENGTH = 9  # a request ends after so many tokens, or with END
END = 0


def canonical_token(prefix: Sequence[int]) -> int:
    """The token that a canonical forward chooses after `prefix`: arbitrary, but a function."""
    return hash((7, *prefix)) // 64 % 8


def canonical_output(seed: int) -> list[int]:
    tokens = [seed]
    while not ended(tokens):
        tokens.append(canonical_token([*tokens[1:], seed]))
    return tokens[1:]


def ended(tokens: Sequence[int]) -> bool:
    """`tokens` is the seed (the prompt) and the output."""
    return len(tokens) > LENGTH or (len(tokens) > 1 and tokens[-1] == END)


@dataclass
class ModelRow:
    """One row, as the brute-force model knows it."""

    token: int
    flag: bool = False  # flagged, and not verified yet
    asked: bool = False  # wanted though not flagged
    canonical: bool = False  # computed on canonical columns
    checked: bool = False  # verified in this epoch
    kept: bool = False  # survived a retraction


@dataclass
class Model:
    """One request: its rows spelled out, every answer a loop over them."""

    seed: int
    exact: bool
    span: bool
    rows: list[ModelRow] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    flight: list[int] = field(default_factory=list)
    retracted: bool = False

    def tokens(self) -> list[int]:
        return [row.token for row in self.rows]

    def right(self, row: int) -> int:
        """The canonical token of `row` (from 1) after the tokens that are there."""
        return canonical_token([*self.tokens()[: row - 1], self.seed])

    def ended(self) -> bool:
        return ended([self.seed, *self.tokens()])

    def canonical(self) -> int:
        run = [row.canonical for row in self.rows]
        return run.index(False) if False in run else len(run)

    def settled_length(self) -> int:
        settled = 0
        for row in self.rows:
            if not (row.canonical or row.kept if self.exact else not row.flag):
                break
            settled += 1
        return settled

    def wanted(self) -> list[int]:
        if self.flight or self.retracted:
            return []
        numbered = list(enumerate(self.rows, 1))
        direct = [i for i, row in numbered if (row.flag or row.asked) and not row.checked]
        if not self.span:
            return direct
        return [i for i, row in numbered if not row.canonical and i <= max(direct, default=0)]

    def ask_all(self) -> None:
        for row in self.rows:
            row.asked = row.asked or not (row.canonical or row.checked)

    def emit(self, token: int, flagged: bool, canonical: bool) -> None:
        canonical = canonical and self.canonical() == len(self.rows)
        self.rows.append(ModelRow(token, flagged and not canonical, canonical=canonical))

    def verdict(self, row: int) -> Outcome:
        """Verify `row`; apply what follows."""
        entry = self.rows[row - 1]
        assert not entry.checked, "verified twice in one epoch"
        self.flight.remove(row)
        prefix_canonical = self.canonical() == row - 1
        assert prefix_canonical or not self.span
        entry.canonical |= prefix_canonical
        entry.flag, entry.checked = False, True
        if entry.token == self.right(row):
            return Outcome.MATCH
        if row <= len(self.sent):
            return Outcome.MISSED
        entry.token = self.right(row)
        del self.rows[row:]
        self.flight.clear()
        return Outcome.FLIP

    def retract(self) -> None:
        del self.rows[self.settled_length() :]
        self.rows = [ModelRow(row.token, kept=True) for row in self.rows]
        self.flight.clear()
        self.retracted = bool(self.rows)

    def replay(self) -> None:
        if self.retracted:
            self.retracted = False
            self.rows[0].canonical = True
            self.ask_all()


class GateMachine(RuleBasedStateMachine):
    """Requests that decode, stream, stop, flip, lose memory and abort, in any order."""

    guarantee, repair, every_row = "sparse", "span", False

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.guarantee, self.repair)
        self.queue = MicroBatchQueue(rows=3, max_delay=2)
        self.models: dict[str, Model] = {}
        self.batches: list[tuple[Row, ...]] = []
        self.taken: dict[Row, bool] = {}  # row -> whether its verdict counted
        self.floor: dict[str, int] = {}  # the settled length last seen
        self.step = 0

    # -- what a runtime would do

    def decode(self, rid: str, flagged: bool, canonical: bool, drift: int) -> None:
        """One fast-path row. Row 1 comes from prefill, which is canonical."""
        model = self.models[rid]
        canonical = canonical or not model.rows
        on_canonical = model.canonical() == len(model.rows)
        right = model.right(len(model.rows) + 1)
        token = right if canonical and on_canonical else (right + drift) % 8
        flagged = flagged or self.every_row
        model.emit(token, flagged, canonical)
        row = self.ledger.emit(rid, flagged=flagged, canonical=canonical)
        assert row == len(model.rows)
        if self.ledger.pending(rid):
            self.queue.note(rid, self.step)
        self.end_if_ended(rid)

    def end_if_ended(self, rid: str) -> None:
        if self.models[rid].ended():
            self.ledger.stop(rid)
            if self.guarantee == "exact":
                self.models[rid].ask_all()
            self.queue.drain(rid)

    def launch(self, idle: bool) -> None:
        free = {rid: rows for rid, model in self.models.items() if (rows := model.wanted())}
        due = self.queue.due(self.ledger, self.step, idle)
        assert due or not (idle and free), "rows that are wanted are unknown to the queue"
        if not due:
            return
        batch = self.queue.next_batch(self.ledger)
        assert len(batch) == min(self.queue.rows, sum(map(len, free.values())))
        for row in batch:
            assert not self.taken.get(row), "taken again after its verdict"
            self.taken[row] = False
            self.models[row.rid].flight.append(row.index)
        for rid in {row.rid for row in batch}:
            flight = self.models[rid].flight
            assert flight == free[rid][: len(flight)]
        self.batches.append(batch)

    def land(self, batch: Sequence[Row]) -> None:
        for row in batch:
            outcome = Outcome.STALE
            model = self.models.get(row.rid)
            if model is not None and self.ledger.epoch(row.rid) == row.epoch:
                match = model.tokens()[row.index - 1] == model.right(row.index)
                outcome = model.verdict(row.index)
                self.taken[row] = True
            else:
                match = False
            assert self.ledger.verdict(row, match) is outcome
            if outcome is Outcome.FLIP:
                self.floor[row.rid] = len(model.sent) if model else 0
                self.queue.settle(self.ledger, row.rid, self.step)
                self.end_if_ended(row.rid)
        for rid in {row.rid for row in batch}:
            self.queue.settle(self.ledger, rid, self.step)

    # -- rules

    @rule(rid=st.sampled_from("abc"), seed=st.integers(8, 40))
    def open(self, rid: str, seed: int) -> None:
        if rid not in self.models:
            self.ledger.open(rid)
            exact, span = self.guarantee == "exact", self.repair == "span"
            self.models[rid] = Model(seed, exact, span)
            self.floor[rid] = 0

    @precondition(lambda self: self.models)
    @rule(
        rows=st.lists(
            st.tuples(st.booleans(), st.booleans(), st.sampled_from([0, 0, 0, 1, 3])),
            min_size=1,
            max_size=6,
        ),
        stream=st.booleans(),
        data=st.data(),
    )
    def emit(self, rows: list[tuple[bool, bool, int]], stream: bool, data: st.DataObject) -> None:
        rid = self.pick(data)
        for flagged, canonical, drift in rows:
            if self.models[rid].ended() or self.models[rid].retracted:
                return
            self.step += 1
            self.decode(rid, flagged, canonical, drift)
            if stream:
                self.stream(rid, self.models[rid].settled_length())

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        rid = self.pick(data)
        model = self.models[rid]
        self.stream(rid, data.draw(st.integers(len(model.sent), model.settled_length())))

    def stream(self, rid: str, count: int) -> None:
        self.ledger.mark_sent(rid, count)
        self.models[rid].sent = self.models[rid].tokens()[:count]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def request_tail(self, data: st.DataObject) -> None:
        rid = self.pick(data)
        self.ledger.request_tail(rid)
        if not self.models[rid].retracted:
            self.models[rid].ask_all()
        if self.ledger.pending(rid):
            self.queue.note(rid, self.step)

    @rule(idle=st.booleans())
    def verify(self, idle: bool) -> None:
        self.launch(idle)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def verdicts(self, data: st.DataObject) -> None:
        self.land(self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1))))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        batch = self.batches.pop(data.draw(st.integers(0, len(self.batches) - 1)))
        for rid, epoch in {(row.rid, row.epoch) for row in batch}:
            if rid in self.models and self.ledger.epoch(rid) == epoch:
                self.ledger.put_back(rid)
                self.models[rid].flight.clear()
            self.queue.settle(self.ledger, rid, self.step)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        rid = self.pick(data)
        self.models[rid].retract()
        assert self.ledger.retract(rid) == len(self.models[rid].rows)
        self.queue.forget(rid)

    @precondition(lambda self: any(model.retracted for model in self.models.values()))
    @rule()
    def resume(self) -> None:
        for rid, model in self.models.items():
            if model.retracted:
                model.replay()
                self.ledger.replay(rid)
                self.queue.note(rid, self.step)
                self.end_if_ended(rid)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.drop(self.pick(data))

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.models)))

    def drop(self, rid: str) -> None:
        self.ledger.close(rid)
        self.queue.forget(rid)
        del self.models[rid], self.floor[rid]

    # -- what must hold

    @invariant()
    def ledger_agrees_with_the_model(self) -> None:
        self.ledger.check_integrity()
        assert set(self.ledger.requests()) == set(self.models)
        for rid, model in self.models.items():
            assert self.ledger.emitted(rid) == len(model.rows)
            assert self.ledger.canonical(rid) == model.canonical()
            assert self.ledger.settled_length(rid) == model.settled_length()
            assert list(self.ledger.wanted(rid)) == model.wanted()
            assert self.ledger.pending(rid) == bool(model.flight or model.wanted())
            assert self.ledger.stopped(rid) == (model.ended() and not model.retracted)

    @invariant()
    def sent_tokens_stand_and_the_settled_length_holds(self) -> None:
        for rid, model in self.models.items():
            assert self.ledger.sent(rid) == len(model.sent)
            assert model.tokens()[: len(model.sent)] == model.sent
            assert self.ledger.settled_length(rid) >= self.floor[rid] >= 0
            self.floor[rid] = self.ledger.settled_length(rid)

    def teardown(self) -> None:
        """Run everything to its end: nothing is lost, and what is promised is delivered."""
        self.resume()
        for _ in range(20 * LENGTH):
            while self.batches:
                self.land(self.batches.pop())
            for rid, model in self.models.items():
                if not model.ended():
                    self.decode(rid, False, False, 1)
            self.step += 1
            self.launch(idle=True)
            self.ledger_agrees_with_the_model()
            if not self.batches and all(model.ended() for model in self.models.values()):
                break
        for rid in sorted(self.models):
            self.delivered(rid)
        assert self.queue.due(self.ledger, self.step + 99, True) is None

    def delivered(self, rid: str) -> None:
        model = self.models[rid]
        assert self.ledger.stopped(rid)
        assert not self.ledger.pending(rid)
        assert self.ledger.settled_length(rid) == self.ledger.emitted(rid) == len(model.rows)
        if self.guarantee == "exact" or self.every_row:
            assert model.tokens() == canonical_output(model.seed)
        self.drop(rid)


KINDS = [
    ("sparse", "span", False),
    ("sparse", "span", True),
    ("sparse", "column", False),
    ("sparse", "column", True),
    ("exact", "span", False),
]


@pytest.mark.parametrize(("guarantee", "repair", "every_row"), KINDS)
def test_ledger_and_queue_against_the_model(guarantee: str, repair: str, every_row: bool) -> None:
    body = {"guarantee": guarantee, "repair": repair, "every_row": every_row}
    machine = type(f"Gate_{guarantee}_{repair}_{every_row}", (GateMachine,), body)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
