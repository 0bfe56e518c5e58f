"""DualGemm stays where its rows have the bits of the layers that it goes around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.dual_gemm import DualGemm

from margingate.config import GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.probe import startup
from margingate.runtime.probe.measuring import classes
from margingate.runtime.probe.operators.observed_calls import ROWS, observing
from margingate.runtime.probe.planning import dual_gemm, execute

WIDTH, INNER, MOST = 24, 512, 16


class Linear(torch.nn.Module):
    """As SGLang's: its method does the work, and a bias is returned beside the result."""

    def __init__(self) -> None:
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(2 * INNER, WIDTH), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x), None


class Kernel(DualGemm):
    """SGLang's object, which says when it runs; the kernel itself needs a Blackwell GPU."""

    def __init__(self, fused: Any) -> None:
        self.mode, self.max_tokens, self.tp_size, self.fused = "unquantized", MOST, 1, fused

    def __call__(self, x, gate_up_proj):
        return self.fused(x, in_order(x, gate_up_proj.weight))


def in_order(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gate, up and activation with the same bits for a row in any forward."""
    both = (x.double() @ weight.double().T).float()
    return torch.relu(both[:, :INNER]) * both[:, INNER:]


class Mlp(torch.nn.Module):
    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.gate_up_proj = Linear()
        self.act_fn = lambda both: torch.relu(both[:, :INNER]) * both[:, INNER:]
        self.dual_gemm = Kernel(fused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dual_gemm.can_run(x, self.gate_up_proj):
            return self.dual_gemm(x, self.gate_up_proj)
        return self.act_fn(self.gate_up_proj(x)[0])


@pytest.fixture(autouse=True)
def by_rows(monkeypatch):
    """The layer gives a row the same bits in any forward, as its plan sees to."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    def apply(_method, layer, x, bias=None):
        return (x.double() @ layer.weight.double().T).float()

    monkeypatch.setattr(UnquantizedLinearMethod, "apply", apply)
    monkeypatch.delenv(dual_gemm.FORCED, raising=False)


def model_of(fused: Any, layers: int = 3) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(Mlp(fused) for _ in range(layers))


def is_on(model: torch.nn.ModuleList) -> set[bool]:
    return {mlp.dual_gemm.mode is not None for mlp in model}


def same(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return found


def other(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return found * (1 + 2**-20)


def other_above_8(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return found if len(x) <= 8 else other(x, found)


def by_neighbours(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return found + x.sum() * 2**-20


def other_for_some(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """For inputs that the probe's one sample of rows does not have."""
    return torch.where(x[:, :1] < 0.3, found, other(x, found)) if len(x) > 1 else found


def fails(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image\nis available")


def test_a_kernel_with_the_layers_bits_stays():
    model = model_of(same)
    (found,) = dual_gemm.settle(model, prefill=True)
    assert is_on(model) == {True}
    assert found.classes == dict.fromkeys(range(1, MOST + 2), 0)
    assert found.plan == RowPlan(((1, MOST),)) and found.prefill
    assert (found.kind, found.name, found.modules) == (dual_gemm.KIND, "0.dual_gemm", 3)
    assert classes.Finding.from_record(found.record()) == found


@pytest.mark.parametrize("fused", [other, other_above_8, by_neighbours, other_for_some, fails])
def test_a_kernel_with_other_bits_is_off_in_every_layer(fused, caplog):
    model = model_of(fused)
    with caplog.at_level("INFO"):
        (found,) = dual_gemm.settle(model, prefill=True)
    assert is_on(model) == {False} and "DualGemm is off" in caplog.text
    assert found.plan is None and len(set(found.classes.values())) > 1
    assert found.prefill, "the layers do all the work then"
    x = torch.randn(3, WIDTH)
    assert torch.equal(model[1](x), in_order(x, model[1].gate_up_proj.weight))


def test_a_kernel_is_off_where_the_layers_have_other_bits_in_prefills(monkeypatch):
    """A prefill of few rows would go to the kernel, which has the bits of decode steps."""
    model = model_of(same)
    plan = {id(model[0].gate_up_proj): RowPlan(((64, 128),))}
    monkeypatch.setattr(execute, "_prefill_plans", plan)
    (found,) = dual_gemm.settle(model, prefill=True)
    assert is_on(model) == {False} and found.plan is None


def test_each_shape_is_measured_by_itself():
    model = model_of(same, 2)
    wide = Mlp(other)
    wide.gate_up_proj.weight = torch.nn.Parameter(torch.randn(4 * INNER, WIDTH))
    wide.act_fn = lambda both: both[:, :INNER]
    model.append(wide)
    first, second = dual_gemm.settle(model, prefill=False)
    assert (first.plan is None, second.plan is None) == (False, True)
    assert [mlp.dual_gemm.mode is not None for mlp in model] == [True, True, False]


@pytest.mark.parametrize(("forced", "fused", "on"), [("keep", other, True), ("off", same, False)])
def test_a_benchmark_may_choose(monkeypatch, forced, fused, on):
    monkeypatch.setenv(dual_gemm.FORCED, forced)
    model = model_of(fused)
    (found,) = dual_gemm.settle(model, prefill=False)
    assert is_on(model) == {on} and (found.plan is not None) is on
    assert len(set(found.classes.values())) == (2 if fused is other else 1), "it is measured still"


def test_another_choice_is_refused(monkeypatch):
    monkeypatch.setenv(dual_gemm.FORCED, "yes")
    with pytest.raises(GateError, match="MARGINGATE_DUAL_GEMM is yes: set it to one of measure, "):
        dual_gemm.settle(model_of(same), prefill=False)


def test_a_kernel_that_is_off_is_nobodys():
    model = model_of(other)
    for mlp in model:
        mlp.dual_gemm.mode = None
    assert dual_gemm.settle(model, prefill=True) == []


def test_a_kernel_in_a_module_of_another_build_is_refused():
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.fused = Kernel(same)
    with pytest.raises(GateError, match=r"cannot measure experts\.fused, a DualGemm in a Module"):
        dual_gemm.settle(model, prefill=False)


def test_layers_are_seen_while_it_is_off_and_refused_where_it_hides_them():
    model = model_of(same)
    x = torch.randn(ROWS, WIDTH)

    def step() -> None:
        for mlp in model:
            mlp(x)

    with torch.inference_mode(), observing(model, ROWS) as hidden:
        step()
    operators = classes.groups(model, hidden)
    with pytest.raises(GateError, match=r"cannot measure 0.gate_up_proj, a Linear: a decode step"):
        startup.refuse_unknown(model, operators, hidden)
    with (
        torch.inference_mode(),
        dual_gemm.switched_off(model),
        observing(model, ROWS) as seen,
    ):
        step()
    assert is_on(model) == {True}, "only meanwhile"
    startup.refuse_unknown(model, operators, seen)
    with pytest.raises(ZeroDivisionError), dual_gemm.switched_off(model):
        raise ZeroDivisionError
    assert is_on(model) == {True}


def test_sglangs_own_mlps_are_built_so():
    """What the probe reads of them; on a CPU SGLang itself switches the kernel off."""
    from sglang.srt.models.llama import LlamaMLP
    from sglang.srt.models.qwen2 import Qwen2MLP
    from sglang.srt.runtime_context import get_context, get_parallel

    with get_context().override_server_args(), get_parallel().override(tp_rank=0, tp_size=1):
        for kind in (LlamaMLP, Qwen2MLP):
            mlp = kind(64, 128, "silu")
            assert type(mlp.dual_gemm) is DualGemm and mlp.dual_gemm.mode is None
            mlp.dual_gemm.mode, mlp.dual_gemm.max_tokens = "unquantized", MOST
            (member,) = dual_gemm.members(mlp)
            assert member.weight is mlp.gate_up_proj.weight and member.most == MOST
