"""Experts in MXFP4: rows that are told by their scores, tiles of one height, and who is served."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.moe.topk import TopK, TopKConfig, TritonKernelTopKOutput
from sglang.srt.layers.quantization.mxfp4 import Mxfp4MoEMethod
from test_routed import crowds_and_strangers

from benchmark.models.mxfp4 import BLOCK, from_blocks, to_blocks
from margingate.config import GateError
from margingate.core.rowclass import Route, RowPlan
from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.host import mxfp4 as host_mxfp4
from margingate.runtime.observe import weight_digest
from margingate.runtime.probe import startup
from margingate.runtime.probe.measuring.classes import extended, groups, probe_operator, row_counts
from margingate.runtime.probe.operators import tile_heights
from margingate.runtime.probe.operators.observed_calls import ObservedRows, observed_rows, observing
from margingate.runtime.probe.operators.routed import Experts, Router, routed_operators
from margingate.runtime.probe.operators.scored import ScoredExperts, scored_operators
from margingate.runtime.probe.planning import execute, plans

HIDDEN, INNER, EXPERTS, CHOSEN = 32, 64, 8, 2
CPU, BF16 = torch.device("cpu"), torch.bfloat16
Extra = Callable[[torch.Tensor], torch.Tensor]  # ids [rows, k] -> what is added to each row


class Chooses(TopK):
    """SGLang's TopK as it is for triton_kernels, whose table is made by the host's operators."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.topk_config = TopKConfig(top_k=CHOSEN)

    def forward(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
        return TritonKernelTopKOutput(*host_mxfp4.routing(router_logits, CHOSEN))


Chooses.__name__ = "TopK"  # the probe goes by class names


def method(**attributes: Any) -> Any:
    """SGLang's, with made-up weights as they lie when they were loaded."""
    found = made_method(attributes)
    generator = torch.Generator().manual_seed(3)
    sizes = {"w13": (HIDDEN, 2 * INNER), "w2": (INNER, HIDDEN)}
    for name, size in sizes.items():
        weight = torch.randn(EXPERTS, *size, generator=generator)
        vars(found)[f"{name}_weight_triton_tensor"] = weight
        scales = torch.zeros(EXPERTS, size[1], size[0] // BLOCK, dtype=torch.uint8)
        config = SimpleNamespace(b_mx_scale=scales, b_microblock_size=BLOCK)
        vars(found)[f"{name}_precision_config"] = config
    vars(found).update(attributes)
    return found


def made_method(attributes: dict[str, Any]) -> Any:
    """SGLang's, whose constructor asks for a server."""
    found = object.__new__(Mxfp4MoEMethod)
    vars(found).update(attributes)
    return found


class MadeUpExperts(torch.nn.Module):
    """Each expert multiplies by a number; `extra` is added to the rows."""

    def __init__(self, extra: Extra | None = None) -> None:
        super().__init__()
        self.quant_method = method()
        self.moe_runner_config = SimpleNamespace(activation="silu")
        self.w13_weight_bias = torch.nn.Parameter(torch.zeros(EXPERTS, 2 * INNER))
        self.extra = extra
        self.called: list[int] = []

    def run_moe_core(self, dispatch_output: Any) -> Any:
        hidden, table = dispatch_output.hidden_states, dispatch_output.topk_output
        self.called.append(len(hidden))
        weights, ids = mxfp4.rows_of(table)
        factors = self.quant_method.w2_weight_triton_tensor[ids, 0, 0]
        result = hidden * (factors * weights).sum(1)[:, None]
        if self.extra is not None:
            result = result + self.extra(ids)[:, None]
        hidden.zero_()  # as experts that work in place
        return SimpleNamespace(hidden_states=result)


def seen_with(router: Any) -> ObservedRows:
    parts = ((HIDDEN, torch.float32), (EXPERTS, torch.float32))
    return ObservedRows(parts, CPU, router)


def experts(extra: Extra | None = None) -> ScoredExperts:
    return ScoredExperts("experts", MadeUpExperts(extra), seen_with(Chooses()))


# -- the numbers


def test_the_hosts_numbers_are_those_of_the_format():
    """Written down from the Open Compute Project's specification of MX formats, version 1.0."""
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    packed = torch.tensor([[lower | (15 - lower) << 4 for lower in range(16)]], dtype=torch.uint8)
    scales = torch.tensor([[128]], dtype=torch.uint8)  # two
    found = host_mxfp4.unpacked(packed, scales)[0]
    assert found[::2].tolist() == [2 * number for number in e2m1]
    assert found[1::2].tolist() == [2 * number for number in reversed(e2m1)]


@given(st.integers(0, 10**6), st.floats(-20, 20))
def test_a_weight_in_mxfp4_is_the_weight_within_its_rounding(seed, power):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2 * BLOCK, generator=generator) * 2.0**power
    blocks, scales = to_blocks(weight)
    found = from_blocks(blocks, scales)
    assert torch.equal(host_mxfp4.unpacked(blocks.flatten(-2), scales), found)
    largest = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    unit = torch.exp2(torch.floor(torch.log2(largest)) - 2).repeat_interleave(BLOCK, -1)
    # Half a step: a quarter of the unit up to two units, one unit from four on, and 6 is the last.
    sizes = weight.abs() / unit
    step = torch.where(sizes < 2, 0.25, torch.where(sizes < 4, 0.5, 1.0))
    step = torch.where(sizes > 7, 2.0, step) * unit
    assert ((found - weight).abs() <= step * 1.001).all()


@given(st.integers(1, 12))
def test_the_hosts_experts_are_those_of_transformers(rows):
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    theirs, generator = GptOssExperts(config).float().eval(), torch.Generator().manual_seed(rows)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    x, scores = (torch.randn(rows, size, generator=generator) for size in (HIDDEN, EXPERTS))
    values, ids = scores.topk(CHOSEN)
    weights = values.softmax(-1)
    sizes, sources, places, gates, k = host_mxfp4.routing(scores, CHOSEN)
    runner_input = SimpleNamespace(
        hidden_states=x,
        a_ragged_metadata=sizes,
        gather_indx=sources,
        scatter_indx=places,
        gate_scal=gates,
        n_expts_act=k,
    )
    info = SimpleNamespace(
        w13_weight=theirs.gate_up_proj.data,
        w2_weight=theirs.down_proj.data,
        w13_bias=theirs.gate_up_proj_bias.data,
        w2_bias=theirs.down_proj_bias.data,
    )
    core = SimpleNamespace(config=SimpleNamespace(gemm1_alpha=1.702, gemm1_clamp_limit=7.0))
    found = host_mxfp4.run_experts(core, runner_input, info, {}).hidden_states
    with torch.no_grad():
        expected = theirs(x, ids, weights).view(rows, HIDDEN)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sglangs_own_method_with_the_hosts_operators_computes_what_the_numbers_say(monkeypatch):
    """From empty parameters to results, as at a start and in a forward."""
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_kernels import TritonKernelsRunnerCore
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.utils import MoeRunnerBackend
    from sglang.srt.layers.quantization import mxfp4 as theirs
    from sglang.srt.runtime_context import get_flags

    monkeypatch.setattr(theirs, "_swizzle_mxfp4", host_mxfp4.swizzle)
    monkeypatch.setattr(TritonKernelsRunnerCore, "run", host_mxfp4.run_experts)
    monkeypatch.setattr(get_flags().moe, "runner_backend", MoeRunnerBackend.TRITON_KERNELS)
    off = ("use_flashinfer", "use_marlin", "use_deep_gemm", "use_mega_moe", "with_bias")
    chosen = {"_fi_kernel": None, "use_triton_kernels": True}
    found = made_method(dict.fromkeys(off, False) | chosen)
    layer, inner = torch.nn.Module(), 32
    vars(layer).update(num_local_experts=EXPERTS, hidden_size=HIDDEN, moe_ep_size=1)
    found.create_weights(layer, EXPERTS, HIDDEN, inner, BF16, with_bias=True)
    generator, numbers = torch.Generator().manual_seed(5), {}
    for name, size in {"w13": (2 * inner, HIDDEN), "w2": (HIDDEN, inner)}.items():
        drawn = torch.randn(EXPERTS, *size, generator=generator) * size[1] ** -0.5
        blocks, scales = to_blocks(drawn)
        numbers[name] = from_blocks(blocks, scales)
        for kind, part in (("weight", blocks.flatten(-2)), ("weight_scale", scales)):
            getattr(layer, f"{name}_{kind}").data[:, : size[0], : part.shape[2]] = part
    layer.quant_method, layer.moe_runner_config = (
        found,
        MoeRunnerConfig(
            activation="silu", gemm1_alpha=1.702, gemm1_clamp_limit=7.0, params_dtype=BF16
        ),
    )
    found.create_moe_runner(layer, layer.moe_runner_config)
    found.process_weights_after_loading(layer)
    assert mxfp4.are_experts(layer) and not mxfp4.are_widened(layer)
    assert mxfp4.shapes(layer) == ([EXPERTS, HIDDEN, 128], [EXPERTS, 64, HIDDEN])
    x = torch.randn(9, HIDDEN, generator=generator).to(BF16)
    table = Chooses()(x, torch.randn(9, EXPERTS, generator=generator).to(BF16))
    result = found.apply(layer, StandardDispatchOutput(x, None, table)).hidden_states
    weights, ids = (part.tolist() for part in mxfp4.rows_of(table))
    for row, expected in enumerate(result.float()):
        total = torch.zeros(HIDDEN)
        for weight, expert in zip(weights[row], ids[row]):
            both = numbers["w13"][expert] @ x[row].float()
            gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
            gated = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            total += weight * (numbers["w2"][expert] @ gated)
        torch.testing.assert_close(expected, total, rtol=0.02, atol=0.02)


@given(st.integers(1, 40), st.booleans())
def test_a_tables_rows_are_the_choices_that_it_was_made_of(rows, tied):
    scores = torch.randn(rows, EXPERTS, generator=torch.Generator().manual_seed(rows))
    if tied:
        scores = scores.round()
    table = TritonKernelTopKOutput(*host_mxfp4.routing(scores, CHOSEN))
    assert mxfp4.is_table(table) and not mxfp4.is_table(SimpleNamespace(topk_ids=scores))
    weights, ids = mxfp4.rows_of(table)
    for row, chosen, weight in zip(scores, ids, weights, strict=True):
        best = sorted(range(EXPERTS), key=lambda expert: (-row[expert].item(), expert))[:CHOSEN]
        assert chosen.tolist() == best
        torch.testing.assert_close(weight, row[best].softmax(-1))
    kept = mxfp4.with_scores(table, scores)
    assert isinstance(kept, TritonKernelTopKOutput) and mxfp4.scores_of(kept) is scores
    assert all(one is other for one, other in zip(kept, table, strict=True))
    with pytest.raises(RuntimeError, match="a choice that was not measured at start"):
        mxfp4.scores_of(table)


# -- the operator


def fill(ids: torch.Tensor) -> torch.Tensor:
    """How many rows chose the first expert of each row, [rows]."""
    return (ids[:, None, :] == ids[:, 0][None, :, None]).any(-1).sum(0)


def test_a_sample_has_rows_that_choose_at_random_together_and_alone():
    operator = experts()
    mixed, crowd = operator.samples(64)
    ids = mxfp4.rows_of(operator.call.router(*mixed.parts))[1].sort(-1).values
    assert (ids == EXPERTS - 1).any(-1).nonzero().tolist() == [[3]], "one row alone"
    assert (ids[::4] == ids[0]).all() and len({tuple(row) for row in ids.tolist()}) > 10
    assert torch.equal(operator.chosen_by(mixed).sort(-1).values, ids)
    weights, all_ids = mxfp4.rows_of(operator.call.router(*crowd.parts))
    assert len(all_ids.sort(-1).values.unique(dim=0)) == 1
    assert weights.std(0).min() > 0.1, "rows of one choice have weights of their own"


def test_company_is_a_crowd_or_strangers_and_the_row_itself_stays():
    operator = experts()
    for one, place, crowd, strangers in crowds_and_strangers(operator):
        own = set(operator.chosen_by(one)[0].tolist())
        assert {frozenset(each) for each in operator.chosen_by(crowd).tolist()} == {frozenset(own)}
        ids = operator.chosen_by(strangers)
        assert not set(torch.cat([ids[:place], ids[place + 1 :]]).flatten().tolist()) & own


def test_experts_that_leave_rows_alone_are_one_class_and_run_as_they_are():
    operator = experts()
    found = probe_operator(operator, row_counts(64))
    assert found == dict.fromkeys(range(1, 65), 0)
    assert extended(operator, found, [96, 500]) == {**found, 96: 0, 500: 0}
    assert operator.shape == (EXPERTS, HIDDEN, 2 * INNER, CHOSEN)


LEAKS: dict[str, tuple[Extra, int]] = {
    "the number of rows of an expert": (lambda ids: (fill(ids) > 1).float(), 1),
    "an expert that overflows at 3 rows": (lambda ids: (fill(ids) == 3).float(), 2),
    "an expert that overflows at 40 rows": (lambda ids: (fill(ids) > 39).float(), 39),
    "a row that is alone with its expert": (
        lambda ids: ((fill(ids) == 1) & (len(ids) > 20)).float(),
        20,
    ),
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_dependence_on_neighbours_caps_the_operator_below_it(what):
    leak, most = LEAKS[what]
    operator = experts(leak)
    found = probe_operator(operator, row_counts(64))
    assert set(found) == set(range(1, most + 1))
    plan, holds = plans.plan_of([operator], found, found)
    assert holds and plan.high == most, "more rows run in pieces, those of prefill too"


@settings(max_examples=12)
@given(st.integers(1, 20), st.integers(1, 200))
def test_planned_experts_are_called_with_measured_counts_and_give_the_same_rows(high, rows):
    operator = experts(lambda ids: (fill(ids) > high).float())
    module, router = operator.module, operator.call.router
    found = probe_operator(operator, row_counts(20))
    plan, _ = plans.plan_of([operator], found, found)
    sample = operator.sample(rows)
    alone = torch.cat([operator.run(sample[i : i + 1]) for i in range(rows)])
    module.called.clear()
    execute.keep_to({id(module): plan}, float("inf"))
    execute.redirect({"experts": [operator]}, {id(module): plan})
    hidden, scores = sample.clone().parts
    dispatched = SimpleNamespace(hidden_states=hidden, topk_output=router(hidden, scores))
    result = module.run_moe_core(dispatch_output=dispatched).hidden_states
    assert torch.equal(result, alone) and set(module.called) <= set(found)


def test_experts_whose_choice_comes_from_elsewhere_do_not_run():
    operator = experts()
    module, router = operator.module, operator.call.router
    plan = RowPlan(((1, 8),), routes=(Route(4, False, 8),))
    execute.redirect({"experts": [operator]}, {id(module): plan})
    hidden, scores = operator.sample(3).parts
    table = TritonKernelTopKOutput(*host_mxfp4.routing(scores, CHOSEN))
    with pytest.raises(RuntimeError, match="a choice that was not measured"):
        module.run_moe_core(
            dispatch_output=SimpleNamespace(hidden_states=hidden, topk_output=table)
        )
    assert mxfp4.scores_of(router(hidden, scores)) is scores


class Block(torch.nn.Module):
    """As gpt-oss's, less its router's linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.topk, self.experts = Chooses(), MadeUpExperts()

    def forward(self, hidden: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.topk(hidden, scores)
        found: torch.Tensor = self.experts(hidden, chosen)
        return found


def test_a_step_tells_which_router_made_the_table_of_experts(monkeypatch):
    monkeypatch.setattr(
        "margingate.runtime.probe.operators.observed_calls.experts",
        lambda model: [("experts", model.experts)],
    )
    model, hidden, scores = Block(), torch.randn(3, HIDDEN), torch.randn(3, EXPERTS)
    model.experts.forward = lambda hidden, chosen: hidden
    with observing(model, 3) as seen:
        model(hidden, scores)
    call = seen[id(model.experts)]
    assert call == observed_rows("experts", (hidden, scores), 3) and call.router is model.topk
    assert seen[id(model.topk)].router is None
    found = groups(model, seen)
    kinds = {type(same[0]): same[0] for same in found.values()}
    assert set(kinds) == {Router, ScoredExperts}
    assert "w2" not in kinds[ScoredExperts].signature
    assert f"[{EXPERTS}, {INNER}, {HIDDEN}] Mxfp4MoEMethod" in kinds[ScoredExperts].signature
    startup.refuse_unknown(model, found, seen)
    model.experts.forward = lambda hidden, chosen: hidden
    with (
        pytest.raises(GateError, match="where a choice of experts is a TritonKernelTopKOutput"),
        observing(model, 3),
    ):
        model.experts(hidden, TritonKernelTopKOutput(*host_mxfp4.routing(scores, CHOSEN)))


def test_a_routers_table_is_measured_as_weights_and_ids():
    router = Router("topk", Chooses(), ObservedRows(((HIDDEN, BF16), (EXPERTS, BF16)), CPU))
    (finding,) = plans.probe_groups({"r": [router]}, 16, [32])
    assert finding.plan is None and finding.prefill


def test_experts_of_a_table_that_are_of_another_kind_end_the_start():
    other = MadeUpExperts()
    other.quant_method = object()
    model = torch.nn.ModuleList([other])
    seen = {id(other): seen_with(Chooses())}
    assert [*routed_operators(model, seen), *scored_operators(model, seen)] == []
    with pytest.raises(GateError, match=r"cannot measure 0, a MadeUpExperts with w13_weight_bias"):
        startup.refuse_unknown(model, {}, seen)


def test_experts_that_were_made_bf16_are_measured_as_such():
    """SGLang does that for --moe-runner-backend triton."""
    module = MadeUpExperts()
    module.quant_method = method(w13_weight_triton_tensor=None)
    module.w13_weight = torch.nn.Parameter(torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=BF16))
    module.w2_weight = torch.nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER, dtype=BF16))
    parts = ((HIDDEN, BF16), (CHOSEN, torch.float32), (CHOSEN, torch.int32))
    model, seen = torch.nn.ModuleList([module]), {id(module): ObservedRows(parts, CPU)}
    (operator,) = routed_operators(model, seen)
    assert type(operator) is Experts
    packed = torch.zeros(EXPERTS, 2 * INNER, HIDDEN // 2, dtype=torch.uint8)
    module.w13_weight = torch.nn.Parameter(packed, requires_grad=False)
    assert list(routed_operators(model, seen)) == [], "as Marlin and FlashInfer keep them"


# -- tiles


def in_tiles(*heights: int) -> ScoredExperts:
    """Experts that have other bits in tiles of these heights, as triton_kernels is told them."""
    from triton_kernels.matmul_details import opt_flags

    def leak(ids: torch.Tensor) -> torch.Tensor:
        asked = opt_flags._get_opt_flags_constraints().get("block_m")
        return torch.full(ids.shape[:1], float(asked in heights))

    return experts(leak)


@pytest.mark.parametrize("heights", [(), (16,), (16, 32), (64,), (128,)])
def test_heights_of_other_bits_are_found(heights):
    apart = tile_heights.differing(in_tiles(*heights))
    assert apart == ([16, 32, 128] if heights == (64,) else list(heights))


def test_where_heights_matter_all_tiles_have_one_and_elsewhere_sglang_chooses(monkeypatch):
    """A CPU has no tiles: the first looks whether there are any."""
    found = {"steady": [in_tiles()], "apart": [in_tiles(16), in_tiles(16)]}
    assert tile_heights.settle(found) == 0
    monkeypatch.setattr(tile_heights, "has_tiles", lambda operator: True)
    assert tile_heights.settle(found) == 2
    (steady,), apart = found.values()
    assert tile_heights.of(steady.module) is None and "tiles" not in steady.signature
    for operator in apart:
        assert operator.signature.replace(" in tiles of 64 rows", "") == steady.signature
        assert operator.signature != steady.signature
        sample = operator.sample(3)
        with mxfp4.tile_height(16):  # as if SGLang had chosen it for so many rows
            assert torch.equal(operator.run(sample), steady.run(sample))


def test_a_height_is_taken_back():
    from triton_kernels.matmul_details import opt_flags

    with mxfp4.tile_height(64):
        assert opt_flags._get_opt_flags_constraints()["block_m"] == 64
        with mxfp4.tile_height(16):
            assert opt_flags._get_opt_flags_constraints()["block_m"] == 16
        assert opt_flags._get_opt_flags_constraints()["block_m"] == 64
    assert opt_flags._get_opt_flags_constraints().get("block_m") is None


# -- what else there is to say of them


def test_weights_that_are_no_parameters_are_in_the_digest():
    model = torch.nn.ModuleDict({"experts": MadeUpExperts()})
    before = weight_digest.digest(model)
    assert weight_digest.digest(torch.nn.ModuleDict({"experts": MadeUpExperts()})) == before
    module = model["experts"].quant_method
    module.w2_weight_triton_tensor[3, 1, 2] += 1
    changed = weight_digest.digest(model)
    module.w13_precision_config.b_mx_scale[0, 0, 0] += 1
    assert len({before, changed, weight_digest.digest(model)}) == 3
