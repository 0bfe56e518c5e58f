"""Row classes: which row counts an operator may be called with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources

from margingate.config import GateError
from margingate.core.rowclass import (
    MOST_PADDED,
    Call,
    NoPlanError,
    Route,
    RowPlan,
    Times,
    choose,
    reach,
    runs,
    spans,
    timed_counts,
)
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.probe import execute, plans, startup
from margingate.runtime.probe.capped import large_enough
from margingate.runtime.probe.classes import (
    RowDependenceError,
    extended,
    groups,
    prefill_counts,
    probe_operator,
    row_counts,
)
from margingate.runtime.probe.operators import HEAD, Head, Linear, MadeUp, Run


def kept(low: int, high: int, **more: Any) -> RowPlan:
    """All counts from `low` to `high` were measured, and are in one class."""
    return RowPlan(((low, high),), **more)


def of(classes: dict[int, int], key: int, **more: Any) -> RowPlan:
    """The measured counts of a class."""
    return RowPlan(spans(count for count in classes if classes[count] == key), **more)


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
        most, key = reach(classes), classes[max(measured)]
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
    assert reach(late) == 191
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
    assert reach(steady) == 128 and reach(dict.fromkeys((1, 8, 64), 0)) == 63


def test_a_way_that_leaves_calls_as_they_are_needs_all_counts_since_the_last_one():
    """The kernel was timed at 8 and 16, and has other bits at 11."""
    joins = [count for count in JOINS if count != 11]
    plan = choose(WIDE, Times(OPERATOR, SOONER, joins), to_the_top=True)
    made = {n: plan.calls(n)[0][2:] for n in (8, 9, 11, 16)}
    assert made == {8: (8, True), **dict.fromkeys((9, 11), (16, True)), 16: (16, True)}


WEIGHT = torch.randn(512, 40, generator=torch.Generator().manual_seed(1)).bfloat16()


def split_by_count(x: torch.Tensor) -> torch.Tensor:
    """Reduces in two halves from 9 rows on, as a GEMM might.

    In float64, rounded: a CPU's own product of BF16 may depend on the row count.
    """
    x, weight = x.double(), WEIGHT.double()
    if x.shape[0] <= 8:
        return (x @ weight.T).bfloat16()
    return (x[:, :20] @ weight[:, :20].T).bfloat16() + (x[:, 20:] @ weight[:, 20:].T).bfloat16()


def made_up(function: Run) -> MadeUp:
    return MadeUp("made up", None, function=function, width=WEIGHT.shape[1], like=WEIGHT)


def leaky(x: torch.Tensor) -> torch.Tensor:
    """A row's result depends on its neighbours, through the largest value of the whole call."""
    return x @ WEIGHT.T + x.abs().max() / 8


def test_the_probe_separates_the_classes():
    classes = probe_operator(made_up(split_by_count), row_counts(32))
    assert {count for count, key in classes.items() if key == 0} == set(range(1, 9))
    assert choose(classes).high in (8, 32)


def test_the_probe_says_no_to_a_row_that_depends_on_its_neighbours():
    with pytest.raises(RowDependenceError) as caught:
        probe_operator(made_up(leaky), row_counts(16))
    assert caught.value.rows > 1


class Broken(torch.nn.Module):
    """A model whose only linear layer leaks between rows."""

    def __init__(self) -> None:
        super().__init__()
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        class Leaky(UnquantizedLinearMethod):
            def apply(self, layer, x, bias=None):
                return leaky(x)

        self.down_proj = torch.nn.Module()
        self.down_proj.weight = torch.nn.Parameter(WEIGHT, requires_grad=False)
        self.down_proj.quant_method = Leaky()


def test_a_model_with_such_a_layer_is_refused_by_name():
    with pytest.raises(GateError, match=r"cannot use down_proj: with \d+ rows"):
        plans.probe_groups(groups(Broken()), 16)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 40])
def test_pieces_and_padding_keep_the_bits(rows):
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    one_by_one = torch.cat([split_by_count(row[None]) for row in x])
    assert torch.equal(execute.run_in_class(kept(1, 8), x, split_by_count), one_by_one)
    nine = torch.cat([split_by_count(row.expand(9, -1))[:1] for row in x])
    assert torch.equal(execute.run_in_class(kept(9, 64), x, split_by_count), nine)


def test_routes_take_kernel_or_operator_padded_or_not():
    routes = (Route(2, kernel=True), Route(4, kernel=True, padded=6), Route(7, False, padded=8))
    plan, made = kept(8, 16, routes=routes), []

    def called(name):
        def call(x):
            made.append((name, len(x)))
            return x + 1

        return call

    for rows in (1, 2, 3, 4, 5, 7, 8, 16, 20):
        x = torch.randn(rows, 3)
        found = execute.run_in_class(plan, x, called("operator"), called("kernel"))
        assert torch.equal(found, x + 1)
    assert made == [
        *(("kernel", n) for n in (1, 2, 6, 6)),
        *(("operator", n) for n in (8, 8, 8, 16, 10, 10)),
    ]


def in_order(x: torch.Tensor) -> torch.Tensor:
    """As if it reduced in one order: in float64 the order is lost in rounding."""
    return (x.double() @ WEIGHT.double().T).to(x.dtype)


def test_larger_counts_are_in_a_class_with_their_bits_or_in_a_new_one():
    classes = {1: 0, 4: 0, 8: 0}
    counts = [100, 257, 300]
    assert extended(made_up(in_order), classes, counts) == dict.fromkeys(
        (1, 4, 8, 100, 257, 300), 0
    )
    found = extended(made_up(split_by_count), classes, counts)
    assert found == {**classes, 100: 1, 257: 1, 300: 1}
    assert classes == {1: 0, 4: 0, 8: 0}

    def breaks(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) if x.shape[0] <= 256 else in_order(x) + 1

    found = extended(made_up(breaks), {1: 0, 2: 0, 8: 0}, counts)
    assert found == {1: 0, 2: 0, 8: 0, 100: 0, 257: 1, 300: 1}
    # A hole at the largest small count is no reason to leave the others' class.
    holed = {count: int(count == 16) for count in range(1, 17)}

    def at_16(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + (len(x) == 16)

    assert extended(made_up(at_16), holed, [100, 257]) == {**holed, 100: 0, 257: 0}


def test_a_block_or_a_rest_that_differs_is_seen():
    """Rows repeat in blocks of the largest count: each block is compared, and the rest too."""
    for row in (0, 9, 16, 18):

        def spoils(x: torch.Tensor, row: int = row) -> torch.Tensor:
            out = in_order(x)
            if len(out) > row and len(out) > 8:
                out[row] += 1
            return out

        assert extended(made_up(spoils), {1: 0, 8: 0}, [19])[19] == 1, row


def test_rows_that_depend_on_their_neighbours_are_in_no_class_of_smaller_calls():
    """On repeated rows only a call with others beside them shows it, hence the sum."""

    def summed(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + x.sum() / 8

    assert extended(made_up(summed), {1: 0, 8: 0}, [24])[24] == 1


@dataclass(frozen=True)
class Computed(Linear):
    """A linear layer whose results are a function's."""

    function: Run = split_by_count

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.function(inputs)


def layers_of(function: Run) -> list[Linear]:
    layers = [SimpleNamespace(weight=WEIGHT) for _ in range(2)]
    return [Computed("down_proj", layer, function=function) for layer in layers]


def plan_of(operator, classes, wide):
    return plans.plan_of(layers_of(operator), classes, wide)


SMALL = {count: int(count > 8) for count in row_counts(32)}
ONE = dict.fromkeys(SMALL, 0)


def test_plans_on_a_cpu_hold_for_prefill_where_the_last_class_does():
    assert plan_of(split_by_count, ONE, None) == (kept(1, 32), False)
    assert plan_of(split_by_count, SMALL, None) == (kept(9, 32), False), "prefill is not asked"
    assert plan_of(split_by_count, ONE, {**ONE, 512: 0}) == (of({**ONE, 512: 0}, 0), True)
    wide = {**SMALL, 512: 1}
    assert plan_of(split_by_count, SMALL, wide) == (of(wide, 1), True)
    # Nothing holds to the top: decode is planned by itself.
    late = dict.fromkeys(row_counts(128), 0)
    assert plan_of(split_by_count, late, {**late, 512: 1, 640: 1}) == (kept(1, 128), False)
    late = {count: int(count > 8) for count in late}
    assert plan_of(split_by_count, late, {**late, 512: 2}) == (kept(9, 128), False)


@pytest.fixture
def timed(monkeypatch):
    """Times that no GPU took: the kernel's calls are the faster ones."""
    taken = []

    def microseconds(operators, counts):
        assert len(operators) == 2, "each layer takes its turn"
        own = isinstance(operators[0], MadeUp)
        taken.append((own, tuple(counts)))
        return dict.fromkeys(counts, 10.0 if own else 30.0)

    monkeypatch.setattr(plans, "_microseconds", microseconds)
    monkeypatch.setattr(plans, "_is_timed", lambda _: True)
    return taken


@pytest.fixture
def kernel(monkeypatch):
    """Has the batch-invariant kernel be another one."""

    def use(operator):
        def invariant_matmul(x, *, weight, bias):
            return operator(x)

        monkeypatch.setattr(plans, "invariant_matmul", invariant_matmul)

    return use


def test_a_capped_layer_is_kept_to_a_class_in_which_prompts_can_run(monkeypatch):
    """As Marlin's: few rows have a class of their own, in which small calls are the faster ones."""

    @dataclass(frozen=True)
    class Capped(MadeUp):
        is_capped = True

    def microseconds(_, counts):
        return {count: 5.0 if count <= 16 else 12.0 for count in counts}

    monkeypatch.setattr(plans, "_microseconds", microseconds)
    monkeypatch.setattr(plans, "_is_timed", lambda _: True)
    classes = {count: int(count > 16) for count in range(1, 65)}
    capped = Capped("o", torch.nn.Identity(), function=in_order, width=4, like=None)
    assert plans.plan_of([capped], classes, classes) == (kept(17, 64), True)
    few = {count: 0 for count in range(1, 17)}
    assert plans.plan_of([capped], few, few) == (kept(1, 16), True), "nothing else is there"
    assert large_enough(few) == few and set(large_enough(classes).values()) == {1}


def test_the_largest_step_decides_on_the_class_of_a_capped_layer_that_only_decodes(monkeypatch):
    """As Marlin's beside unpacked prefills: a step of more rows than a class has runs in pieces."""

    @dataclass(frozen=True)
    class Decoded(MadeUp):
        is_capped, sees_prefill = True, False

    def microseconds(_, counts):
        return {n: 5.0 if n <= 16 else 7.5 * max(n / 64, 1) for n in counts}

    monkeypatch.setattr(plans, "_microseconds", microseconds)
    monkeypatch.setattr(plans, "_is_timed", lambda _: True)
    classes = {count: int(count > 16) for count in range(1, 65)}
    decoded = Decoded("o", torch.nn.Identity(), function=in_order, width=4, like=None)
    for busiest, plan in (
        (8, kept(1, 16)),
        (16, kept(1, 16)),
        (32, kept(1, 16)),
        (48, kept(17, 64)),
    ):
        assert plans.plan_of([decoded], classes, None, busiest) == (plan, False), busiest
    assert plans.plan_of([decoded], classes, None) == (kept(17, 64), False)


LATE = {count: int(count > 8) for count in row_counts(128)}


@pytest.mark.parametrize("kernel_is_in_order", [True, False])
def test_plans_on_a_gpu_are_timed_and_the_kernel_is_probed(kernel_is_in_order, timed, kernel):
    kernel(in_order if kernel_is_in_order else split_by_count)
    wide = {**LATE, 512: 2, 640: 2}
    found = plans.plan_of(layers_of(split_by_count), LATE, wide)
    if kernel_is_in_order:
        assert found == (kept(1, 640, batch_invariant=True), True)
        assert [own for own, _ in timed] == [True, False]
    else:
        assert found == (kept(9, 128), False), "as if there were no kernel"
        assert not any(own for own, _ in timed)


@pytest.mark.parametrize("steady", [True, False])
def test_a_kernel_with_the_bits_of_the_last_class_joins_it(steady, timed, kernel, monkeypatch):
    kernel(in_order)
    monkeypatch.setattr(plans, "is_deep_gemm", lambda _: True)

    def operator(x):
        return in_order(x) + float(not steady and len(x) <= 8)

    classes = dict.fromkeys(LATE, 0) if steady else LATE
    wide = {**classes, 512: classes[128], 640: classes[128]}
    same = layers_of(operator)
    low = 1 if steady else 9
    joined = of(wide, classes[128], routes=(Route(128, kernel=True),))
    assert joined.low == low
    assert plans.plan_of(same, classes, wide) == (joined, True)
    (by_own, counts), (_, more) = timed
    assert by_own and max(counts) == 128 == joined.by_kernel and max(more) == 256
    assert plans._tried(same[0], wide) == 128
    # A bias is added to results that are rounded, so such a layer's bits are others; and the
    # kernel of lm_head is not worth a start's time.
    same[0].module.bias = torch.zeros(len(WEIGHT))
    head = Head(HEAD, SimpleNamespace(weight=WEIGHT))
    for member in (same[0], head):
        assert plans._tried(member, wide) == (0 if steady else 640)
    found = plans.plan_of(same, classes, wide)[0]
    assert found == (of(wide, 0) if steady else kept(1, 640, batch_invariant=True))


def test_a_kernel_that_does_not_join_is_compiled_for_all_it_may_be_asked_for(
    timed, kernel, monkeypatch
):
    compiled = []
    kernel(lambda x: in_order(x) + 1)
    monkeypatch.setattr(plans, "is_deep_gemm", lambda _: True)
    monkeypatch.setattr(plans, "compile_ahead", compiled.extend)
    same, wide = layers_of(split_by_count), {**LATE, 512: 2, 640: 2}
    assert plans.plan_of(same, LATE, wide) == (kept(1, 640, batch_invariant=True), True)
    (weight, kernels), (again, others) = compiled
    assert weight is again is same[0].module.weight and kernels[-1] == 640
    assert not {*kernels} & {*others} and {*kernels, *others} >= {*wide}
    steady = dict.fromkeys(wide, 0)
    assert plans.plan_of(same, steady, steady) == (of(steady, 0), True)
    assert len(compiled) == 2


@pytest.mark.parametrize(
    "error",
    [RowDependenceError(3), RuntimeError("no nvcc"), OutOfResources(1, 2, "shared memory")],
)
def test_a_kernel_that_cannot_be_used_is_not_taken(error: Exception, timed, monkeypatch):
    def unusable(*_args: Any) -> bool:
        raise error

    monkeypatch.setattr(plans, "_in_one_class", unusable)
    same = layers_of(split_by_count)
    assert plans.plan_of(same, SMALL, None)[0].batch_invariant is False


def settled(monkeypatch, kernel: Run, plan: RowPlan, decoded: int = 256):
    """Whether it holds, and the row counts that the kernel was called with."""
    made: list[int] = []

    def invariant_matmul(x, *, weight, bias):
        made.append(len(x))
        return kernel(x)

    monkeypatch.setattr(plans, "invariant_matmul", invariant_matmul)
    layers = [Layer() for _ in range(3)]
    same = [Computed("o_proj", layer) for layer in layers[:2]]
    other = [Computed("qkv_proj", layers[2])]
    planned = {id(layers[0]): plan, id(layers[1]): plan, id(layers[2]): kept(1, 256)}
    return plans.settle_kernels({"a": same, "b": other}, planned, decoded), made


def test_kernels_are_compiled_for_what_their_plan_reaches_and_no_more(monkeypatch):
    holds, made = settled(monkeypatch, in_order, kept(1, 256, batch_invariant=True))
    assert holds and made == [1, 16, 17, 33, 49, 65, 129, 193, 256]
    holds, made = settled(monkeypatch, in_order, kept(1, 1000, batch_invariant=True))
    assert holds and max(made) == 1000 and {321, 961}.issubset(made)
    assert settled(monkeypatch, in_order, kept(1, 8, batch_invariant=True))[1] == [1, 8]
    assert settled(monkeypatch, in_order, kept(9, 256)) == (True, []), "not planned"


def test_a_kernel_with_other_bits_in_prefill_costs_the_shared_prefill_alone(monkeypatch):
    def late(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + (len(x) > 512)

    def crowded(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + in_order(x.flip(0))

    plan = kept(1, 1000, batch_invariant=True)
    assert not settled(monkeypatch, late, plan)[0] and not settled(monkeypatch, crowded, plan)[0]
    decode_only = kept(1, 256, batch_invariant=True)
    assert settled(monkeypatch, late, decode_only)[0]
    assert settled(monkeypatch, crowded, decode_only)[0], "the check of the whole model sees to it"


def test_a_kernel_that_does_not_run_says_so(monkeypatch):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DeepGEMM failed: no nvcc\n  at file.cpp:7")

    with pytest.raises(
        GateError, match=r"run o_proj by .* \(DeepGEMM failed: no nvcc\): start once"
    ):
        settled(monkeypatch, broken, kept(1, 256, batch_invariant=True))


# -- calls of more rows than were planned for


class Layer:
    def __init__(self) -> None:
        self.weight = WEIGHT


@pytest.fixture
def calls(monkeypatch):
    """A linear method, and the plans of a process of its own; the row counts it is called with."""
    monkeypatch.setattr(execute, "_plans", {})
    monkeypatch.setattr(execute, "_limit", 64)
    return []


def apply(calls, layer, rows):
    def original(_method, _layer, x, _bias):
        calls.append(len(x))
        return split_by_count(x)

    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = execute.apply_linear(original, None, layer, x)
    head = execute.compute_lm_head(
        lambda _p, hidden, lm_head, bias, **_: original(None, lm_head, hidden, bias), None, x, layer
    )
    assert torch.equal(found, head) and len(calls) % 2 == 0
    half = len(calls) // 2
    assert calls[:half] == calls[half:]
    made, calls[:] = calls[:half], []
    return x, found, made


def test_lm_head_is_handed_the_buffer_where_the_whole_forward_fits_the_plan(calls):
    """A result that is not the buffer is copied there by SGLang."""
    head, buffer = Layer(), torch.zeros(9, 24)
    execute._plans[id(head)] = kept(9, 32)
    given = []

    def original(_processor, hidden, _head, _bias, *, out=None):
        given.append((len(hidden), out))
        return split_by_count(hidden) if out is None else out

    def logits(rows, out):
        hidden = torch.randn(rows, 40).bfloat16()
        return execute.compute_lm_head(original, None, hidden, head, out=out)

    assert logits(9, buffer) is buffer and given.pop() == (9, buffer)
    assert logits(5, buffer) is not buffer and given.pop() == (9, None)
    assert given == []


def test_calls_above_the_limit_are_left_alone_unless_plans_hold_for_prefill(calls, monkeypatch):
    layer = Layer()
    execute._plans[id(layer)] = kept(9, 32)
    assert not execute.covers_prefill()
    assert apply(calls, layer, 100)[2] == [100]
    assert apply(calls, layer, 64)[2] == [32, 32] and apply(calls, layer, 5)[2] == [9]
    monkeypatch.setattr(execute, "_limit", math.inf)
    assert execute.covers_prefill()
    x, found, made = apply(calls, layer, 100)
    assert made == [25, 25, 25, 25]
    expected = torch.cat([split_by_count(row.expand(9, -1))[:1] for row in x])
    assert torch.equal(found, expected) and apply(calls, layer, 32)[2] == [32]
    assert apply(calls, Layer(), 100)[2] == [100], "a layer without a plan"


def test_the_kernel_takes_calls_of_any_size(calls, monkeypatch):
    layer = Layer()
    execute._plans[id(layer)] = kept(1, 32, batch_invariant=True)
    monkeypatch.setattr(execute, "_limit", math.inf)
    monkeypatch.setattr(
        execute, "invariant_matmul", lambda x, *, weight, bias: in_order(x) + (bias or 0)
    )
    x, found, made = apply(calls, layer, 100)
    assert made == [] and torch.equal(found, in_order(x))


def test_prefill_is_probed_where_the_gates_attention_runs_and_prompts_may_share(monkeypatch):
    monkeypatch.setattr(ranks, "group", lambda: None)
    monkeypatch.setattr(startup, "_rows_in_memory", lambda _operators: 4096)
    graphs = SimpleNamespace(prefill=SimpleNamespace(bs=[4, 300, 5000]))
    args = SimpleNamespace(
        chunked_prefill_size=8192, max_prefill_tokens=16384, cuda_graph_config=graphs, dp_size=1
    )
    runner = SimpleNamespace(attn_backend=SimpleNamespace(margingate=object()), server_args=args)
    config = SimpleNamespace(prefill="auto")
    counts = startup._prefill_counts
    assert counts(runner, config, {}, 256) == prefill_counts(256, 4096, [300])
    assert 300 in counts(runner, config, {}, 256)
    monkeypatch.setattr(startup, "_rows_in_memory", lambda _operators: 1 << 30)
    assert max(counts(runner, config, {}, 256)) == 8192
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "of_all", lambda rows: [rows, 2048])
        assert max(counts(runner, config, {}, 256)) == 2048, "what the rank with least room has"
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "of_all", lambda _args, _name, rows: [rows, 1024])
        assert max(counts(runner, config, {}, 256)) == 1024, "and the replica"
    args.chunked_prefill_size = -1
    assert max(counts(runner, config, {}, 256)) == startup.MOST_PREFILLED
    args.chunked_prefill_size = 64
    assert counts(runner, config, {}, 256) == [257], "no larger than what decode has anyway"
    assert counts(runner, SimpleNamespace(prefill="alone"), {}, 256) == []
    assert counts(runner, None, {}, 256) == []
    runner.attn_backend = object()
    assert counts(runner, config, {}, 256) == []
