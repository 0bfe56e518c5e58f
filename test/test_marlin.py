"""Layers that Marlin multiplies by: SGLang's own schemes over the host's kernels, as operators."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.platforms  # noqa: F401  loads the plugin, which is not to be loaded first
import torch
from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
from sglang.srt.layers.quantization import marlin_utils
from sglang.srt.layers.quantization.awq import awq
from sglang.srt.layers.quantization.gptq import gptq

from benchmark.models import four_bits, random_four_bits
from margingate.core.rowclass import RowPlan
from margingate.runtime.compat.compute import marlin
from margingate.runtime.compat.host import marlin as host_marlin
from margingate.runtime.probe.measuring.classes import probe_operator
from margingate.runtime.probe.operators.observed_calls import ObservedCall, observing
from margingate.runtime.probe.operators.operator import Packed, dense_operators
from margingate.runtime.probe.planning import execute
from margingate.runtime.probe.planning.plans import plan_of

INPUTS, OUTPUTS, GROUP = 128, 64, 32
FORMS = ("gptq", "awq")


@pytest.fixture(autouse=True)
def host(monkeypatch) -> Iterator[None]:
    """What `install` replaces, and as it was afterwards."""
    monkeypatch.setattr(marlin_utils, "get_device_capability", None)
    monkeypatch.setattr(awq, "_is_cuda", False)
    monkeypatch.setattr(awq_kernels, "AWQMarlinLinearKernel", None)
    monkeypatch.setattr(gptq_kernels, "GPTQMarlinLinearKernel", None)
    host_marlin.install()
    yield


class Layer(torch.nn.Module):
    """As SGLang's LinearBase holds one."""

    scheme: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.quant_method.apply(self, x, self.bias)
        return result


def configuration(form: str, **more: Any) -> tuple[Any, Any]:
    """SGLang's for such a checkpoint, and its method for linear layers."""
    said = four_bits.method(form, GROUP) | more
    kind = gptq.GPTQMarlinConfig if form == "gptq" else awq.AWQMarlinConfig
    assert kind.override_quantization_method(said, None) == f"{form}_marlin"
    config = kind.from_config(said)
    return config, (gptq.GPTQMarlinLinearMethod if form == "gptq" else awq.AWQLinearMethod)(config)


def loaded(form: str, tensors: dict[str, torch.Tensor], **more: Any) -> Layer:
    """A layer in BF16 with these weights, made, filled and finished as SGLang does."""
    config, method = configuration(form, **more)
    layer = Layer()
    layer.bias, layer.quant_method = None, method
    layer.scheme = config.get_linear_scheme(layer)
    outputs = tensors["scales"].shape[1]
    method.create_weights(
        layer,
        INPUTS,
        [outputs],
        INPUTS,
        outputs,
        torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    for name, tensor in tensors.items():
        getattr(layer, name).data.copy_(tensor)
    method.process_weights_after_loading(layer)
    return layer


def packed(form: str, seed: int = 1, outputs: int = OUTPUTS) -> tuple[Layer, torch.Tensor]:
    """A layer and its weight as the format's definition has it, float32 [outputs, inputs]."""
    weight = torch.randn(outputs, INPUTS, generator=torch.Generator().manual_seed(seed))
    groups = four_bits.to_groups(weight.bfloat16(), GROUP, symmetric=form == "gptq")
    made = four_bits.pack_gptq(groups) if form == "gptq" else four_bits.pack_awq(groups)
    return loaded(form, made), four_bits.from_groups(groups)


def rows(count: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("form", FORMS)
def test_the_hosts_product_is_that_of_the_formats_weights(form):
    layer, weight = packed(form)
    x = rows(5)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-5)
    layer.bias = torch.arange(OUTPUTS).bfloat16()
    biased = (exact.bfloat16() + layer.bias).double()
    torch.testing.assert_close(layer(x[:, None]).double()[:, 0], biased, rtol=2**-6, atol=1e-5)


def test_gptq_in_the_order_of_importance_takes_each_inputs_own_scale():
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(4))
    made = four_bits.pack_gptq(four_bits.to_groups(weight[:, order], GROUP, symmetric=True))
    groups = four_bits.to_groups(weight[:, order], GROUP, symmetric=True)
    undone = order.argsort()
    values = four_bits.packed(groups.values[undone].t()).t()
    mixed = made | {"qweight": values, "g_idx": made["g_idx"][undone]}
    mixed["scales"] = mixed["scales"].bfloat16()
    layer = loaded("gptq", mixed, desc_act=True)
    own = (groups.values - four_bits.MIDDLE)[undone].float() * mixed["scales"].float()[
        mixed["g_idx"].long()
    ]
    assert torch.equal(layer.unpacked, own.t())
    assert (layer.unpacked - weight).abs().max() < 0.3


def test_eight_bits_and_one_group():
    values = torch.randint(0, 256, (INPUTS, OUTPUTS), generator=torch.Generator().manual_seed(5))
    words = values.t().reshape(OUTPUTS, -1, 4) << (8 * torch.arange(4))
    made = {
        "qweight": words.sum(-1).to(torch.int32).t(),
        "scales": torch.full((1, OUTPUTS), 0.5),
    }
    layer = loaded("gptq", made, bits=8, group_size=-1)
    assert torch.equal(layer.unpacked, (values - 128).float().t() / 2)


@pytest.mark.parametrize("form", FORMS)
def test_such_a_layer_is_an_operator_that_says_what_chooses_its_kernel(form):
    (one, _), (same, _), (other, _) = packed(form), packed(form, 7), packed(form, 1, 128)
    found = list(dense_operators(torch.nn.Sequential(one, same, other), {}))
    assert [type(each) for each in found] == [Packed] * 3
    assert [each.shape for each in found] == [(64, 128), (64, 128), (128, 128)]
    signs = [each.signature.partition("linear ")[2][2:] for each in found]
    assert signs[0] == signs[1] != signs[2]
    assert f"{form.upper()}MarlinLinearScheme" in signs[0] and "group_size=32" in signs[0]
    assert found[0].weight is None and found[0].is_capped and found[0].is_planned
    sample = found[0].sample(3)
    assert (sample.shape, sample.dtype) == ((3, INPUTS), torch.bfloat16)
    assert found[0].run(sample).shape == (3, OUTPUTS)


def test_layers_that_another_kernel_multiplies_by_are_not_taken_for_it():
    layer, _ = packed("awq")
    layer.scheme = awq.AWQLinearScheme(None)
    assert not marlin.is_layer(layer)
    assert not marlin.is_layer(torch.nn.Linear(1, 1))
    assert list(dense_operators(torch.nn.Sequential(layer), {})) == []


@pytest.mark.parametrize("form", FORMS)
def test_a_step_says_how_it_calls_a_layer(form):
    layer, _ = packed(form)
    with observing(torch.nn.Sequential(layer), 3) as seen:
        layer(rows(3))
    assert seen == {id(layer): ObservedCall(width=INPUTS, bias=False)}
    with observing(torch.nn.Sequential(layer), 3) as seen:
        layer(rows(3).float())
    assert seen[id(layer)].dtype == torch.float32


class ByPlace:
    """As Marlin may: from `most` rows on a row's sum is cut by its place, and up to 8 by their
    number.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        found = [self.one(row, place, len(x)) for place, row in enumerate(x.float())]
        return torch.stack(found)

    def one(self, row: torch.Tensor, place: int, count: int) -> torch.Tensor:
        cut = 5 if count <= 8 else 64 + (place // self.most) * 7
        pieces = row.cumsum(0), row[:cut].sum() + row[cut:].sum()
        return torch.cat([torch.stack([pieces[0][-1], pieces[1]]), row[:cut].sum()[None]])


def test_rows_that_depend_on_their_place_are_run_in_pieces_of_fewer(monkeypatch):
    layer, _ = packed("gptq")
    layer.quant_method = ByPlace(16)
    operator = Packed("layer", layer, ObservedCall(width=INPUTS))
    classes = probe_operator(operator, range(1, 41))
    assert classes == {count: int(count > 8) for count in range(1, 17)}
    plan, holds = plan_of([operator], classes, classes)
    assert holds and (plan.high <= 16)
    wide = RowPlan([(9, 16)])
    monkeypatch.setattr(execute, "_plans", {})
    execute.keep_to({id(layer): wide}, float("inf"))
    execute.redirect({"layer": [operator]}, {id(layer): wide})
    x = rows(40)
    whole = layer.quant_method.apply(layer, x)
    for count in (1, 8, 9, 17, 40):
        assert torch.equal(layer.quant_method.apply(layer, x[:count]), whole[:count]), count


@pytest.mark.parametrize(
    ("said", "quantization", "served"),
    [
        ({"quant_method": "awq"}, "awq_marlin", True),
        ({"quant_method": "gptq", "lm_head": False}, "gptq_marlin", True),
        ({"quant_method": "gptq", "lm_head": True}, "gptq_marlin", False),
        ({"quant_method": "gptq"}, "gptq", False),
        ({"quant_method": "gptq"}, "moe_wna16", True),
        ({"quant_method": "awq"}, "moe_wna16", False),
        ({"format": "pack-quantized"}, "compressed-tensors", True),
        ({"format": "float-quantized"}, "compressed-tensors", False),
        (None, "awq_marlin", True),
    ],
)
def test_which_checkpoints_are_served(said, quantization, served):
    def model(text: dict[str, int]) -> SimpleNamespace:
        config = SimpleNamespace(quantization_config=said)
        return SimpleNamespace(
            hf_config=config, hf_text_config=SimpleNamespace(**text), quantization=quantization
        )

    assert marlin.is_served(model({})) is served
    assert marlin.is_served(model({"num_experts": 8})) is served


def test_partial_sums_are_never_added_in_any_order():
    """The hook's answer, and what SGLang asks: by name, in this module, for each call."""
    assert marlin.without_atomic_adds(True, 1, 64, 4096) is False
    for function in (marlin_utils.apply_gptq_marlin_linear, marlin_utils.apply_awq_marlin_linear):
        assert "should_use_atomic_add_reduce" in function.__code__.co_names


@pytest.mark.parametrize("form", FORMS)
def test_made_up_weights_have_a_usual_scale(form):
    method = four_bits.method(form, GROUP)
    made = random_four_bits.layer(OUTPUTS, INPUTS, method, torch.Generator().manual_seed(6))
    layer = loaded(form, made)
    assert 0.7 < layer.unpacked.std() * INPUTS**0.5 < 1.4
    assert layer.unpacked.mean().abs() < 0.1 * layer.unpacked.std()
