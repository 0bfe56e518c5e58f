"""Row classes: which row counts an operator may be called with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_classes import kept, of

from margingate.core.rowclass import (
    MOST_PADDED,
    Call,
    NoPlanError,
    Route,
    RowPlan,
    Times,
    choose,
    choose_for_prefill,
    reaches,
    runs,
    spans,
    timed_counts,
)
from margingate.runtime.probe.measuring.classes import prefill_counts


@given(st.sets(st.integers(1, 200), min_size=1), st.integers(1, 700))
def test_calls_cover_every_row_once_and_all_have_a_measured_count(counts, rows):
    plan = RowPlan(spans(counts))
    calls = plan.calls(rows)
    assert [row for call in calls for row in range(call.start, call.stop)] == list(range(rows))
    assert all(call.made in counts and call.made >= call.stop - call.start for call in calls)
    assert plan.runs_as_is(rows) == (rows in counts)
    assert len(calls) <= -(-rows // max(counts))


# What an operator does at a row count, for each count: any function, with holes, whatever it is
# between two counts that were measured. Below 20 more often than not in one class.
ARBITRARY = st.lists(st.sampled_from((0, 0, 0, 1, 2)), min_size=130, max_size=130)


@given(
    ARBITRARY,
    ARBITRARY,
    st.sets(st.integers(1, 129), min_size=1),
    st.booleans(),
    st.sampled_from((None, 5.0, 60.0)),
    st.integers(1, 400),
)
def test_no_plan_calls_an_operator_in_a_way_that_was_not_measured(
    operator, kernel, measured, to_the_top, kernel_us, rows
):
    """Padded, in pieces and by routes alike: each call has the bits of the plan's class."""
    classes = {count: operator[count] for count in measured}
    times = None
    if kernel_us is not None:
        most, key = reaches(classes)[0], classes[max(measured)]
        joins = [n for n in measured if n <= most and kernel[n] == key]
        timed = {n: kernel_us + n % 3 for n in timed_counts(classes) if n in joins}
        operator_us = {n: 30.0 + n % 7 for n in timed_counts(classes) if n in measured}
        times = Times(operator_us or {max(measured): 1.0}, timed, joins) if timed else None
    try:
        plan = choose(classes, times, to_the_top=to_the_top)
    except NoPlanError:
        assert to_the_top
        return
    made = {kernel[call.made] if call.kernel else operator[call.made] for call in plan.calls(rows)}
    assert len(made) == 1 and made == {classes[plan.low]}
    assert all(call.made in measured for call in plan.calls(rows))
    if plan.runs_as_is(rows):
        assert rows in measured and operator[rows] == classes[plan.low]


def test_the_class_that_leaves_most_counts_alone_is_chosen():
    assert choose({1: 0, 8: 0, 64: 0}) == RowPlan(((1, 1), (8, 8), (64, 64)))
    assert choose({1: 0, 8: 0, 16: 0, 24: 1, 32: 1}) == RowPlan(((1, 1), (8, 8), (16, 16)))
    holes = {1: 0, 8: 1, 16: 1, 24: 1, 25: 2, 26: 1, 27: 1, 32: 0}
    assert choose(holes) == RowPlan(((8, 8), (16, 16), (24, 24), (26, 27)))
    assert runs({1: 0, 2: 0, 3: 1, 4: 0}) == [([1, 2], 0), ([3], 1), ([4], 0)]
    assert spans([7, 3, 1, 2, 2]) == ((1, 3), (7, 7))
    for bad in ((), ((3, 2),), ((0, 2),), ((4, 5), (1, 2))):
        with pytest.raises(ValueError, match="ascend from 1 up"):
            RowPlan(bad)


def test_the_holes_that_an_h100_has_are_padded_over():
    """down_proj of Qwen2.5-1.5B: other bits at 241 to 247, 249 to 255 and 264."""
    other = {*range(241, 248), *range(249, 256), 264}
    classes = {count: int(count in other) for count in [*range(1, 273), 288, 320]}
    plan = choose(classes, to_the_top=True)
    made = {rows: plan.calls(rows)[0].made for rows in (240, 241, 248, 250, 256, 264, 270, 300)}
    assert made == {
        240: 240, 241: 248, 248: 248, 250: 256, 256: 256, 264: 265, 270: 270, 300: 320,
    }  # fmt: skip
    assert not plan.runs_as_is(388) and not plan.runs_as_is(300) and plan.runs_as_is(288)
    assert [call.made for call in plan.calls(388)] == [194, 194]


CLASSES = {count: int(count > 64) for count in range(1, 257)}
FLAT = dict.fromkeys(timed_counts(CLASSES), 30.0)


def test_a_plan_that_is_clearly_faster_is_taken_instead():
    assert choose(CLASSES) == kept(65, 256)
    # A call in pieces takes twice the time; padding costs little.
    assert choose(CLASSES, Times(FLAT, None)) == kept(65, 256)
    slow_when_padded = {count: 10.0 if count <= 64 else 100.0 for count in FLAT}
    assert choose(CLASSES, Times(slow_when_padded, None)) == kept(1, 64)


def test_the_invariant_kernel_is_taken_where_it_is_clearly_faster():
    as_fast = {count: 0.9 * us for count, us in FLAT.items()}
    assert choose(CLASSES, Times(FLAT, as_fast)) == kept(1, 256, batch_invariant=True)
    slower = {count: 3 * us for count, us in FLAT.items()}
    assert choose(CLASSES, Times(FLAT, slower)) == kept(65, 256)
    assert choose(dict.fromkeys(CLASSES, 0), Times(FLAT, as_fast)) == kept(1, 256)
    assert not kept(1, 256, batch_invariant=True).runs_as_is(8)


def test_a_prefill_above_its_class_runs_in_large_pieces():
    """The router of gpt-oss-20b on an H200: other bits from 4,096 rows on."""
    counts = [*range(1, 257), *prefill_counts(256, 8192)]
    router = {count: int(count >= 4096) for count in counts}
    plan = choose(router, to_the_top=True)
    assert plan == of(router, 0) and plan.high == 4032
    pieces = plan.calls(8192)
    assert [call.made for call in pieces] == [2752, 2752, 2688] and pieces[-1].stop == 8192
    assert all(router[call.made] == 0 for call in pieces)
    largest = {count: int(count >= 48) for count in counts}  # that of the largest count, padded
    assert choose(largest, to_the_top=True) == of(largest, 1)
    either = {count: int(count >= 48 or count % 2) for count in (*range(1, 65), 1088, 8192)}
    either[1088] = 0
    fast = {count: 100.0 if either.get(count) else 10.0 for count in timed_counts(either)}
    assert choose(either, Times(fast, None), to_the_top=True) == of(either, 1), "no pieces"
    small = {count: int(count > 992) for count in counts}  # more small calls than large ones
    with pytest.raises(NoPlanError):
        choose(small, to_the_top=True)


WIDE = {count: int(count > 16) for count in (*range(1, 65), 512, 4096)}


def test_a_prefill_takes_the_class_of_its_largest_forward_or_the_kernel():
    assert choose(WIDE, to_the_top=True) == of(WIDE, 1)
    few = {count: int(count > 32) for count in (*range(1, 34), 64, 512)}
    assert choose(few) == kept(1, 32) and choose(few, to_the_top=True) == of(few, 1)
    steady = dict.fromkeys(WIDE, 3)
    assert choose(steady, to_the_top=True) == of(steady, 3)
    from_65 = {**dict.fromkeys(range(1, MOST_PADDED + 1), 0), 65: 1, 512: 1}
    split = {1: 0, 8: 1, 16: 0, 32: 1}  # a class that comes again is one class
    assert choose(split, to_the_top=True) == RowPlan(((8, 8), (32, 32)))
    with pytest.raises(NoPlanError):
        choose(from_65, to_the_top=True)
    times = dict.fromkeys(timed_counts(from_65), 30.0)
    with pytest.raises(NoPlanError):
        choose(from_65, Times(times, None), to_the_top=True)
    dear = {count: 9 * us for count, us in times.items()}
    assert choose(from_65, Times(times, dear), to_the_top=True) == kept(
        1, 512, batch_invariant=True
    )


@pytest.mark.parametrize(
    ("classes", "low"),
    [
        ({n: int(n > 64) for n in (*range(1, 257), 1024, 4096)}, 65),
        ({n: int(n > 300) for n in (*range(1, 257), 288, 320, 1024, 4096)}, 320),
        ({n: int(n > 600) for n in (*range(1, 257), 512, 608, 1024, 4096)}, None),
        ({n: n for n in (1, 2, 512, 4096)}, None),
        ({**dict.fromkeys(range(1, 65), 0), **dict.fromkeys((128, 1024), 1), 4096: 2}, 128),
    ],
)
def test_prefills_alone_may_pad_more_and_run_in_large_pieces(classes, low):
    plan = choose_for_prefill(classes)
    assert (plan and plan.low) == low
    if plan is not None:
        (call,) = plan.calls(3)
        assert (call.made, call.kernel) == (low, False) and not plan.by_kernel


def test_a_prefill_takes_the_kernel_too_where_it_is_clearly_faster():
    times = dict.fromkeys(timed_counts(WIDE), 30.0)
    little, less = dict.fromkeys(times, 32.0), dict.fromkeys(times, 20.0)
    assert choose(WIDE, Times(times, little), to_the_top=True) == of(WIDE, 1)
    assert choose(WIDE, Times(times, less), to_the_top=True) == kept(1, 4096, batch_invariant=True)


# -- the batch-invariant kernel with the bits of the operator's top class

OPERATOR = dict.fromkeys(timed_counts(WIDE), 30.0)
SOONER = dict.fromkeys((1, 8, 16), 28.0)
JOINS = range(1, 17)


def test_the_kernel_that_joins_makes_the_small_calls_and_the_operator_the_others():
    plan = choose(WIDE, Times(OPERATOR, SOONER, JOINS), to_the_top=True)
    assert plan == of(WIDE, 1, routes=(Route(16, kernel=True),))
    assert [plan.calls(n) for n in (1, 15, 16)] == [[Call(0, n, n, True)] for n in (1, 15, 16)]
    assert (
        plan.calls(17) == [Call(0, 17, 17, False)]
        and plan.runs_as_is(17)
        and not plan.runs_as_is(16)
    )
    assert plan.by_kernel == 16 and kept(32, 4096).by_kernel == 0
    assert str(plan) == (
        "kept to 50 row counts from 17 to 4096, up to 16 by the batch-invariant kernel with the "
        "same bits"
    )
    # What a class needs is made by whichever is faster, padding included.
    slow = dict.fromkeys(SOONER, 90.0)
    padded = choose(WIDE, Times(OPERATOR, slow, JOINS), to_the_top=True)
    assert [padded.calls(n)[0][2:] for n in (1, 16, 17)] == [(17, False)] * 3


def test_a_class_that_begins_late_is_no_hindrance_to_a_kernel_that_joins():
    late = {count: int(count > 191) for count in range(1, 257)}
    assert reaches(late) == [191]
    assert reaches({**late, 224: 0, 320: 0, 512: 1}) == [224, 191]
    kernel = {n: 25.0 for n in (*timed_counts(late), 191) if n <= 191}
    times = Times(dict.fromkeys(timed_counts(late), 30.0), kernel, range(1, 192))
    plan = choose(late, times)
    assert plan.low == 192 and plan.calls(160)[0].kernel and plan.runs_as_is(192)
    assert plan == choose(late, times, to_the_top=True)


def test_a_layer_in_one_class_is_left_alone_unless_the_kernel_is_clearly_faster():
    steady = dict.fromkeys(WIDE, 0)
    as_fast = dict.fromkeys(SOONER, 29.7)
    plain = of(steady, 0)
    assert choose(steady, Times(OPERATOR, as_fast, JOINS), to_the_top=True) == plain
    faster = {**as_fast, 8: 20.0, 16: 20.0}
    plan = choose(steady, Times(OPERATOR, faster, JOINS), to_the_top=True)
    expected = (Route(1, kernel=True, padded=8), Route(16, kernel=True))
    assert plan == of(steady, 0, routes=expected), "one row as 8: 22.5 with the copy"
    assert reaches(steady) == [128] and reaches(dict.fromkeys((1, 8, 64), 0)) == [63]


def test_a_way_that_leaves_calls_as_they_are_needs_all_counts_since_the_last_one():
    """The kernel was timed at 8 and 16, and has other bits at 11."""
    joins = [count for count in JOINS if count != 11]
    plan = choose(WIDE, Times(OPERATOR, SOONER, joins), to_the_top=True)
    made = {n: plan.calls(n)[0][2:] for n in (8, 9, 11, 16)}
    assert made == {8: (8, True), **dict.fromkeys((9, 11), (16, True)), 16: (16, True)}
