"""Experts in 4 bits, by Marlin and by Triton: SGLang's own schemes over the host's kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
from sglang.srt.layers.quantization import marlin_utils
from sglang.srt.layers.quantization.awq import awq
from sglang.srt.layers.quantization.compressed_tensors import schemes as compressed
from sglang.srt.layers.quantization.gptq import gptq
from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method

from benchmark.models import four_bits, random_four_bits
from margingate.config import GateError
from margingate.harness.tiny_models import tiny_model
from margingate.runtime.compat.compute import marlin, routers
from margingate.runtime.compat.host import marlin as host_marlin
from margingate.runtime.compat.host import platform as host_platform
from margingate.runtime.probe.checks import loaded_model
from margingate.runtime.probe.measuring.classes import probe_operator, row_counts
from margingate.runtime.probe.operators.observed_calls import ObservedRows
from margingate.runtime.probe.operators.routed import (
    PackedExperts,
    Rows,
    call_experts,
    routed_operators,
)
from margingate.runtime.probe.planning import execute
from margingate.runtime.probe.planning.plans import plan_of
from margingate.runtime.start import refused_models

pytestmark = pytest.mark.skipif(
    not marlin.experts_are_served(), reason="this SGLang's Marlin experts are not served"
)

HIDDEN, INNER, EXPERTS, CHOSEN, GROUP = 128, 64, 6, 2, 32
FORMS = ("gptq", "awq")
TYPES = {"gptq": torch.float16, "awq": torch.bfloat16}  # of rows and scales


@pytest.fixture(autouse=True)
def host(monkeypatch) -> Iterator[None]:
    """What `install` replaces, and as it was afterwards."""
    monkeypatch.setattr(marlin_utils, "get_device_capability", None)
    monkeypatch.setattr(awq, "_is_cuda", False)
    for module, names in (
        (awq_kernels, ("AWQMarlinLinearKernel", "AWQMoEKernel")),
        (gptq_kernels, ("GPTQMarlinLinearKernel", "GPTQMarlinMoEKernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, None)
    host_marlin.install()
    yield


class Mixture(torch.nn.Module):
    """SGLang's FusedMoE as far as its scheme and the probe see it."""

    scheme: Any = None
    moe_tp_size = 1
    intermediate_size_per_partition = INNER

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe_runner_config = SimpleNamespace(
            **{"activation": "silu", "is_gated": True, "routed_scaling_factor": None},
            **{"num_local_experts": EXPERTS, "hidden_size": HIDDEN, "params_dtype": dtype},
            intermediate_size_per_partition=INNER,
        )

    def run_moe_core(self, dispatch_output: Any) -> Any:
        return self.scheme.apply_weights(self, dispatch_output)


def mixture(form: str, seed: int = 1, **more: Any) -> tuple[Mixture, dict[str, torch.Tensor]]:
    """Experts, made, filled and finished as SGLang does; and both weights as the format's
    definition has them, float32 [experts, outputs, inputs].
    """
    said = four_bits.method(form, GROUP) | more
    config = (gptq.GPTQMarlinConfig if form == "gptq" else awq.AWQMarlinConfig).from_config(said)
    module = Mixture(TYPES[form])
    module.scheme = config.get_moe_scheme(module)
    module.scheme.create_weights(
        layer=module,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INNER,
        params_dtype=TYPES[form],
        weight_loader=lambda *_: None,
    )
    draw, exact = torch.Generator().manual_seed(seed), {}
    for name, sizes in (("w13", (2 * INNER, HIDDEN)), ("w2", (HIDDEN, INNER))):
        drawn = torch.randn(EXPERTS, *sizes, generator=draw) * sizes[1] ** -0.5
        rounded = [
            four_bits.to_groups(each.to(TYPES[form]), GROUP, symmetric=form == "gptq")
            for each in drawn
        ]
        pack = four_bits.pack_gptq if form == "gptq" else four_bits.pack_awq
        for expert, groups in enumerate(rounded):
            for part, tensor in pack(groups).items():
                getattr(module, f"{name}_{part}").data[expert].copy_(tensor)
        exact[name] = torch.stack([four_bits.from_groups(groups) for groups in rounded])
    module.scheme.process_weights_after_loading(module)
    return module, exact


def seen(dtype: torch.dtype) -> ObservedRows:
    parts = ((HIDDEN, dtype), (CHOSEN, torch.float32), (CHOSEN, torch.int32), (EXPERTS, dtype))
    return ObservedRows(parts, torch.device("cpu"))


def operator(module: Mixture) -> PackedExperts:
    return PackedExperts("experts", module, seen(module.moe_runner_config.params_dtype))


@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_experts_are_those_of_the_formats_weights(form):
    module, exact = mixture(form)
    rows = operator(module).sample(7)
    hidden, weights, ids, _ = rows.parts
    expected = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for row in range(7):
        for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
            gate, up = (exact["w13"][expert].double() @ hidden[row].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[row] += weight * (exact["w2"][expert].double() @ inner)
    found = operator(module).run(rows)
    assert found.dtype == hidden.dtype
    torch.testing.assert_close(found.double(), expected, rtol=2**-5, atol=2**-6)


def test_experts_rounded_in_the_order_of_importance_take_each_inputs_own_scale():
    plain, _ = mixture("gptq")
    ordered, _ = mixture("gptq", desc_act=True)
    assert torch.equal(plain.unpacked_w13, ordered.unpacked_w13), "here it is that of the inputs"
    ordered.w13_g_idx.data[0] = ordered.w13_g_idx.data[0].flip(0)
    ordered.scheme.process_weights_after_loading(ordered)
    assert torch.equal(plain.unpacked_w13[1:], ordered.unpacked_w13[1:])
    assert not torch.equal(plain.unpacked_w13[0], ordered.unpacked_w13[0])


@pytest.mark.parametrize("form", FORMS)
def test_such_experts_are_an_operator_that_says_what_chooses_its_kernels(form):
    (one, _), (same, _) = mixture(form), mixture(form, 2)
    layers = (torch.nn.ModuleDict({"experts": each}) for each in (one, same))
    model = torch.nn.ModuleList(layers)
    calls = {id(each): seen(TYPES[form]) for each in (one, same)}
    first, second = routed_operators(model, calls)
    assert type(first) is PackedExperts and first.is_planned and first.is_capped
    assert first.shape == (EXPERTS, 2 * INNER, HIDDEN, CHOSEN) and not first.rounds_rows
    assert first.signature == second.signature
    kind = "GPTQMarlinMoEScheme" if form == "gptq" else "AWQMoEScheme"
    assert f"{kind} " in first.signature and f"group_size={GROUP}" in first.signature


def test_other_bits_and_orders_are_other_operators():
    (plain, _), (ordered, _) = mixture("gptq"), mixture("gptq", desc_act=True)
    assert operator(plain).signature != operator(ordered).signature
    plain.scheme.kernel.is_k_full = False
    assert "is_k_full=False" in operator(plain).signature


def test_experts_of_other_kernels_are_not_taken_for_it():
    module, _ = mixture("awq")
    for kind in (awq.AWQAscendMoEScheme, compressed.CompressedTensorsWNA16TritonMoE):
        module.scheme = object.__new__(kind)
        assert not marlin.are_experts(module), kind
    module.scheme = object.__new__(compressed.CompressedTensorsWNA16MoE)
    assert marlin.are_experts(module)
    assert not marlin.are_experts(torch.nn.Linear(1, 1))


def test_what_compressed_tensors_calls_its_scales():
    """Its experts say so; nobody else's are under this name."""
    source = inspect.getsource(compressed.CompressedTensorsWNA16MoE.create_weights)
    assert '"w13_weight_scale"' in source and '"w2_weight_scale"' in source
    module = SimpleNamespace(
        scheme=SimpleNamespace(num_bits=4, group_size=32, actorder=None, sym=True),
        w13_weight_scale=torch.zeros(EXPERTS, 4, 2 * INNER),
        w2_weight_scale=torch.zeros(EXPERTS, 2, HIDDEN),
    )
    assert marlin.experts_scales(module).shape == (EXPERTS, 4, 2 * INNER)
    assert "num_bits=4 group_size=32 actorder=None sym=True" in marlin.describe_experts(module)


class ByExperts:
    """As Marlin's blocks: a row's sum is cut by how many experts all rows choose together."""

    def __init__(self, core: Callable[..., Any]) -> None:
        self.core = core
        self.called: list[int] = []

    def __call__(self, dispatch_output: Any) -> Any:
        ids = dispatch_output.topk_output.topk_ids
        self.called.append(len(ids))
        found = self.core(dispatch_output)
        cut = len(ids.unique()) * 2.0**-12
        return type(found)(found.hidden_states + cut)


@pytest.mark.parametrize("form", FORMS)
def test_rows_cut_by_the_experts_of_all_are_run_one_by_one(form, monkeypatch):
    module, _ = mixture(form)
    module.run_moe_core = core = ByExperts(module.run_moe_core)
    probed = operator(module)
    classes = probe_operator(probed, row_counts(24))
    assert classes == {1: 0}, "any company of a row may choose more experts"
    plan, holds = plan_of([probed], classes, classes)
    assert holds and plan.counts == ((1, 1),)
    monkeypatch.setattr(execute, "_plans", {})
    execute.keep_to({id(module): plan}, float("inf"))
    execute.redirect({"experts": [probed]}, {id(module): plan})
    rows = probed.sample(40)
    whole = call_experts(module.run_moe_core, rows)
    core.called.clear()
    for start, stop in ((0, 1), (3, 11), (17, 40)):
        found = call_experts(module.run_moe_core, rows[start:stop])
        assert torch.equal(found, whole[start:stop])
    assert set(core.called) == {1} and len(core.called) == 1 + 8 + 23


@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_own_experts_keep_a_rows_bits_within_their_plan(form, monkeypatch):
    module, _ = mixture(form)
    probed = operator(module)
    classes = probe_operator(probed, row_counts(16))
    plan, _ = plan_of([probed], classes, classes)
    monkeypatch.setattr(execute, "_plans", {})
    execute.keep_to({id(module): plan}, float("inf"))
    execute.redirect({"experts": [probed]}, {id(module): plan})
    rows = probed.sample(48)
    whole = call_experts(module.run_moe_core, rows)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(8))
    assert torch.equal(call_experts(module.run_moe_core, rows[order]), whole[order])
    for count in (1, 2, 5, 17):
        assert torch.equal(call_experts(module.run_moe_core, rows[:count]), whole[:count])


def test_partial_sums_of_experts_are_never_added_in_any_order(monkeypatch):
    asked: list[bool] = []

    def kernel(*_args: Any, use_atomic_add: bool) -> str:
        asked.append(use_atomic_add)
        return "result"

    monkeypatch.setattr(fused_marlin_moe, "moe_wna16_marlin_gemm", kernel, raising=False)

    def experts(rows: int, *, top: int) -> tuple[Any, int]:
        called: Any = fused_marlin_moe.moe_wna16_marlin_gemm
        return called(rows, use_atomic_add=True), top

    assert marlin.multiply_in_order(experts, 3, top=2) == ("result", 2)
    assert asked == [False] and fused_marlin_moe.moe_wna16_marlin_gemm is kernel
    with pytest.raises(RuntimeError, match="called without use_atomic_add"):
        marlin.multiply_in_order(lambda: fused_marlin_moe.moe_wna16_marlin_gemm(1))
    assert fused_marlin_moe.moe_wna16_marlin_gemm is kernel
    monkeypatch.delattr(fused_marlin_moe, "moe_wna16_marlin_gemm")
    with pytest.raises(AttributeError, match="moe_wna16_marlin_gemm"):
        marlin.multiply_in_order(lambda: None)


def test_sglang_asks_the_kernel_for_atomic_adds_by_name():
    """Both products, in the namespace that the hook changes; and nobody else calls the kernel."""
    source = inspect.getsource(fused_marlin_moe)
    assert (
        source.count("= moe_wna16_marlin_gemm(") == source.count("use_atomic_add=use_atomic") == 2
    )
    function = inspect.unwrap(fused_marlin_moe.fused_marlin_moe)
    assert function.__globals__ is vars(fused_marlin_moe)
    for scheme in (compressed.CompressedTensorsWNA16MoE, marlin_runner()):
        assert "fused_marlin_moe import" in inspect.getsource(scheme).replace("(", "import")


def marlin_runner() -> Any:
    from sglang.srt.layers.moe.moe_runner import marlin as runner

    return runner.fused_experts_none_to_marlin


def test_verify_passes_on_stock_steps_are_refused(monkeypatch):
    module, _ = mixture("awq")
    monkeypatch.setattr(routers, "experts", None)
    monkeypatch.setattr(refused_models, "experts", lambda _model: [("mlp.experts", module)])
    stock = SimpleNamespace(invariant=False, policy="margin", fast_path="stock")
    with pytest.raises(GateError, match=r"sums of mlp\.experts by the experts that all rows choos"):
        refused_models.refuse_stock_experts(None, stock)
    for config in ({"invariant": True}, {"policy": "observe"}):
        refused_models.refuse_stock_experts(None, SimpleNamespace(**{**vars(stock), **config}))
    monkeypatch.setattr(refused_models, "experts", lambda _model: [("mlp", torch.nn.Module())])
    refused_models.refuse_stock_experts(None, stock)


def test_scales_of_another_type_than_rows_are_refused(monkeypatch):
    module, _ = mixture("gptq")
    monkeypatch.setattr(loaded_model, "experts", lambda _model: [("mlp.experts", module)])
    loaded_model.refuse_layers(torch.nn.Module())
    module.moe_runner_config.params_dtype = torch.bfloat16
    with pytest.raises(GateError, match=r"model's type is torch\.bfloat16: use --dtype float16\."):
        loaded_model.refuse_layers(torch.nn.Module())
    rows = Rows(tuple(part.to(torch.bfloat16) for part in operator(module).sample(1).parts))
    with pytest.raises(AssertionError, match="scales' dtype"):
        operator(module).run(rows)


@pytest.mark.parametrize("form", FORMS)
def test_made_up_mixtures_have_the_tensors_of_a_rounded_one(form, run_folder):
    source = tiny_model("qwen3_moe-blocks", run_folder)
    config, tensors = random_four_bits.checkpoints.read(source)
    rounded = four_bits.quantized(tensors, form, GROUP)
    said = random_four_bits.configured(config, form)
    assert said["quantization_config"]["quant_method"] == form
    assert (said.get("torch_dtype") == "float16") is (form == "gptq")
    said["quantization_config"]["group_size"] = GROUP
    made = random_four_bits.made_up(said)
    assert {name: each.shape for name, each in made.items()} == {
        name: each.shape for name, each in rounded.items()
    }


def by_triton(kind: type) -> tuple[Mixture, torch.Tensor]:
    """Experts as SGLang keeps them for its Triton kernel, with their numbers of the first product,
    float32 [experts, outputs, inputs].
    """
    module, draw = Mixture(torch.bfloat16), torch.Generator().manual_seed(4)
    method = object.__new__(kind)
    own = {"num_bits": 4, "group_size": GROUP, "sym": True}
    config = SimpleNamespace(weight_bits=4, group_size=GROUP, has_zp=False)
    vars(method).update({"quant_config": config} if kind is MoeWNA16Method else own)
    module.scheme = None if kind is MoeWNA16Method else method
    module.quant_method = method
    first: list[torch.Tensor] = []
    for name, (outputs, inputs) in (("w13", (2 * INNER, HIDDEN)), ("w2", (HIDDEN, INNER))):
        values = torch.randint(0, 16, (EXPERTS, outputs, inputs), generator=draw)
        packed = values[..., ::2] + 16 * values[..., 1::2]
        scales = torch.rand(EXPERTS, outputs, inputs // GROUP, generator=draw).bfloat16() / 64
        weight, scale = (
            ("qweight", "scales") if kind is MoeWNA16Method else ("weight_packed", "weight_scale")
        )
        setattr(module, f"{name}_{weight}", packed.to(torch.uint8))
        setattr(module, f"{name}_{scale}", scales)
        first.append((values - 8) * scales.float().repeat_interleave(GROUP, -1))
    return module, first[0]


TRITON = (MoeWNA16Method, compressed.CompressedTensorsWNA16TritonMoE)


@pytest.mark.parametrize("kind", TRITON)
def test_experts_in_4_bits_by_triton_are_an_operator_of_their_own(kind):
    module, _ = by_triton(kind)
    model = torch.nn.ModuleDict({"experts": module})
    (found,) = routed_operators(model, {id(module): seen(torch.bfloat16)})
    assert type(found) is PackedExperts and found.shape == (EXPERTS, 2 * INNER, HIDDEN, CHOSEN)
    assert kind.__name__ in found.signature and f"group_size={GROUP}" in found.signature
    assert not marlin.are_experts(module)


def test_what_triton_computes_with_them_on_a_host():
    module, first = by_triton(MoeWNA16Method)
    hidden, weights, ids, _ = operator(module).sample(5).parts
    found = host_platform.rounded_experts(
        hidden,
        module.w13_qweight,
        module.w2_qweight,
        (weights, ids, None),
        module.moe_runner_config,
        use_int4_w4a16=True,
        w1_scale=module.w13_scales,
        w2_scale=module.w2_scales,
        block_shape=[0, GROUP],
    )
    kept = {"w13": module.w13_qweight, "w2": module.w2_qweight}
    assert kept["w2"].shape == (EXPERTS, HIDDEN, INNER // 2)
    scaled = module.w2_scales.float().repeat_interleave(GROUP, -1)
    halves = torch.stack([kept["w2"] & 15, kept["w2"] >> 4], -1).flatten(-2)
    second = (halves.double() - 8) * scaled.double()
    for row in range(5):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
            gate, up = (first[expert].double() @ hidden[row].double()).chunk(2)
            expected += weight * (second[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(found[row].double(), expected, rtol=2**-5, atol=2**-6)
