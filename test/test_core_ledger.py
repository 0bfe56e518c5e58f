"""Ledger: one example per rule. The state machine in test_core_queue.py covers their mixture."""

from collections.abc import Callable, Iterable

import pytest

from margingate.core.ledger import Ledger, Outcome, Row

SPARSE_SPAN = ("sparse", "span")
SPARSE_COLUMN = ("sparse", "column")
EXACT_SPAN = ("exact", "span")
ALL = (SPARSE_SPAN, SPARSE_COLUMN, EXACT_SPAN)


def opened(kind: tuple[str, str], rows: int, flagged: Iterable[int] = ()) -> Ledger:
    """A ledger with request "a": row 1 canonical, rows 2..rows fast, those in `flagged` so."""
    ledger = Ledger(*kind)
    ledger.open("a")
    for row in range(1, rows + 1):
        assert ledger.emit("a", flagged=row in set(flagged), canonical=row == 1) == row
    ledger.check_integrity()
    return ledger


def verify(ledger: Ledger, count: int, differs: Iterable[int] = ()) -> list[Outcome]:
    """Take `count` rows of "a" and give their verdicts."""
    outcomes = [ledger.verdict(row, row.index not in differs) for row in ledger.take("a", count)]
    ledger.check_integrity()
    return outcomes


def indices(rows: Iterable[Row]) -> list[int]:
    return [row.index for row in rows]


# -- opening, closing, unknown requests


def test_unknown_words_and_column_with_exact_are_refused() -> None:
    for kind in (("loose", "span"), ("sparse", "row"), ("exact", "column")):
        with pytest.raises(ValueError, match=rf"{kind[0]}|{kind[1]}"):
            Ledger(*kind)


def test_open_close_and_list() -> None:
    ledger = Ledger(*SPARSE_SPAN)
    for rid in "bac":
        ledger.open(rid)
    with pytest.raises(ValueError, match="open already"):
        ledger.open("a")
    for rid in ledger.requests():
        assert ledger.is_open(rid)
        ledger.close(rid)
    assert not ledger.is_open("a")
    assert list(ledger.requests()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda ledger: ledger.emit("x", flagged=False),
        lambda ledger: ledger.stop("x"),
        lambda ledger: ledger.stopped("x"),
        lambda ledger: ledger.wanted("x"),
        lambda ledger: ledger.request_tail("x"),
        lambda ledger: ledger.take("x", 1),
        lambda ledger: ledger.put_back("x"),
        lambda ledger: ledger.mark_sent("x", 0),
        lambda ledger: ledger.settled_length("x"),
        lambda ledger: ledger.pending("x"),
        lambda ledger: ledger.emitted("x"),
        lambda ledger: ledger.canonical("x"),
        lambda ledger: ledger.sent("x"),
        lambda ledger: ledger.epoch("x"),
        lambda ledger: ledger.retract("x"),
        lambda ledger: ledger.replay("x"),
        lambda ledger: ledger.close("x"),
    ],
)
def test_an_unknown_request_is_a_clear_key_error(call: Callable[[Ledger], object]) -> None:
    with pytest.raises(KeyError, match="'x' is not open"):
        call(Ledger(*SPARSE_SPAN))


# -- emitting and settling


def test_canonical_counts_only_on_a_canonical_prefix() -> None:
    ledger = opened(SPARSE_SPAN, 1)
    ledger.emit("a", flagged=True, canonical=True)  # the flag needs nothing
    assert (ledger.canonical("a"), list(ledger.wanted("a"))) == (2, [])
    ledger.emit("a", flagged=False)
    ledger.emit("a", flagged=False, canonical=True)
    assert (ledger.canonical("a"), ledger.settled_length("a")) == (2, 4)


def test_a_canonical_row_on_drifted_columns_keeps_its_flag() -> None:
    ledger = opened(SPARSE_SPAN, 2)
    ledger.emit("a", flagged=True, canonical=True)
    assert list(ledger.wanted("a")) == [2, 3]


@pytest.mark.parametrize("kind", ALL)
def test_a_canonical_row_behind_canonical_ones_is_as_any_other(kind: tuple[str, str]) -> None:
    general, short = opened(kind, 1), opened(kind, 1)
    for _ in range(3):
        general.emit("a", flagged=False, canonical=True)
        assert short.emit_canonical("a")
    assert general._accounts == short._accounts
    short.check_integrity()


@pytest.mark.parametrize("kind", ALL)
def test_no_other_row_is_emitted_as_a_canonical_one(kind: tuple[str, str]) -> None:
    drifted, stopped, retracted = opened(kind, 2), opened(kind, 1), opened(kind, 1)
    stopped.stop("a")
    retracted.retract("a")
    for ledger in (drifted, stopped, retracted):
        before = ledger.emitted("a")
        assert not ledger.emit_canonical("a") and ledger.emitted("a") == before
        assert not ledger.emit_canonical("closed")
    retracted.replay("a")
    assert retracted.emit_canonical("a")


@pytest.mark.parametrize("kind", [SPARSE_SPAN, SPARSE_COLUMN])
def test_sparse_settles_up_to_the_first_pending_flag(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 8, flagged=[4, 7])
    assert ledger.settled_length("a") == 3
    while 4 in ledger.wanted("a"):
        assert verify(ledger, 1) == [Outcome.MATCH]
    assert ledger.settled_length("a") == 6
    while ledger.pending("a"):
        verify(ledger, 1)
    assert ledger.settled_length("a") == 8


def test_exact_settles_canonical_rows_only() -> None:
    ledger = opened(EXACT_SPAN, 6, flagged=[4])
    assert (ledger.settled_length("a"), list(ledger.wanted("a"))) == (1, [2, 3, 4])
    verify(ledger, 2)
    assert ledger.settled_length("a") == 3
    verify(ledger, 9)
    assert (ledger.settled_length("a"), ledger.pending("a")) == (4, False)


@pytest.mark.parametrize("kind", ALL)
def test_a_stopped_request_takes_no_row(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 5, flagged=[3])
    ledger.stop("a")
    ledger.stop("a")
    assert ledger.stopped("a")
    with pytest.raises(ValueError, match="stopped"):
        ledger.emit("a", flagged=False)
    tail = {SPARSE_SPAN: [2, 3], SPARSE_COLUMN: [3], EXACT_SPAN: [2, 3, 4, 5]}
    assert list(ledger.wanted("a")) == tail[kind]


@pytest.mark.parametrize("kind", ALL)
def test_request_tail_wants_all_that_is_not_verified(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 5, flagged=[3])
    verify(ledger, 9)
    ledger.request_tail("a")
    rest = [2, 4, 5] if kind == SPARSE_COLUMN else [4, 5]
    assert list(ledger.wanted("a")) == rest
    verify(ledger, 9)
    assert (ledger.pending("a"), ledger.settled_length("a")) == (False, 5)


def test_request_tail_with_rows_in_flight() -> None:
    ledger = opened(SPARSE_COLUMN, 6, flagged=[3, 5])
    rows = ledger.take("a", 2)
    ledger.request_tail("a")
    ledger.check_integrity()
    assert [ledger.verdict(row, True) for row in rows] == [Outcome.MATCH] * 2
    assert list(ledger.wanted("a")) == [2, 4, 6]


# -- taking and verdicts


@pytest.mark.parametrize("kind", ALL)
def test_one_micro_batch_of_a_request_in_flight(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 6, flagged=[2, 3, 5])
    rows = ledger.take("a", 2)
    assert indices(rows) == [2, 3]
    assert (len(ledger.wanted("a")), ledger.take("a", 2), ledger.pending("a")) == (0, (), True)
    for row in rows:
        ledger.verdict(row, True)
    assert list(ledger.wanted("a")) == ([5] if kind == SPARSE_COLUMN else [4, 5])


@pytest.mark.parametrize("kind", ALL)
def test_put_back_wants_the_rest_again(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 4, flagged=[2, 3, 4])
    rows = ledger.take("a", 2)
    ledger.verdict(rows[0], True)
    ledger.put_back("a")
    ledger.check_integrity()
    assert list(ledger.wanted("a")) == [3, 4]
    ledger.put_back("a")  # nothing in flight: nothing to do
    assert list(ledger.wanted("a")) == [3, 4]


@pytest.mark.parametrize("kind", ALL)
def test_verdicts_out_of_order_or_not_asked_for_are_refused(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 3, flagged=[2, 3])
    with pytest.raises(ValueError, match="none is due"):
        ledger.verdict(Row("a", 2, ledger.epoch("a")), True)
    rows = ledger.take("a", 2)
    with pytest.raises(ValueError, match="2 is due"):
        ledger.verdict(rows[1], True)
    assert [ledger.verdict(row, True) for row in rows] == [Outcome.MATCH] * 2


@pytest.mark.parametrize("kind", ALL)
def test_a_flip_rolls_back_to_its_row(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 7, flagged=[2, 3, 5, 6])
    ledger.stop("a")
    epoch = ledger.epoch("a")
    rows = ledger.take("a", 4)
    outcomes = [ledger.verdict(row, row.index != 3) for row in rows]
    assert outcomes == [Outcome.MATCH, Outcome.FLIP, Outcome.STALE, Outcome.STALE]
    assert (ledger.emitted("a"), ledger.settled_length("a"), ledger.epoch("a")) == (3, 3, epoch + 1)
    assert not ledger.stopped("a")
    assert not ledger.pending("a")
    assert ledger.canonical("a") == 3  # in column repair too: rows 2 and 3 lay side by side
    ledger.check_integrity()
    assert ledger.emit("a", flagged=True) == 4


def test_column_repair_leaves_rows_behind_a_gap_not_canonical() -> None:
    ledger = opened(SPARSE_COLUMN, 7, flagged=[4, 6])
    assert verify(ledger, 9, differs=[6]) == [Outcome.MATCH, Outcome.FLIP]
    assert (ledger.canonical("a"), ledger.settled_length("a"), ledger.emitted("a")) == (1, 6, 6)
    ledger.request_tail("a")
    assert list(ledger.wanted("a")) == [2, 3, 5]
    assert verify(ledger, 9, differs=[3]) == [Outcome.MATCH, Outcome.FLIP, Outcome.STALE]
    assert (ledger.canonical("a"), ledger.emitted("a")) == (3, 3)


def test_a_mismatch_that_the_client_has_is_missed() -> None:
    ledger = opened(SPARSE_SPAN, 5, flagged=[4])
    ledger.mark_sent("a", 2)
    assert verify(ledger, 3, differs=[2]) == [Outcome.MISSED, Outcome.MATCH, Outcome.MATCH]
    assert (ledger.canonical("a"), ledger.settled_length("a"), ledger.epoch("a")) == (4, 5, 0)


@pytest.mark.parametrize("kind", ALL)
def test_verdicts_of_an_older_history_are_stale(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 4, flagged=[2, 3])
    before = ledger.take("a", 2)
    ledger.retract("a")
    assert ledger.verdict(before[0], False) is Outcome.STALE
    ledger.close("a")
    assert ledger.verdict(before[1], False) is Outcome.STALE
    ledger.open("a")  # the same name, another request
    for row in range(1, 4):
        ledger.emit("a", flagged=row > 1, canonical=row == 1)
    assert len(ledger.take("a", 2)) == 2
    assert [ledger.verdict(row, True) for row in before] == [Outcome.STALE] * 2


# -- sending


def test_only_settled_tokens_can_be_sent_and_never_unsent() -> None:
    ledger = opened(SPARSE_SPAN, 5, flagged=[4])
    with pytest.raises(ValueError, match="3 are settled"):
        ledger.mark_sent("a", 4)
    ledger.mark_sent("a", 3)
    ledger.mark_sent("a", 3)
    with pytest.raises(ValueError, match="3 are, 3 are settled"):
        ledger.mark_sent("a", 2)
    assert ledger.sent("a") == 3


# -- retraction


@pytest.mark.parametrize("kind", ALL)
def test_retract_keeps_what_is_settled_and_replay_wants_it(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 7, flagged=[3, 6])
    while 3 in ledger.wanted("a"):
        verify(ledger, 1)
    kept = 3 if kind == EXACT_SPAN else 5
    assert ledger.retract("a") == kept
    ledger.check_integrity()
    assert (ledger.emitted("a"), ledger.settled_length("a"), ledger.canonical("a")) == (
        kept,
        kept,
        0,
    )
    assert not ledger.pending("a")
    with pytest.raises(ValueError, match="not replayed"):
        ledger.emit("a", flagged=False)
    with pytest.raises(ValueError, match="not replayed"):
        ledger.stop("a")
    ledger.request_tail("a")
    assert not ledger.pending("a")  # no columns yet
    ledger.replay("a")
    assert list(ledger.wanted("a")) == list(range(2, kept + 1))
    assert (ledger.canonical("a"), ledger.settled_length("a")) == (1, kept)
    ledger.emit("a", flagged=True)
    assert ledger.settled_length("a") == kept
    ledger.mark_sent("a", 2)
    outcomes = verify(ledger, 9, differs=[2, 3])
    assert outcomes[:2] == [Outcome.MISSED, Outcome.FLIP]
    assert (ledger.emitted("a"), ledger.settled_length("a")) == (3, 3)


@pytest.mark.parametrize("kind", ALL)
def test_retract_twice_and_with_nothing_settled(kind: tuple[str, str]) -> None:
    ledger = opened(kind, 3, flagged=[2])
    kept = ledger.retract("a")
    assert (ledger.retract("a"), kept) == (1, 1)
    ledger.replay("a")
    ledger.replay("a")
    assert (ledger.emit("a", flagged=False), ledger.canonical("a")) == (2, 1)
    ledger.open("b")
    ledger.emit("b", flagged=True)
    assert ledger.retract("b") == 0
    ledger.replay("b")  # nothing was kept: nothing to replay
    assert ledger.emit("b", flagged=True, canonical=True) == 1
    ledger.check_integrity()


def test_check_integrity_says_what_is_broken() -> None:
    ledger = opened(SPARSE_SPAN, 3, flagged=[3])
    ledger._accounts["a"].sent = 3
    with pytest.raises(AssertionError, match="'a': sent, settled, emitted in order"):
        ledger.check_integrity()
