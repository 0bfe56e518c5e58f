"""Layers in FP8: found, described, measured, and kept to row counts; what cannot be is named."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers import layernorm
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8LinearMethod

from benchmark.models.fp8_blocks import BLOCK, from_blocks, to_blocks
from margingate.config import GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.compat.compute import quantization
from margingate.runtime.compat.host.fp8 import block_fp8_linear, round_to_fp8, scaled_fp8_linear
from margingate.runtime.probe.measuring.classes import RowDependenceError, probe_operator
from margingate.runtime.probe.operators.observed_calls import ObservedCall, observing
from margingate.runtime.probe.operators.operator import Quantized, dense_operators
from margingate.runtime.probe.planning import execute

CALL = ObservedCall(dtype=torch.float32)


class Method(Fp8LinearMethod):
    """SGLang's, as it is on a host without a GPU, with a product of our own."""

    def __init__(self, linear: Any = block_fp8_linear) -> None:  # SGLang's asks for a GPU
        self.weight_block_size = [BLOCK, BLOCK]
        self.use_marlin = self.use_mxfp8 = self.block_fp8_as_mxfp8 = False
        self.w8a8_block_fp8_linear = linear

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        return self.w8a8_block_fp8_linear(
            input=x,
            weight=layer.weight,
            block_size=self.weight_block_size,
            weight_scale=layer.weight_scale_inv,
            bias=bias,
        )


class Layer(torch.nn.Module):
    def __init__(self, outputs: int, columns: int, linear: Any = block_fp8_linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(outputs)
        weight, scales = to_blocks(torch.randn(outputs, columns, generator=generator))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(scales, requires_grad=False)
        self.quant_method = Method(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.quant_method.apply(self, x)
        return result


def by_whole_batch(*, input: torch.Tensor, **more: Any) -> torch.Tensor:
    """One scale for the activations of a call: rounds a row by its largest neighbour."""
    scale = input.abs().max().clamp(min=1e-10) / 448
    rounded = (input / scale).to(torch.float8_e4m3fn).float() * scale
    weight = from_blocks(more["weight"], more["weight_scale"])
    return torch.stack([(weight * row).sum(-1) for row in rounded])  # no GEMM's own classes


def row_by_row(*, input: torch.Tensor, **more: Any) -> torch.Tensor:
    return torch.cat([block_fp8_linear(input=row[None], **more) for row in input])


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_the_hosts_product_is_that_of_the_rounded_numbers(rows, columns, outputs, biased):
    layer = Layer(outputs, columns)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    bias = torch.arange(outputs).float() if biased else None
    weight = from_blocks(layer.weight, layer.weight_scale_inv).double()
    expected = round_to_fp8(x, BLOCK).double() @ weight.T
    found = layer.quant_method.apply(layer, x.bfloat16().float(), bias)
    exact = round_to_fp8(x.bfloat16().float(), BLOCK).double() @ weight.T
    assert torch.allclose(
        found.double(), exact + (0 if bias is None else bias), rtol=1e-4, atol=1e-3
    )
    assert (expected - x.double() @ weight.T).norm() <= 0.05 * (x.double() @ weight.T).norm()


def test_rounding_looks_at_no_other_row_and_no_other_group():
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    loud = x.clone()
    loud[0] *= 1000
    loud[1, :BLOCK] *= 1000
    rounded, beside = round_to_fp8(x, BLOCK), round_to_fp8(loud, BLOCK)
    assert torch.equal(rounded[2:], beside[2:])
    assert torch.equal(rounded[1, BLOCK:], beside[1, BLOCK:])
    assert (rounded - x).abs().max() <= x.abs().max() / 16  # three bits behind the first
    assert torch.equal(round_to_fp8(torch.zeros(2, 7), BLOCK), torch.zeros(2, 7))


def test_a_layer_in_fp8_is_an_operator_with_its_kernel_in_its_signature():
    model = torch.nn.Sequential(Layer(64, 128), Layer(64, 128), Layer(64, 128, row_by_row))
    found = list(dense_operators(model, {id(layer): CALL for layer in model}))
    assert [type(each) for each in found] == [Quantized] * 3
    one, same, other = (each.signature.partition("linear ")[2][2:] for each in found)
    assert one == same != other
    assert "Method [128, 128] block_fp8_linear" in one and "[1, 1] torch.float32" in one
    assert found[0].weight is None  # no kernel of ours multiplies by it


def test_marlin_and_microscaled_layers_are_not_taken_for_it():
    for name in ("use_marlin", "use_mxfp8"):
        layer = Layer(8, 128)
        setattr(layer.quant_method, name, True)
        assert not quantization.is_fp8_layer(layer)
    assert not quantization.is_fp8_layer(torch.nn.Linear(1, 1))


class Channels(torch.nn.Module):
    """A layer with a scale a channel, its weight as SGLang keeps it: transposed."""

    def __init__(self, outputs: int, columns: int, *, scheme: bool = False) -> None:
        super().__init__()
        drawn = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(outputs))
        scales = drawn.abs().amax(-1, keepdim=True) / 448
        rounded = (drawn / scales).to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(rounded.t(), requires_grad=False)
        self.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
        self.input_scale = None
        if scheme:
            self.scheme = object.__new__(CompressedTensorsW8A8Fp8)
            self.scheme.weight_block_size = None
        self.quant_method = object.__new__(W8A8Fp8LinearMethod)
        self.quant_method.apply = lambda layer, x, bias=None: scaled_fp8_linear(
            x, layer.weight, layer.weight_scale, layer.input_scale, bias=bias
        )


@pytest.mark.parametrize("scheme", [False, True])
def test_a_layer_with_scales_of_channels_is_an_operator_of_its_outputs_and_inputs(scheme):
    layer = Channels(48, 128, scheme=scheme)
    assert quantization.is_fp8_layer(layer)
    seen = ObservedCall(width=128, dtype=torch.float32)
    (found,) = dense_operators(torch.nn.ModuleList([layer]), {id(layer): seen})
    assert isinstance(found, Quantized) and found.shape == (48, 128)
    named = "CompressedTensorsW8A8Fp8" if scheme else "W8A8Fp8LinearMethod"
    assert f"{named} None [48, 1] torch.float32" in found.signature
    sample = found.sample(3)
    assert sample.shape == (3, 128) and found.run(sample).shape == (3, 48)
    assert len(found.company(sample, 1, 2)) == 1
    layer.input_scale = torch.tensor(0.01)
    assert "a given scale" in found.signature


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 60), st.booleans(), st.booleans())
def test_the_hosts_product_by_channels(rows, columns, outputs, biased, is_given):
    """A row's scale is its own, or the checkpoint's."""
    layer = Channels(outputs, columns)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    scale = torch.tensor(0.02) if is_given else x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    weight = layer.weight.double().T * layer.weight_scale
    bias = torch.arange(outputs).float() if biased else None
    found = scaled_fp8_linear(
        x, layer.weight, layer.weight_scale, scale if is_given else None, bias=bias
    )
    expected = rounded @ weight.T + (0 if bias is None else bias)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_scale_that_rows_share_is_found():
    shared = Quantized("layer", Layer(16, 128, by_whole_batch), CALL)
    with pytest.raises(RowDependenceError) as caught:
        probe_operator(shared, range(1, 9))
    assert caught.value.rows == 2
    own = Quantized("layer", Layer(16, 128, row_by_row), CALL)
    assert set(probe_operator(own, range(1, 9)).values()) == {0}


def test_large_neighbours_alone_show_a_scale_that_is_shared_seldom():
    """Rows of one size round alike by the scale of each: what the company is for."""

    def coarse(*, input: torch.Tensor, **more: Any) -> torch.Tensor:
        size = 2.0 ** max(0, int(input.abs().max().log2()) - 4)
        return row_by_row(input=(input / size).round(decimals=3) * size, **more)

    found = Quantized("layer", Layer(16, 128, coarse), CALL)
    with pytest.raises(RowDependenceError):
        probe_operator(found, range(1, 9))


def test_a_step_says_how_it_calls_a_layer_and_leaves_no_patch():
    model = torch.nn.Sequential(Layer(64, 128), torch.nn.Identity())
    with observing(model, 3) as seen:
        model(torch.zeros(3, 128))
        assert "apply" in vars(model[0].quant_method)
    assert seen[id(model[0])] == ObservedCall(width=128, dtype=torch.float32, bias=False)
    assert model[0].quant_method.apply.__func__ is Method.apply


def test_inputs_that_were_rounded_elsewhere_end_the_start():
    model = torch.nn.Sequential(Layer(64, 128))
    with observing(model, 3), pytest.raises(GateError, match="rounded elsewhere"):
        model((torch.zeros(3, 128), torch.ones(3, 1)))


def test_calls_stay_within_the_plan(monkeypatch):
    """Two layers that share a method: only the one with a plan is kept to it."""
    counts: list[tuple[int, int]] = []

    def noted(*, input: torch.Tensor, **more: Any) -> torch.Tensor:
        counts.append((len(more["weight"]), len(input)))
        return row_by_row(input=input, **more)

    model = torch.nn.Sequential(Layer(64, 128, noted), Layer(128, 64))
    model[1].quant_method = model[0].quant_method
    monkeypatch.setattr(execute, "_plans", {})
    monkeypatch.setattr(execute, "_limit", 64.0)
    planned = {id(model[0]): RowPlan([(4, 4), (8, 8)])}
    execute.keep_to(planned, 64)
    operators = {each.name: [each] for each in dense_operators(model, {id(m): CALL for m in model})}
    x = torch.randn(11, 128, generator=torch.Generator().manual_seed(3))
    free = model(x)
    counts.clear()
    execute.redirect(operators, planned)
    assert torch.equal(model(x), free)
    assert counts == [(64, 8), (64, 4), (128, 11)]
    execute.keep_to({}, 8)
    counts.clear()
    model(x)
    assert counts == [(64, 11), (128, 11)]


@pytest.fixture
def norm(monkeypatch) -> RMSNorm:
    """One that SGLang lets round for a layer with a given scale; torch operators for kernels."""

    def rounded(out, x, weight, scale, eps):
        out.copy_(norm.forward_native(x).float() / scale)

    norm = RMSNorm(128)
    method = Fp8LinearMethod(Fp8Config(True, activation_scheme="static"))
    norm.fuse_input_quant(SimpleNamespace(quant_method=method, input_scale=torch.tensor(0.02)))
    monkeypatch.setattr(layernorm, "_flashinfer_rmsnorm_quant_available", True)
    monkeypatch.setattr(layernorm, "_flashinfer_rmsnorm_quant", rounded, raising=False)
    by_torch = lambda x, weight, eps: norm.forward_native(x)  # noqa: E731
    monkeypatch.setattr(layernorm, "rmsnorm", by_torch, raising=False)
    return norm


def test_a_norm_leaves_rounding_to_the_layer_that_is_measured(norm, monkeypatch):
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    (rounded, scale, _) = norm.forward_cuda(x)
    assert (rounded.dtype, float(scale)) == (torch.float8_e4m3fn, pytest.approx(0.02))
    asked = partial(quantization.no_scale_for_norms, layernorm._fp8_static_input_scale)
    monkeypatch.setattr(layernorm, "_fp8_static_input_scale", asked)
    assert torch.equal(norm.forward_cuda(x), norm.forward_native(x))
