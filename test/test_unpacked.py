"""Prefills of layers by Marlin with unpacked weights; a host's layers stand in for Marlin's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_marlin import host, packed, rows  # noqa: F401
from triton.runtime.errors import OutOfResources

from margingate.core.rowclass import RowPlan
from margingate.runtime.probe.operators import forward_phase, unpacked
from margingate.runtime.probe.operators.observed_calls import ObservedCall
from margingate.runtime.probe.operators.operator import Norm, Packed
from margingate.runtime.probe.planning import execute, plans


@pytest.fixture
def unpacks(monkeypatch) -> Iterator[None]:
    """Layers of a host are unpacked as if Marlin had them."""
    monkeypatch.setattr(unpacked, "DEVICES", ("cpu",))
    monkeypatch.setattr(unpacked, "_kinds", {})
    monkeypatch.setattr(unpacked.marlin, "weights", lambda layer: layer)
    monkeypatch.setattr(unpacked, "unpack_marlin", lambda layer: layer.unpacked.bfloat16())
    monkeypatch.setattr(unpacked.ranks, "of_all", lambda value: [value])
    yield


def operators(form: str = "awq", count: int = 2) -> dict[str, list[Any]]:
    layers = [packed(form, seed)[0] for seed in range(1, count + 1)]
    call = ObservedCall(width=128)
    same = [Packed(f"layers.{i}.o_proj", layer, call) for i, layer in enumerate(layers)]
    norm = Norm("norm", torch.nn.RMSNorm(4))
    return {same[0].signature: same, norm.signature: [norm]}


@pytest.mark.usefixtures("unpacks")
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_layer_is_measured_twice_for_decode_and_for_prefill(form):
    before = operators(form)
    found = unpacked.settle(torch.nn.Module(), before)
    decoded, prefilled, norm = found.values()
    assert [each.name for each in decoded] == ["layers.0.o_proj", "layers.1.o_proj"]
    assert not decoded[0].sees_prefill and decoded[0].is_capped and decoded[0].is_planned
    (first,) = prefilled
    assert first.sees_prefill and not first.is_capped and first.kind == "unpacked linear"
    assert first.name == "layers.0.o_proj, unpacked", "plans go by names"
    assert first.shape == (64, 128) and first.sample(3).dtype == torch.bfloat16
    x = rows(5)
    expected = torch.nn.functional.linear(x, decoded[0].module.unpacked.bfloat16())
    assert torch.equal(first.run(x), expected)
    assert {name for name in found if name in before} == {norm[0].signature}
    kinds = {unpacked.kind_of(each.module) for each in decoded}
    assert kinds == {first.module} and unpacked.kind_of(norm[0].module) is None
    unpacked.release()
    assert first.module._held is None


@pytest.mark.usefixtures("unpacks")
def test_kinds_that_only_marlin_tells_apart_all_have_the_plan():
    """As where a checkpoint has groups of 32 inputs in some layers and of 64 in others."""
    one, other = operators(count=1), operators("gptq", count=1)
    found = unpacked.settle(torch.nn.Module(), one | other)
    (prefilled,) = [same for same in found.values() if same[0].kind == unpacked.Unpacked.kind]
    kinds = {
        unpacked.kind_of(same[0].module) for name, same in (one | other).items() if "packed" in name
    }
    assert {each.module for each in prefilled} == kinds and len(kinds) == 2
    plan = RowPlan([(2, 4)])
    finding = SimpleNamespace(name=prefilled[0].name, plan=plan)
    assert plans.plans(found, [finding]) == {id(kind): plan for kind in kinds}


@pytest.mark.usefixtures("unpacks")
def test_a_bias_and_replicas_of_a_layer(monkeypatch):
    """The bias, which is added to rounded results, leaves the batch-invariant kernel in."""
    monkeypatch.setattr(Packed, "is_replicated", True)
    (same, _), (layer, _) = operators(count=1).values(), packed("awq")
    layer.bias = torch.arange(64).bfloat16()
    biased = replace(same[0], module=layer, call=replace(same[0].call, bias=True))
    found = unpacked.settle(torch.nn.Module(), {biased.signature: [biased]})
    (prefilled,) = [same[0] for same in found.values() if same[0].kind == unpacked.Unpacked.kind]
    assert prefilled.is_replicated and prefilled.weight is prefilled.module.weight
    x = rows(5)
    assert torch.equal(prefilled.run(x), torch.nn.functional.linear(x, prefilled.weight))


@pytest.mark.usefixtures("unpacks")
@pytest.mark.parametrize("broken", ["other", "no kernel", "no room", "reordered"])
def test_a_layer_that_cannot_be_unpacked_stays_with_marlin(monkeypatch, caplog, broken):
    def other(layer: Any) -> torch.Tensor:
        if broken == "no kernel":
            raise RuntimeError("no such kernel\nat all")
        if broken == "no room":
            raise OutOfResources(2, 1, "shared memory")
        found: torch.Tensor = layer.unpacked.bfloat16()
        found[63, 127] *= 1.0078125  # by the last bit
        return found

    monkeypatch.setattr(unpacked, "unpack_marlin", other)
    if broken == "reordered":
        monkeypatch.setattr(unpacked.marlin, "weights", lambda layer: None)
    before = operators()
    assert unpacked.settle(torch.nn.Module(), before) == before
    assert all(unpacked.kind_of(each.module) is None for each in next(iter(before.values())))
    reason = {"other": "not those that Marlin multiplies by", "no kernel": "no such kernel."}
    reason["no room"] = "out of resource: shared memory"
    assert reason.get(broken, "reordered or one group") in caplog.text


@pytest.mark.usefixtures("unpacks")
def test_what_one_rank_cannot_unpack_stays_with_marlin_on_all(monkeypatch, caplog):
    """Or prompts would be the sums of both kinds."""
    monkeypatch.setattr(unpacked.ranks, "of_all", lambda value: [value, "CUDA out of memory"])
    before = operators()
    assert unpacked.settle(torch.nn.Module(), before) == before and not unpacked._kinds
    assert "64 rows at a time at most: CUDA out of memory." in caplog.text


@pytest.mark.usefixtures("unpacks")
def test_a_prefill_runs_unpacked_and_a_decode_step_by_marlin(monkeypatch):
    found = unpacked.settle(torch.nn.Module(), operators())
    decoded, (prefilled,), _ = found.values()
    kind, layer = prefilled.module, decoded[1].module
    monkeypatch.setattr(execute, "_plans", {})
    planned = {id(kind): RowPlan([(2, 4), (8, 8)]), id(layer): RowPlan([(1, 2)])}
    execute.keep_to(planned, float("inf"))
    execute.redirect(found, planned)
    weight, x, bias = layer.unpacked.bfloat16(), rows(11), torch.arange(64).bfloat16()
    marlin = layer.quant_method.apply(layer, x)
    seen: list[int] = []
    product = torch.nn.functional.linear

    def counted(piece: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(len(piece))
        return product(piece, *more)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with prefill():
        assert torch.equal(layer.quant_method.apply(layer, x), product(x, weight))
        biased = layer.quant_method.apply(layer, x[:1], bias)
    assert torch.equal(biased, product(x[:1], weight) + bias), "rounded, and then the bias"
    assert seen == [8, 3, 2]
    assert torch.equal(layer.quant_method.apply(layer, x), marlin) and len(seen) == 3


class prefill:  # noqa: N801
    """Meanwhile the forward is a prefill."""

    def __enter__(self) -> None:
        forward_phase._prefills = True

    def __exit__(self, *_raised: object) -> None:
        forward_phase._prefills = False


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        self.seen: list[bool] = []

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None):
        self.seen.append(forward_phase.is_prefill())
        if input_embeds == "raise":
            raise RuntimeError("of the model")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Body()

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any):
        self.model.forward(input_ids, positions, forward_batch)


def batch(extends: bool) -> Any:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: extends))


def test_the_phase_is_that_of_the_batch_for_the_model_and_for_its_layers_alone():
    model = Model()
    forward_phase.watch(model)
    noting = model.forward
    forward_phase.watch(model)
    assert model.forward is noting, "it is noted once"
    model.forward(0, 1, batch(True))
    model.forward(0, 1, forward_batch=batch(False))
    model.model.forward(0, 1, batch(True))
    with pytest.raises(RuntimeError, match="of the model"):
        model.model.forward(0, 1, forward_batch=batch(True), input_embeds="raise")
    assert model.model.seen == [True, False, True, True] and not forward_phase.is_prefill()
    names = list(inspect.signature(model.model.forward).parameters)
    assert names == ["input_ids", "positions", "forward_batch", "input_embeds"]
