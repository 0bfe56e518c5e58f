"""Mixtures of experts in the probe: made-up experts that depend on their company are all caught."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.moe.topk import TopK, TopKConfig

from margingate.config import GateError
from margingate.core.rowclass import Route, RowPlan
from margingate.runtime.compat.compute import routers
from margingate.runtime.compat.instance_patches import ON_SHARED_GATES
from margingate.runtime.probe import startup
from margingate.runtime.probe.measuring.classes import (
    Finding,
    extended,
    groups,
    probe_operator,
    row_counts,
)
from margingate.runtime.probe.operators import fused_gate
from margingate.runtime.probe.operators.observed_calls import ObservedRows, observed_rows, observing
from margingate.runtime.probe.operators.operator import Plain
from margingate.runtime.probe.operators.routed import Experts, Router, Rows, SharedGate
from margingate.runtime.probe.planning import execute, plans, shared_plans

HIDDEN, INNER, EXPERTS, CHOSEN = 16, 12, 8, 2
CPU = torch.device("cpu")
SEEN = ObservedRows(
    (
        *((HIDDEN, torch.float32), (CHOSEN, torch.float32)),
        *((CHOSEN, torch.int32), (EXPERTS, torch.float32)),
    ),
    CPU,
)
Extra = Callable[[torch.Tensor], torch.Tensor]  # ids [rows, k] -> what is added to each row


class MadeUpExperts:
    """Each expert multiplies by a number; `extra` is added to the rows."""

    def __init__(self, extra: Extra | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w13_weight = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)
        self.w2_weight = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)
        self.moe_runner_config = SimpleNamespace(activation="silu")
        self.quant_method = object()
        self.extra = extra
        self.called: list[int] = []

    def run_moe_core(self, dispatch_output: Any) -> Any:
        hidden, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        self.called.append(len(hidden))
        scale = (self.w2_weight[chosen.topk_ids.long(), 0, 0] * chosen.topk_weights).sum(1)
        result = hidden * scale[:, None]
        if self.extra is not None:
            result = result + self.extra(chosen.topk_ids)[:, None]
        hidden.zero_()  # as experts that work in place
        return SimpleNamespace(hidden_states=result)


def experts(extra: Extra | None = None) -> Experts:
    return Experts("experts", MadeUpExperts(extra), SEEN)


def fill(ids: torch.Tensor) -> torch.Tensor:
    """How many rows chose the first expert of each row, [rows]."""
    return (ids[:, None, :] == ids[:, 0][None, :, None]).any(-1).sum(0)


def shares(ids: torch.Tensor) -> torch.Tensor:
    """How many rows share both experts with each row."""
    same = (ids.sort(-1).values[:, None] == ids.sort(-1).values[None]).all(-1)
    return same.sum(-1)


def test_a_sample_has_rows_that_choose_at_random_together_and_alone():
    ids = experts().sample(64).parts[2]
    assert ids.dtype == torch.int32 and all(len(set(row)) == CHOSEN for row in ids.tolist())
    assert (ids == EXPERTS - 1).any(-1).nonzero().tolist() == [[3]], "one row alone"
    assert (ids[::4] == ids[0]).all() and len({tuple(row) for row in ids.tolist()}) > 10


def crowds_and_strangers(operator: Experts) -> Iterator[tuple[Rows, int, Rows, Rows]]:
    """A row of a sample, its place, and both kinds of its company, in which it stays as it is."""
    sample = operator.sample(64)
    for row, count in ((0, 2), (3, 5), (3, 64), (2, 700)):
        (crowd, place), (strangers, other) = operator.company(sample, row, count)
        assert len(crowd) == len(strangers) == count and place == other == row % count
        for part, of_crowd, of_strangers in zip(sample.parts, crowd.parts, strangers.parts):
            assert torch.equal(of_crowd[place], part[row])
            assert torch.equal(of_strangers[place], part[row])
        yield sample[row : row + 1], place, crowd, strangers


def test_company_is_a_crowd_or_strangers_and_the_row_itself_stays():
    for one, place, crowd, strangers in crowds_and_strangers(experts()):
        own = one.parts[2][0]
        assert (crowd.parts[2] == own).all()
        beside = torch.cat([strangers.parts[2][:place], strangers.parts[2][place + 1 :]])
        assert not set(beside.flatten().tolist()) & set(own.tolist())
        assert all(len(set(ids)) == CHOSEN for ids in beside.tolist())


def test_experts_that_leave_rows_alone_are_one_class_and_run_as_they_are():
    operator = experts()
    found = probe_operator(operator, row_counts(64))
    assert found == dict.fromkeys(range(1, 65), 0)
    assert extended(operator, found, [96, 500]) == {**found, 96: 0, 500: 0}


LEAKS: dict[str, Extra] = {
    "the number of rows of an expert": lambda ids: (fill(ids) > 1).float(),
    "neighbours that share both experts": lambda ids: (shares(ids) > 1).float(),
    "an expert that overflows at 3 rows": lambda ids: (fill(ids) == 3).float(),
    "an expert that overflows at 40 rows": lambda ids: (fill(ids) > 39).float(),
    "a row that is alone with its experts": lambda ids: (
        (fill(ids) == 1) & (len(ids) > 20)
    ).float(),
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_dependence_on_neighbours_caps_the_operator_below_it(what):
    operator = experts(LEAKS[what])
    found = probe_operator(operator, row_counts(64))
    first = {"an expert that overflows at 3 rows": 3, "an expert that overflows at 40 rows": 40}
    first |= {"a row that is alone with its experts": 21}
    assert max(found) == first.get(what, 2) - 1 and set(found) == set(range(1, max(found) + 1))
    plan, holds = plans.plan_of([operator], found, found)
    assert holds and plan.high == max(found), "more rows run in pieces, those of prefill too"


def test_a_rare_difference_in_a_full_expert_caps_the_operator():
    """As bfloat16 products on matrix tiles: a few rows differ where more than 32 are multiplied."""
    rare = MadeUpExperts()

    def run(dispatch_output: Any) -> Any:
        found = MadeUpExperts.run_moe_core(rare, dispatch_output)
        full = fill(dispatch_output.topk_output.topk_ids) > 32
        seldom = (found.hidden_states[:, 0] * 1000).long() % 9 == 0
        found.hidden_states += (full & seldom).float()[:, None]
        return found

    operator = Experts("experts", SimpleNamespace(**vars(rare), run_moe_core=run), SEEN)
    found = probe_operator(operator, row_counts(64))
    assert set(found) == set(range(1, 33)), "not 64, and no class of 33 to 64 rows"


@settings(max_examples=30)
@given(st.integers(17, 900))
def test_a_leak_that_only_prefill_shows_is_in_a_class_of_its_own(count):
    """Between two counts that are measured nothing runs: rows are padded up to the next one."""
    operator = experts(lambda ids: (fill(ids) == count).float())
    found = probe_operator(operator, row_counts(16))
    wide = extended(operator, found, sorted({count, 64 + count}))
    assert wide[count] != 0 and len(found) == 16
    plan, holds = plans.plan_of([operator], found, wide)
    assert holds and all(call.made != count for call in plan.calls(count))


@settings(max_examples=50)
@given(st.integers(1, 20), st.integers(1, 200))
def test_planned_experts_are_called_with_measured_counts_and_give_the_same_rows(high, rows):
    operator = experts(lambda ids: (fill(ids) > high).float())
    module = operator.module
    found = probe_operator(operator, row_counts(20))
    plan, _ = plans.plan_of([operator], found, found)
    sample = operator.sample(rows)
    alone = torch.cat([operator.run(sample[i : i + 1]) for i in range(rows)])
    module.called.clear()
    given = sample.clone()
    chosen = SimpleNamespace(
        topk_weights=given.parts[1], topk_ids=given.parts[2], router_logits=given.parts[3]
    )
    execute.keep_to({id(module): plan}, float("inf"))
    execute.redirect({"experts": [operator]}, {id(module): plan})
    dispatched = SimpleNamespace(hidden_states=given.parts[0], topk_output=chosen)
    result = module.run_moe_core(dispatch_output=dispatched).hidden_states
    assert torch.equal(result, alone) and set(module.called) <= set(found)


def test_rows_that_fill_a_call_up_ask_no_other_expert():
    rows = experts().sample(5)
    padded = rows.padded(9)
    assert len(padded) == 9 and all((part[5:] == part[0]).all() for part in padded.parts)
    assert torch.equal(padded.parts[2][:5], rows.parts[2])


class MadeUpRouter(torch.nn.Module):
    """The largest two of the logits, by a rule that may change with the number of rows."""

    def __init__(self, changes: int = 10**6) -> None:
        super().__init__()
        self.topk_config = TopKConfig(top_k=CHOSEN)
        self.changes = changes

    def forward(self, hidden: torch.Tensor, logits: torch.Tensor) -> Any:
        weights, ids = logits.softmax(-1).topk(CHOSEN)
        if len(logits) >= self.changes:
            weights = weights * (1 + 2**-20)
        return SimpleNamespace(topk_weights=weights, topk_ids=ids, router_logits=logits)


ROUTED = ObservedRows(((HIDDEN, torch.float32), (EXPERTS, torch.float32)), CPU)


def test_a_router_is_the_same_at_all_counts_or_ends_the_start():
    steady = Router("topk", MadeUpRouter(), ROUTED)
    (finding,) = plans.probe_groups({"r": [steady]}, 16, [32])
    assert finding.kind == "router" and finding.plan is None and finding.prefill
    assert finding.shape == (EXPERTS, CHOSEN)
    changing = Router("layers.3.topk", MadeUpRouter(9), ROUTED)
    with pytest.raises(
        GateError, match=r"cannot use layers\.3\.topk: it gives a row other results"
    ):
        plans.probe_groups({"r": [changing]}, 16)


def test_a_router_that_hides_its_choice_ends_the_start():
    class Hides(MadeUpRouter):
        def forward(self, hidden, logits):
            return (logits,)

    with pytest.raises(GateError, match=r"cannot measure topk, where a choice .* is a tuple: use"):
        Router("topk", Hides(), ROUTED).run(Router("topk", Hides(), ROUTED).sample(2))


def test_ranks_share_plans_and_a_layer_that_each_runs_whole_has_one_class_on_all():
    module = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
    operators = {"g": [Plain("gate", module)], "e": [experts()]}
    plan, faster = RowPlan(((1, 8),)), RowPlan(((1, 8),), routes=(Route(4, False, 8),))
    one = dict.fromkeys(range(1, 9), 0)
    own = [Finding(*each, one, faster, 0.1) for each in (("plain", "gate", (8, 16), 1), MOST)]
    first = [replace(finding, plan=plan, prefill_plan=faster) for finding in own]
    gathered = pickle.loads(pickle.dumps([first, own]))
    assert shared_plans.of_all_ranks(own, gathered, operators) == first
    split = {**one, 8: 1}
    apart = [first[0], replace(first[1], classes=split)]
    found = shared_plans.of_all_ranks(own, [apart, own], operators)
    assert found == [first[0], own[1]], "each rank has experts of its own"
    apart = [replace(first[0], classes=split), first[1]]
    with pytest.raises(GateError, match="cannot use gate with 2 ranks: it has other classes"):
        shared_plans.of_all_ranks(own, [apart, own], operators)


MOST = ("experts", "experts", (8, 24, 16, 2), 1)


def test_experts_without_a_router_that_a_step_calls_end_the_start():
    model = torch.nn.Module()
    known = {"e": [experts()], "r": [Router("topk", MadeUpRouter(), ROUTED)]}
    seen = {id(each.module): ROUTED for same in known.values() for each in same}
    startup.refuse_unknown(model, known, seen)
    with pytest.raises(GateError, match="how experts and others get their rows"):
        startup.refuse_unknown(model, {"e": known["e"]}, seen)


def test_half_of_a_routers_sample_saturates():
    scores = Router("topk", MadeUpRouter(), ROUTED).sample(64).parts[1]
    assert scores[1::2].std() > 8 * scores[::2].std()


def test_a_gate_whose_weight_moved_is_found_and_another_is_not_run():
    gate = torch.nn.Linear(HIDDEN, 1, bias=False)
    gates = {1: gate}
    assert execute._gate_of(gate.weight.squeeze(), gates) is gate
    with pytest.raises(RuntimeError, match="that was not measured at start"):
        execute._gate_of(torch.zeros(HIDDEN), gates)


def test_a_plain_layer_keeps_to_its_plan():
    module = torch.nn.Linear(HIDDEN, 1, bias=False)
    plain = Plain("gate", module)
    made: list[int] = []
    forward = module.forward
    module.forward = lambda x: (made.append(len(x)), forward(x))[1]
    plan = RowPlan(((4, 8),))
    execute.keep_to({id(module): plan}, 64.0)
    execute.redirect({"gate": [plain]}, {id(module): plan})
    x = torch.randn(19, HIDDEN)
    for rows, calls in ((1, [4]), (5, [5]), (19, [7, 7, 5]), (70, [70])):
        made.clear()
        found = module(x[:rows] if rows < 20 else torch.randn(rows, HIDDEN))
        assert made == calls and found.shape == (rows, 1)


def test_a_step_says_what_routers_and_experts_are_given(monkeypatch):
    hidden = torch.randn(3, HIDDEN)
    found = observed_rows("topk", (hidden, torch.randn(3, EXPERTS)), 3)
    assert found == ROUTED
    with pytest.raises(GateError, match=r"saw topk called with an input of shape \[2, 16\]"):
        observed_rows("topk", (hidden[:2],), 3)
    topk = TopK.__new__(TopK)
    torch.nn.Module.__init__(topk)
    topk.forward = lambda hidden, logits: None
    model = torch.nn.Module()
    model.topk = topk
    assert [name for name, _ in (*routers.routers(model), *routers.experts(model))] == ["topk"]
    with observing(model, 3) as seen:
        topk(hidden, torch.randn(3, EXPERTS))
    assert seen == {id(topk): ROUTED}


class Block(torch.nn.Module):
    """As Qwen's: its shared expert's gate is read by a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert_gate = torch.nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = hidden.clone()
        weight = self.shared_expert_gate.weight.squeeze()
        fused_gate.kernel()(hidden, weight, hidden * 2, result)
        return result


@pytest.mark.parametrize("leaves", [8, 10**6])
def test_a_gate_that_a_kernel_reads_is_measured_and_kept_by_the_kernel(leaves, monkeypatch):
    """With fewer than eight rows, this kernel has other bits."""
    made: list[int] = []

    def kernel(hidden, weight, shared, result):
        made.append(len(hidden))
        gate = (hidden.double() @ weight.double()).sigmoid()[:, None]
        result += (gate * shared).float() + 1e-3 * (len(hidden) < leaves)

    before = fused_gate.kernel()
    monkeypatch.setattr(f"sglang.srt.{ON_SHARED_GATES.owner}.{ON_SHARED_GATES.name}", kernel)
    model, x = Block(), torch.randn(3, HIDDEN)
    with torch.inference_mode(), observing(model, 3) as seen:
        model(x)
    (operators,) = groups(model, seen).values()
    (gate,) = operators
    assert isinstance(gate, SharedGate) and gate.module is model.shared_expert_gate
    assert fused_gate.kernel() is kernel, "put back"
    found = probe_operator(gate, row_counts(20))
    planned, _ = plans.plan_of(operators, found, None)
    assert planned.low == (8 if leaves == 8 else 1)
    execute.keep_to({id(gate.module): planned}, 64.0)
    execute.redirect({"gate": operators}, {id(gate.module): planned})
    made.clear()
    few = model(x)
    assert made == [8 if leaves == 8 else 3]
    assert torch.equal(few, model(torch.cat([x] * 5))[:3])
    weight = model.shared_expert_gate.weight
    weight.data = weight.data.clone()
    made.clear()
    assert torch.equal(model(x), few), "an update of weights moved it"
    assert made == [8 if leaves == 8 else 3] and before is not kernel
