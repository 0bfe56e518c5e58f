"""The probe of row classes: what it finds of an operator, and at which row counts it looks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from row_classes import WEIGHT, in_order, made_up, split_by_count

from margingate.config import GateError
from margingate.core.rowclass import choose
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.probe import startup
from margingate.runtime.probe.measuring.classes import (
    RowDependenceError,
    extended,
    groups,
    prefill_counts,
    probe_operator,
    row_counts,
)
from margingate.runtime.probe.operators.operator import MadeUp
from margingate.runtime.probe.planning import plans


def leaky(x: torch.Tensor) -> torch.Tensor:
    """A row's result depends on its neighbours, through the largest value of the whole call."""
    return x @ WEIGHT.T + x.abs().max() / 8


def test_the_probe_separates_the_classes():
    classes = probe_operator(made_up(split_by_count), row_counts(32))
    assert {count for count, key in classes.items() if key == 0} == set(range(1, 9))
    assert choose(classes).high in (8, 32)


def test_the_probe_says_no_to_a_row_that_depends_on_its_neighbours():
    with pytest.raises(RowDependenceError) as caught:
        probe_operator(made_up(leaky), row_counts(16))
    assert caught.value.rows > 1


class Broken(torch.nn.Module):
    """A model whose only linear layer leaks between rows."""

    def __init__(self) -> None:
        super().__init__()
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        class Leaky(UnquantizedLinearMethod):
            def apply(self, layer, x, bias=None):
                return leaky(x)

        self.down_proj = torch.nn.Module()
        self.down_proj.weight = torch.nn.Parameter(WEIGHT, requires_grad=False)
        self.down_proj.quant_method = Leaky()


def test_a_model_with_such_a_layer_is_refused_by_name():
    with pytest.raises(GateError, match=r"cannot use down_proj: with \d+ rows"):
        plans.probe_groups(groups(Broken()), 16)


def test_larger_counts_are_in_a_class_with_their_bits_or_in_a_new_one():
    classes = {1: 0, 4: 0, 8: 0}
    counts = [100, 257, 300]
    assert extended(made_up(in_order), classes, counts) == dict.fromkeys(
        (1, 4, 8, 100, 257, 300), 0
    )
    found = extended(made_up(split_by_count), classes, counts)
    assert found == {**classes, 100: 1, 257: 1, 300: 1}
    assert classes == {1: 0, 4: 0, 8: 0}

    def breaks(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) if x.shape[0] <= 256 else in_order(x) + 1

    found = extended(made_up(breaks), {1: 0, 2: 0, 8: 0}, counts)
    assert found == {1: 0, 2: 0, 8: 0, 100: 0, 257: 1, 300: 1}
    # A hole at the largest small count is no reason to leave the others' class.
    holed = {count: int(count == 16) for count in range(1, 17)}

    def at_16(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + (len(x) == 16)

    assert extended(made_up(at_16), holed, [100, 257]) == {**holed, 100: 0, 257: 0}


def test_a_block_or_a_rest_that_differs_is_seen():
    """Rows repeat in blocks of the largest count: each block is compared, and the rest too."""
    for row in (0, 9, 16, 18):

        def spoils(x: torch.Tensor, row: int = row) -> torch.Tensor:
            out = in_order(x)
            if len(out) > row and len(out) > 8:
                out[row] += 1
            return out

        assert extended(made_up(spoils), {1: 0, 8: 0}, [19])[19] == 1, row


def test_rows_that_depend_on_their_neighbours_are_in_no_class_of_smaller_calls():
    """On repeated rows only a call with others beside them shows it, hence the sum."""

    def summed(x: torch.Tensor) -> torch.Tensor:
        return in_order(x) + x.sum() / 8

    assert extended(made_up(summed), {1: 0, 8: 0}, [24])[24] == 1


def test_prefill_is_probed_where_the_gates_attention_runs_and_prompts_may_share(monkeypatch):
    monkeypatch.setattr(ranks, "group", lambda: None)
    monkeypatch.setattr(startup, "_rows_in_memory", lambda _operators: 4096)
    graphs = SimpleNamespace(prefill=SimpleNamespace(bs=[4, 300, 5000]))
    args = SimpleNamespace(
        chunked_prefill_size=8192, max_prefill_tokens=16384, cuda_graph_config=graphs, dp_size=1
    )
    runner = SimpleNamespace(attn_backend=SimpleNamespace(margingate=object()), server_args=args)
    config = SimpleNamespace(prefill="auto")
    counts = startup._prefill_counts
    assert counts(runner, config, {}, 256) == prefill_counts(256, 4096, [300])
    assert 300 in counts(runner, config, {}, 256)
    monkeypatch.setattr(startup, "_rows_in_memory", lambda _operators: 1 << 30)
    assert max(counts(runner, config, {}, 256)) == 8192
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "of_all", lambda rows: [rows, 2048])
        assert max(counts(runner, config, {}, 256)) == 2048, "what the rank with least room has"
    with monkeypatch.context() as patch:
        patch.setattr(replicas, "of_all", lambda _args, _name, rows: [rows, 1024])
        assert max(counts(runner, config, {}, 256)) == 1024, "and the replica"
    args.chunked_prefill_size = -1
    assert max(counts(runner, config, {}, 256)) == startup.MOST_PREFILLED
    args.chunked_prefill_size = 64
    assert counts(runner, config, {}, 256) == [257], "no larger than what decode has anyway"
    assert counts(runner, SimpleNamespace(prefill="alone"), {}, 256) == []
    assert counts(runner, None, {}, 256) == []
    runner.attn_backend = object()
    assert counts(runner, config, {}, 256) == []


@dataclass(frozen=True)
class Decoded(MadeUp):
    is_capped, sees_prefill = True, False


def test_replicas_agree_on_the_largest_step_whatever_operators_each_has(monkeypatch):
    """One of them may have no memory to unpack a layer: the others would wait for it an hour."""
    asked = []

    def of_all(_args, _name, requests):
        asked.append(requests)
        return [requests, 24]

    monkeypatch.setattr(ranks, "group", lambda: None)
    monkeypatch.setattr(replicas, "of_all", of_all)
    monkeypatch.setattr(startup, "places", lambda *_: 48)
    runner = SimpleNamespace(attn_backend=None, server_args=None)
    decoded = Decoded("o", None, function=in_order, width=4, like=None)
    assert startup._busiest(runner, {"one": [decoded]}, 256) == 24
    assert startup._busiest(runner, {"one": [made_up(in_order)]}, 256) == 256
    assert asked == [48, 48]
