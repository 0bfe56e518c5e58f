"""What is seen of a step's calls, that the probe measures just these, and what ends the start."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention

from margingate.config import GateError
from margingate.runtime.compat.compute.routers import use_linear_kernels
from margingate.runtime.probe.checks import drawing
from margingate.runtime.probe.operators.observed_calls import (
    ROWS,
    ObservedCall,
    observing,
    refuse_unmeasured,
)
from margingate.runtime.probe.operators.operator import HEAD, Head, dense_operators

HIDDEN, HEADS, SIZE = 24, 3, 8


class Norm(torch.nn.RMSNorm):
    """With a residual, as SGLang's: another result, and the sum besides."""

    def forward(self, x, residual=None):
        if residual is None:
            return super().forward(x)
        return super().forward(x + residual), x + residual


def linear(outputs: int, inputs: int, bias: bool = False) -> torch.nn.Module:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None
    layer.quant_method = UnquantizedLinearMethod()
    return layer


class Model(torch.nn.Module):
    """A layer that adds its bias, one that does not, a norm with a residual, one of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, HIDDEN)
        self.norm, self.q_norm = Norm(HIDDEN), Norm(SIZE)
        self.qkv_proj = linear(2 * HIDDEN, HIDDEN, bias=True)
        self.o_proj = linear(HIDDEN, HIDDEN, bias=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x, residual = self.norm(x, x)
        qkv = self.qkv_proj.quant_method.apply(self.qkv_proj, x, self.qkv_proj.bias)
        q = self.q_norm(qkv[:, :HIDDEN].reshape(-1, SIZE)).reshape(-1, HIDDEN)
        return self.o_proj.quant_method.apply(self.o_proj, q, None) + residual


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def seen(model) -> dict[int, ObservedCall]:
    with torch.inference_mode(), observing(model, ROWS) as found:
        model(torch.arange(ROWS))
    return found


def test_a_step_says_how_it_calls_each_module(model, seen):
    assert seen[id(model.norm)] == ObservedCall(HIDDEN, residual=True)
    assert seen[id(model.qkv_proj)] == ObservedCall(HIDDEN, bias=True)
    assert seen[id(model.o_proj)] == ObservedCall(HIDDEN, bias=False)
    assert seen[id(model.q_norm)] == ObservedCall(HIDDEN, (SIZE,))


def test_the_probe_measures_what_was_seen(model, seen):
    """On 0b0f5a1 without the bias, the residual and the heads."""
    found = {member.name: member for member in dense_operators(model, seen)}
    x = torch.randn(5, HIDDEN)
    with torch.inference_mode():
        layer = model.qkv_proj
        multiply = torch.nn.functional.linear  # by itself a CPU may add the bias in another order
        assert torch.equal(found["qkv_proj"].run(x), multiply(x, layer.weight, layer.bias))
        assert torch.equal(found["o_proj"].run(x), multiply(x, model.o_proj.weight))
        summed, residual = model.norm(x.clone(), x.flip(-1))
        assert torch.equal(found["norm"].run(x), torch.cat([summed, residual], -1))
        heads = model.q_norm(x.reshape(-1, SIZE)).reshape(5, -1)
        assert torch.equal(found["q_norm"].run(x), heads)
    assert found["q_norm"].call.width == HIDDEN and len({m.signature for m in found.values()}) == 4


def test_another_call_is_another_operator(model):
    """Two layers of one shape, one of them with its bias."""
    model.qkv_proj = linear(HIDDEN, HIDDEN, bias=True)
    calls = {id(model.qkv_proj): ObservedCall(HIDDEN, bias=True)}
    names = {m.name: m.signature.split(" ", 2)[2] for m in dense_operators(model, calls)}
    assert names["qkv_proj"] == names["o_proj"] + ", with its bias"


def test_strides_are_those_of_the_step():
    call = ObservedCall(6, stride=10)
    x = torch.randn(4, 6)
    laid = call.laid_out(x)
    assert torch.equal(laid, x) and laid.stride() == (10, 1)
    heads = ObservedCall(6, (2, 3), stride=10).laid_out(x)
    assert heads.shape == (4, 2, 3) and heads.stride() == (10, 3, 1)


def test_a_module_that_nobody_measures_ends_the_start(model, seen):
    known = {id(member.module) for member in dense_operators(model, seen)}
    refuse_unmeasured(model, known)
    model.experts = torch.nn.Bilinear(HIDDEN, HIDDEN, HIDDEN)
    with pytest.raises(GateError, match=r"cannot measure experts, a Bilinear with weight, bias: "):
        refuse_unmeasured(model, known)


class Processor(LogitsProcessor):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def _compute_lm_head(self, hidden_states, lm_head, embedding_bias=None, *, out=None):
        return hidden_states @ lm_head.weight.T


class Speaking(torch.nn.Module):
    """As Gemma 2: its logits are of its embeddings, and no attribute is named lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.logits_processor = torch.nn.Embedding(10, HIDDEN), Processor()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits_processor._compute_lm_head(self.embed(ids), self.embed)


@pytest.mark.parametrize("named", [False, True])
def test_the_head_is_what_a_step_makes_logits_by(named):
    model = Speaking().eval()
    if named:
        model.lm_head = torch.nn.Embedding(10, HIDDEN)  # which no step reads
    with torch.inference_mode(), observing(model, ROWS) as found:
        model(torch.arange(ROWS))
    (head,) = (each for each in dense_operators(model, found) if isinstance(each, Head))
    assert head.name == HEAD and head.module is model.embed
    assert head.processor is model.logits_processor
    assert "_compute_lm_head" not in vars(model.logits_processor), "put back"


class Attention(RadixAttention):
    """SGLang's layer, without what it needs of a server."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


def test_sinks_go_to_attention_and_other_numbers_nowhere(model, seen):
    known = {id(member.module) for member in dense_operators(model, seen)}
    model.self_attn = torch.nn.Module()
    model.self_attn.sinks = torch.nn.Parameter(torch.zeros(HEADS))
    with pytest.raises(GateError, match=r"cannot measure self_attn, a Module with sinks: "):
        refuse_unmeasured(model, known)
    model.self_attn.attn = Attention()
    refuse_unmeasured(model, known)
    model.self_attn.slopes = torch.nn.Parameter(torch.zeros(HEADS))
    with pytest.raises(GateError, match=r"cannot measure self_attn, a Module with slopes: "):
        refuse_unmeasured(model, known)


def test_scales_of_columns_are_no_layer_that_has_to_be_measured():
    model = torch.nn.ModuleDict({"attn": RadixAttention.__new__(RadixAttention)})
    torch.nn.Module.__init__(model["attn"])
    model["attn"].k_scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)
    refuse_unmeasured(model, set())


def test_routers_of_gpt_oss_are_linear_layers_at_every_row_count():
    model = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    model[0]._use_tinygemm = True
    use_linear_kernels(model)
    assert model[0]._use_tinygemm is False and not hasattr(model[1], "_use_tinygemm")


def test_an_input_without_whole_rows_ends_the_start(model):
    refused = pytest.raises(GateError, match=r"shape \[4, 24\] in a step of 3 rows")
    with refused, torch.inference_mode(), observing(model, ROWS):
        model.norm(torch.randn(4, HIDDEN))
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    assert UnquantizedLinearMethod.apply.__name__ != "applied", "put back"
    assert not model.norm._forward_pre_hooks


@given(st.integers(0, 1 << 32), st.integers(1, 5000), st.sets(st.integers(1, 6000)))
def test_counts_are_drawn_near_borders_and_anywhere(seed, largest, borders):
    found = drawing.row_counts(random.Random(seed), largest, borders)
    assert found == sorted(set(found)) and found[0] >= 1 and found[-1] <= largest
    near = {n + d for n in borders for d in (-1, 0, 1)} & set(range(1, largest + 1))
    assert not near or near & set(found)
    assert found == drawing.row_counts(random.Random(seed), largest, borders)


def test_the_seed_of_a_start_is_logged(caplog):
    scheduler = SimpleNamespace(server_args=SimpleNamespace(tp_size=1))
    with caplog.at_level("INFO"):
        first, second = drawing.shared(scheduler), drawing.shared(scheduler)
    seeds = [int(line.rsplit(" ", 1)[1]) for line in caplog.text.splitlines()]
    assert seeds[0] != seeds[1] and first.random() == random.Random(seeds[0]).random()
    assert second.random() == random.Random(seeds[1]).random()
