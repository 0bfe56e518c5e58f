"""Calls as a plan has them: padded, in pieces, by the kernel, and of more rows than it is for."""

from __future__ import annotations

import math

import pytest
import torch
from row_classes import Layer, in_order, kept, split_by_count

from margingate.core.rowclass import Route
from margingate.runtime.probe.planning import execute


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 40])
def test_pieces_and_padding_keep_the_bits(rows):
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    one_by_one = torch.cat([split_by_count(row[None]) for row in x])
    assert torch.equal(execute.run_in_class(kept(1, 8), x, split_by_count), one_by_one)
    nine = torch.cat([split_by_count(row.expand(9, -1))[:1] for row in x])
    assert torch.equal(execute.run_in_class(kept(9, 64), x, split_by_count), nine)


def test_routes_take_kernel_or_operator_padded_or_not():
    routes = (Route(2, kernel=True), Route(4, kernel=True, padded=6), Route(7, False, padded=8))
    plan, made = kept(8, 16, routes=routes), []

    def called(name):
        def call(x):
            made.append((name, len(x)))
            return x + 1

        return call

    for rows in (1, 2, 3, 4, 5, 7, 8, 16, 20):
        x = torch.randn(rows, 3)
        found = execute.run_in_class(plan, x, called("operator"), called("kernel"))
        assert torch.equal(found, x + 1)
    assert made == [
        *(("kernel", n) for n in (1, 2, 6, 6)),
        *(("operator", n) for n in (8, 8, 8, 16, 10, 10)),
    ]


@pytest.fixture
def calls(monkeypatch):
    """A linear method, and the plans of a process of its own; the row counts it is called with."""
    monkeypatch.setattr(execute, "_plans", {})
    monkeypatch.setattr(execute, "_limit", 64)
    return []


def apply(calls, layer, rows):
    def original(_method, _layer, x, _bias):
        calls.append(len(x))
        return split_by_count(x)

    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = execute.apply_linear(original, None, layer, x)
    head = execute.compute_lm_head(
        lambda _p, hidden, lm_head, bias, **_: original(None, lm_head, hidden, bias), None, x, layer
    )
    assert torch.equal(found, head) and len(calls) % 2 == 0
    half = len(calls) // 2
    assert calls[:half] == calls[half:]
    made, calls[:] = calls[:half], []
    return x, found, made


def test_lm_head_is_handed_the_buffer_where_the_whole_forward_fits_the_plan(calls):
    """A result that is not the buffer is copied there by SGLang."""
    head, buffer = Layer(), torch.zeros(9, 24)
    execute._plans[id(head)] = kept(9, 32)
    given = []

    def original(_processor, hidden, _head, _bias, *, out=None):
        given.append((len(hidden), out))
        return split_by_count(hidden) if out is None else out

    def logits(rows, out):
        hidden = torch.randn(rows, 40).bfloat16()
        return execute.compute_lm_head(original, None, hidden, head, out=out)

    assert logits(9, buffer) is buffer and given.pop() == (9, buffer)
    assert logits(5, buffer) is not buffer and given.pop() == (9, None)
    assert given == []


def test_calls_above_the_limit_are_left_alone_unless_plans_hold_for_prefill(calls, monkeypatch):
    layer = Layer()
    execute._plans[id(layer)] = kept(9, 32)
    assert not execute.covers_prefill()
    assert apply(calls, layer, 100)[2] == [100]
    assert apply(calls, layer, 64)[2] == [32, 32] and apply(calls, layer, 5)[2] == [9]
    monkeypatch.setattr(execute, "_limit", math.inf)
    assert execute.covers_prefill()
    x, found, made = apply(calls, layer, 100)
    assert made == [25, 25, 25, 25]
    expected = torch.cat([split_by_count(row.expand(9, -1))[:1] for row in x])
    assert torch.equal(found, expected) and apply(calls, layer, 32)[2] == [32]
    assert apply(calls, Layer(), 100)[2] == [100], "a layer without a plan"


def test_a_layer_with_two_plans_is_called_by_the_phase_of_the_forward(calls, monkeypatch):
    layer, other = Layer(), Layer()
    execute._plans |= {id(layer): kept(9, 32), id(other): kept(9, 32)}
    monkeypatch.setattr(execute, "_limit", math.inf)
    monkeypatch.setattr(execute, "_prefill_plans", {})
    execute.keep_prefills_to(torch.nn.Module(), {id(layer): kept(64, 128)})
    assert execute.borders() >= {9, 32, 64, 128} and execute.differs_in_prefill(layer)
    assert not execute.differs_in_prefill(other)
    for is_prefill, made in ((False, [9]), (True, [64])):
        monkeypatch.setattr(execute.forward_phase, "_prefills", is_prefill)
        assert apply(calls, layer, 5)[2] == made and apply(calls, other, 5)[2] == [9]
    assert apply(calls, layer, 200)[2] == [100, 100]


def test_the_kernel_takes_calls_of_any_size(calls, monkeypatch):
    layer = Layer()
    execute._plans[id(layer)] = kept(1, 32, batch_invariant=True)
    monkeypatch.setattr(execute, "_limit", math.inf)
    monkeypatch.setattr(
        execute, "invariant_matmul", lambda x, *, weight, bias: in_order(x) + (bias or 0)
    )
    x, found, made = apply(calls, layer, 100)
    assert made == [] and torch.equal(found, in_order(x))
