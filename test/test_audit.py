"""Audits: what is chosen, kept and dropped, and how a prompt is cut for a replay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from audited_server import recorded
from hypothesis import given
from hypothesis import strategies as st

from margingate.config import GateConfig, GateError
from margingate.core.audit import MOST_STARTS, Audits, grid, pieces

# The choice


@given(st.text(), st.floats(0, 1), st.integers(0, 1 << 30))
def test_the_choice_is_a_function_of_id_and_seed(rid, rate, seed):
    audits = Audits(rate, seed)
    first = audits.chooses(rid)
    audits.compared(9, mismatch=True)
    assert audits.chooses(rid) == first == Audits(rate, seed).chooses(rid)
    assert Audits(1.0, seed).chooses(rid) and not Audits(0.0, seed).chooses(rid)


@given(st.text(), st.integers(0, 1 << 30), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_rate_chooses_all_that_a_lower_one_does(rid, seed, one, other):
    low, high = sorted((one, other))
    assert Audits(low, seed).chooses(rid) <= Audits(high, seed).chooses(rid)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_the_rate_is_the_share_that_is_chosen(rate):
    chosen = sum(Audits(rate, 3).chooses(f"request-{i}") for i in range(20_000))
    assert chosen == pytest.approx(20_000 * rate, rel=0.15)


# The queue


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "take", "interrupt"]), st.integers(2, 60), st.integers(0, 1))
)


@given(STEPS, st.integers(1, 100))
def test_the_queue_is_bounded_and_nothing_is_lost_uncounted(steps, most):
    audits, added, running = Audits(1.0, most_tokens=most), 0, []
    for action, size, generation in steps:
        if action == "add":
            audits.add(recorded(f"{added}", size, generation))
            added += 1
        elif action == "take" and (taken := audits.take(generation)) is not None:
            assert taken.generation == generation
            running.append(taken)
        elif action == "interrupt" and running:
            audits.interrupted(running.pop())
        kept = sum(each.size for each in audits._waiting)
        assert audits._size == kept and (kept <= most or audits.waiting == 1)
        assert added == audits.waiting + audits.dropped + len(running)


def test_the_oldest_goes_first_and_is_dropped_first():
    audits = Audits(1.0, most_tokens=6)
    for rid in ("a", "b", "c"):
        audits.add(recorded(rid))
    assert (audits.waiting, audits.dropped) == (2, 1)
    assert audits.take(0) == recorded("b")


def test_a_replay_that_is_interrupted_again_and_again_is_given_up():
    audits = Audits(1.0)
    audits.add(recorded())
    starts = 0
    while (taken := audits.take(0)) is not None:
        starts += 1
        audits.interrupted(taken)
    assert (starts, audits.dropped, audits.audited) == (MOST_STARTS, 1, 0)


# How the prompt of a replay is cut


@given(st.text(), st.integers(1, 3000), st.integers(1, 3000))
def test_the_pieces_are_the_prompt_and_no_forward_is_too_large(name, length, most):
    found = pieces(name, length, most)
    assert [piece.start for piece in found] == [0, *(piece.end for piece in found[:-1])]
    assert found[-1].end == length and (len(found) > 1 or length == 1)
    for piece in found:
        assert 1 <= piece.end - piece.start <= piece.end - piece.start + piece.others <= most
    assert found == pieces(name, length, most)


def test_the_pieces_are_the_same_in_each_process_and_others_for_each_request():
    found = [(p.start, p.end, p.others) for p in pieces("a", 300, 256)]
    assert found == [(0, 129, 91), (129, 212, 70), (212, 300, 63)]
    sizes = {pieces(f"request-{i}", 300, 256)[0].end for i in range(100)}
    assert len(sizes) > 60, "row counts hardly differ"


def test_the_grid_is_cut_where_the_gate_cuts():
    assert [(p.start, p.end, p.others) for p in grid(9, 4)] == [(0, 4, 0), (4, 8, 0), (8, 9, 0)]
    assert [(p.start, p.end) for p in grid(8, 4)] == [(0, 4), (4, 8)]


def test_any_request_id_is_chosen_or_not():
    audits = [Audits(0.5, seed) for seed in range(64)]
    assert 10 < sum(each.chooses("job-\ud800") for each in audits) < 54


# The option


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), True, None, [1]])
def test_a_rate_is_a_share(value):
    with pytest.raises(GateError, match=r"--gate-audit-rate is .*: give a number from 0 to 1"):
        GateConfig(audit_rate=value)


def test_where_nothing_is_gated_there_is_nothing_to_audit():
    assert GateConfig(policy="observe").audit_rate == 0
    with pytest.raises(GateError, match="observe gates none: drop one of the two"):
        GateConfig(policy="observe", audit_rate=0.5)


def test_several_ranks_are_refused():
    from margingate.runtime.start.refusals import refuse_audit

    refuse_audit(SimpleNamespace(tp_size=2), GateConfig())
    refuse_audit(SimpleNamespace(tp_size=1), GateConfig(audit_rate=1.0))
    with pytest.raises(GateError, match="but --tp-size is 2, and"):
        refuse_audit(SimpleNamespace(tp_size=2), GateConfig(audit_rate=1.0))
