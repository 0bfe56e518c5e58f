"""What a start checks of the gate's attention: a kind of layer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_backend import (
    CONTEXT,
    GEMMA,
    HEADS,
    TorchNativeAttnBackend,
    TritonAttnBackend,
    make,
    make_layer,
    make_runner,
)

from margingate.config import GateConfig, GateError
from margingate.runtime.attention import layer_rules
from margingate.runtime.probe.checks import check_attention
from margingate.runtime.probe.checks.attention_error import Found
from margingate.runtime.verify.verifier import build
from margingate_kernels import Rules


def found_by_check(monkeypatch: pytest.MonkeyPatch, found: Found, layers: list[Any]) -> list[Any]:
    """The kinds of layers that a start measures, which all give `found`."""
    measured: list[Any] = []

    def measure(kind: Any, dtype: Any, device: Any, longest: int) -> Found:
        assert (dtype, device, longest) == (torch.bfloat16, "cpu", CONTEXT)
        measured.append(kind)
        return found

    monkeypatch.setattr(check_attention, "measure", measure)
    backend, _, runner = make(make_runner(layers))
    check_attention.check(runner, backend)
    return measured


def test_a_start_measures_each_kind_of_layer_that_is_new(monkeypatch: pytest.MonkeyPatch):
    right = Found(0.002, same_bits=True)
    assert found_by_check(monkeypatch, right, [make_layer(0), make_layer(1)]) == []
    layers = [make_layer(i, **changes) for i, changes in enumerate(GEMMA)]
    layers.append(make_layer(6, logit_cap=30.0))
    kinds = found_by_check(monkeypatch, right, layers)
    assert [kind.rules for kind in kinds] == [Rules(127), Rules(511), Rules(cap=30.0)]
    assert all((k.heads, k.kv_heads, k.head_size, k.scale) == (4, 2, 64, 0.125) for k in kinds)
    wide = [make_layer(i, head_dim=256) for i in range(3)]
    assert [kind.head_size for kind in found_by_check(monkeypatch, right, wide)] == [256]


def test_sinks_that_a_layer_passed_are_measured():
    sinks = torch.zeros(HEADS)
    kinds = check_attention.kinds([make_layer(0), make_layer(1)], {1: Rules(sinks=sinks)})
    (kind,) = filter(check_attention.is_new, kinds)
    assert kind.rules.sinks is sinks


@pytest.mark.parametrize(
    ("found", "shares"),
    [
        ((None, None), False),  # no program would
        ((True, None), True),
        ((None, True), True),
        ((True, False), False),
        ((False,), False),
    ],
)
def test_keys_are_shared_where_a_start_found_that_it_changes_no_bit(
    monkeypatch, caplog, found: tuple[bool | None, ...], shares: bool
):
    answers = iter(found)
    monkeypatch.setattr(check_attention, "measure_shared", lambda *_: next(answers))
    monkeypatch.setattr(check_attention, "measure", lambda *_: Found(0.002, same_bits=True))
    backend, own, runner = make(make_runner([make_layer(0), make_layer(1, logit_cap=30.0)]))
    check_attention.check(runner, backend)
    assert (own._sums is not None) is shares
    assert ("has other bits where programs share" in caplog.text) is (False in found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            Found(0.02, same_bits=True),
            "a window of 127 keys before a token with an error of 0.02",
        ),
        (Found(float("nan"), same_bits=True), "with an error of nan on this device, where 0.008"),
        (Found(0.002, same_bits=False), "with other bits in decode than in prefill"),
    ],
)
def test_attention_that_is_wrong_ends_the_start(monkeypatch, found: Found, message: str):
    with pytest.raises(GateError, match=message):
        found_by_check(monkeypatch, found, [make_layer(0, sliding_window_size=127)])


def test_a_backend_of_sglangs_own_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_attention, "measure", None)
    runner = make_runner([make_layer(0, sliding_window_size=127)])
    check_attention.check(runner, TritonAttnBackend())


def test_the_prompt_that_is_compared_is_longer_than_a_window():
    layers = [make_layer(i, **changes) for i, changes in enumerate(GEMMA)]
    assert layer_rules.windows_of(torch.nn.ModuleList(layers)) == [127, 127, 127, 511]


@pytest.mark.parametrize(("policy", "refused"), [("margin", True), ("observe", False)])
def test_a_verifier_on_a_cpu_leaves_out_no_cap(policy: str, refused: bool):
    """A study may look at margins, whatever the model has."""
    runner = make_runner([make_layer(0, logit_cap=50.0)])
    runner.attn_backend = TorchNativeAttnBackend()
    config = GateConfig(fast_path="stock", policy=policy, rows=4)
    if not refused:
        assert build(runner, config).rows == 4
        return
    with pytest.raises(GateError, match="caps scores at 50 by TorchNativeAttnBackend"):
        build(runner, config)
