"""Plans for the layers of a model: by classes, by times, and by the batch-invariant kernel."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from row_classes import WEIGHT, Layer, in_order, kept, of, split_by_count
from triton.runtime.errors import OutOfResources

from margingate.config import GateError
from margingate.core.rowclass import Route, RowPlan
from margingate.runtime.probe.measuring.classes import RowDependenceError, row_counts
from margingate.runtime.probe.operators.operator import HEAD, Head, Linear, MadeUp, Run
from margingate.runtime.probe.planning import invariant_kernel, plans
from margingate.runtime.probe.planning.capped import large_enough


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

    monkeypatch.setattr(plans, "microseconds", microseconds)
    monkeypatch.setattr(plans, "_is_timed", lambda _: True)
    return taken


@pytest.fixture
def kernel(monkeypatch):
    """Has the batch-invariant kernel be another one."""

    def use(operator):
        def invariant_matmul(x, *, weight, bias):
            return operator(x)

        monkeypatch.setattr(invariant_kernel, "invariant_matmul", invariant_matmul)

    return use


def test_a_capped_layer_is_kept_to_a_class_in_which_prompts_can_run(monkeypatch):
    """As Marlin's: few rows have a class of their own, in which small calls are the faster ones."""

    @dataclass(frozen=True)
    class Capped(MadeUp):
        is_capped = True

    def microseconds(_, counts):
        return {count: 5.0 if count <= 16 else 12.0 for count in counts}

    monkeypatch.setattr(plans, "microseconds", microseconds)
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

    monkeypatch.setattr(plans, "microseconds", microseconds)
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
    monkeypatch.setattr(invariant_kernel, "is_deep_gemm", lambda _: True)

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


@pytest.mark.parametrize("other_bits", [None, 240])
def test_a_kernel_joins_up_to_the_last_hole_among_the_steps_of_decode(
    other_bits, timed, kernel, monkeypatch
):
    """As an 8B model's down_proj has them on Hopper; a step of 256 rows is not padded to 512."""
    kernel(lambda x: in_order(x) + float(len(x) == other_bits))
    monkeypatch.setattr(invariant_kernel, "is_deep_gemm", lambda _: True)
    holes = {216, 224, 232, 240, 248, 256}
    classes = {count: int(count > 208 and count not in holes) for count in row_counts(256)}
    wide = {**classes, 288: 0, 512: 1, 1024: 1}

    def operator(x):
        return in_order(x) + float(wide[len(x)] == 0)

    plan, holds = plans.plan_of(layers_of(operator), classes, wide)
    assert holds and (plan.low, plan.high) == (209, 1024)
    assert plan.by_kernel == (256 if other_bits is None else 208)
    made = [plan.calls(rows)[0][2:] for rows in (8, 208, 240, 256, 288, 300)]
    steps = [(240, True), (256, True)] if other_bits is None else [(241, False), (512, False)]
    assert made == [(8, True), (208, True), *steps, (512, False), (512, False)]


def test_a_kernel_that_joins_is_chosen_by_all_calls_of_graphs_and_not_its_own_alone(
    kernel, monkeypatch
):
    """Up to 128 rows, where it makes the calls, the other class is the faster one."""
    kernel(in_order)
    monkeypatch.setattr(invariant_kernel, "is_deep_gemm", lambda _: True)
    monkeypatch.setattr(plans, "_is_timed", lambda _: True)

    def microseconds(operators, counts):
        return dict.fromkeys(counts, 11.5 if isinstance(operators[0], MadeUp) else 10.0)

    monkeypatch.setattr(plans, "microseconds", microseconds)
    classes = {count: int(count > 64) for count in row_counts(256)}
    wide = {**classes, 1024: 0, 4096: 1}

    def operator(x):
        return in_order(x) + float(wide[len(x)] == 0)

    plan, holds = plans.plan_of(layers_of(operator), classes, wide)
    assert holds and (plan.low, plan.high) == (65, 4096) and plan.by_kernel == 64


def test_a_kernel_that_does_not_join_is_compiled_for_all_it_may_be_asked_for(
    timed, kernel, monkeypatch
):
    compiled = []
    kernel(lambda x: in_order(x) + 1)
    monkeypatch.setattr(invariant_kernel, "is_deep_gemm", lambda _: True)
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

    monkeypatch.setattr(invariant_kernel, "in_one_class", unusable)
    same = layers_of(split_by_count)
    assert plans.plan_of(same, SMALL, None)[0].batch_invariant is False


def settled(monkeypatch, kernel: Run, plan: RowPlan, decoded: int = 256):
    """Whether it holds, and the row counts that the kernel was called with."""
    made: list[int] = []

    def invariant_matmul(x, *, weight, bias):
        made.append(len(x))
        return kernel(x)

    monkeypatch.setattr(invariant_kernel, "invariant_matmul", invariant_matmul)
    layers = [Layer() for _ in range(3)]
    same = [Computed("o_proj", layer) for layer in layers[:2]]
    other = [Computed("qkv_proj", layers[2])]
    planned = {id(layers[0]): plan, id(layers[1]): plan, id(layers[2]): kept(1, 256)}
    return invariant_kernel.settle_kernels({"a": same, "b": other}, planned, decoded), made


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
