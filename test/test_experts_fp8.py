"""Experts in FP8: described, measured beside loud rows, with large tiles; and who is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8MoE
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8FP8MoEMethod

from benchmark.models.fp8_blocks import BLOCK, from_blocks, to_blocks
from margingate.config import GateError
from margingate.runtime.compat.compute import quantization, routers
from margingate.runtime.compat.host.fp8 import fp8_experts, round_to_fp8
from margingate.runtime.probe import startup
from margingate.runtime.probe.checks import loaded_model
from margingate.runtime.probe.measuring import sample_sizes
from margingate.runtime.probe.measuring.classes import probe_operator, row_counts
from margingate.runtime.probe.operators import expert_tiles
from margingate.runtime.probe.operators.observed_calls import ObservedRows
from margingate.runtime.probe.operators.routed import Experts, routed_operators

HIDDEN, INNER, EXPERTS, CHOSEN = 128, 128, 4, 2
BF16 = torch.bfloat16
SEEN = ObservedRows(
    ((HIDDEN, BF16), (CHOSEN, torch.float32), (CHOSEN, torch.int32), (EXPERTS, BF16)),
    torch.device("cpu"),
)
CONFIG = SimpleNamespace(activation="silu", routed_scaling_factor=None)


def made(kind: type, **attributes: Any) -> Any:
    """SGLang's method of this class, whose constructors ask for a server."""
    method = object.__new__(kind)
    if isinstance(method, torch.nn.Module):
        torch.nn.Module.__init__(method)
    vars(method).update(attributes)
    return method


def in_blocks() -> Any:
    return made(Fp8MoEMethod, use_mxfp8=False, weight_block_size=[BLOCK, BLOCK])


class Mixture(torch.nn.Module):
    """SGLang's FusedMoE as far as the probe sees it, with the operator of a host."""

    def __init__(self, method: Any, *, shared_scale: bool = False) -> None:
        super().__init__()
        self.quant_method, self.moe_runner_config = method, CONFIG
        self.w13_weight, self.w13_weight_scale_inv = blocks(2 * INNER, HIDDEN)
        self.w2_weight, self.w2_weight_scale_inv = blocks(HIDDEN, INNER)
        self.w13_input_scale: Any = None
        self.shared_scale = shared_scale

    def run_moe_core(self, dispatch_output: Any) -> Any:
        """Row by row, so that no product's number of rows plays a part."""
        hidden, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        if self.shared_scale:
            scale = hidden.float().abs().max() / 448
            hidden = ((hidden.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(BF16)
        rows = [
            fp8_experts(
                hidden[[i]],
                self.w13_weight,
                self.w2_weight,
                (chosen.topk_weights[[i]], chosen.topk_ids[[i]], None),
                CONFIG,
                w1_scale=self.w13_weight_scale_inv,
                w2_scale=self.w2_weight_scale_inv,
                block_shape=[BLOCK, BLOCK],
            )
            for i in range(len(hidden))
        ]
        return SimpleNamespace(hidden_states=torch.cat(rows))


def blocks(outputs: int, columns: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Weights and scales of all experts."""
    generator = torch.Generator().manual_seed(outputs)
    drawn = torch.randn(EXPERTS, outputs, columns, generator=generator) / columns**0.5
    pairs = [to_blocks(each) for each in drawn]
    weights, scales = (torch.stack(part) for part in zip(*pairs, strict=True))
    frozen = torch.nn.Parameter(weights, requires_grad=False)
    return frozen, torch.nn.Parameter(scales, requires_grad=False)


@given(st.integers(1, 12), st.sampled_from([None, 2.0]))
def test_the_hosts_experts_are_those_of_the_rounded_numbers(rows, factor):
    mixture = Mixture(in_blocks())
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(-1)[:, :CHOSEN]
    weights = torch.rand(rows, CHOSEN, generator=generator)
    found = fp8_experts(
        x,
        mixture.w13_weight,
        mixture.w2_weight,
        (weights, ids, None),
        SimpleNamespace(activation="silu", routed_scaling_factor=factor),
        w1_scale=mixture.w13_weight_scale_inv,
        w2_scale=mixture.w2_weight_scale_inv,
        block_shape=[BLOCK, BLOCK],
        use_fp8_w8a8=True,
    )
    for i in range(rows):
        expected = torch.zeros(HIDDEN)
        for weight, expert in zip(weights[i], ids[i].tolist(), strict=True):
            first = from_blocks(mixture.w13_weight[expert], mixture.w13_weight_scale_inv[expert])
            second = from_blocks(mixture.w2_weight[expert], mixture.w2_weight_scale_inv[expert])
            gate, up = (first @ round_to_fp8(x[[i]], BLOCK)[0]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected += weight * (second @ round_to_fp8(inner[None], BLOCK)[0])
        # A product's last bit may round an input of the second one to the next FP8 number.
        assert (found[i] - expected * (factor or 1)).norm() <= 0.02 * expected.norm() * 2


def test_experts_in_fp8_are_an_operator_whose_signature_says_their_scales():
    found = {}
    for method in (in_blocks(), made(W8A8FP8MoEMethod)):
        mixture = Mixture(method)
        (operator,) = routed_operators(torch.nn.ModuleList([mixture]), {id(mixture): SEEN})
        assert isinstance(operator, Experts)
        found[type(method)] = operator.signature
    assert "Fp8MoEMethod [128, 128] groups of a row [4, 2, 1]" in found[Fp8MoEMethod]
    assert "W8A8FP8MoEMethod None a row" in found[W8A8FP8MoEMethod]


def test_loud_neighbours_find_a_scale_that_rows_share(monkeypatch):
    """Rows of one size may round alike by a common scale: so the sample alone need not show it."""
    monkeypatch.setattr(sample_sizes, "ROUNDED", 1)  # no sum is looked for in another order
    own = Experts("experts", Mixture(in_blocks()), SEEN)
    assert set(probe_operator(own, row_counts(6)).values()) == {0}
    assert len(own.company(own.sample(8), 3, 4)) == 4
    quiet, loud = own.company(own.sample(8), 3, 4)[1:3]
    assert torch.equal(loud[0].parts[0][3], quiet[0].parts[0][3]), "the row itself stays"
    assert loud[0].parts[0][0].abs().max() > 500 * quiet[0].parts[0][0].abs().max()
    shared = Experts("experts", Mixture(in_blocks(), shared_scale=True), SEEN)
    assert probe_operator(shared, row_counts(6)) == {1: 0}, "it would run row by row"


def test_experts_of_other_kinds_are_not_measured():
    assert quantization.are_known(Mixture(made(UnquantizedFusedMoEMethod)))
    assert not quantization.are_known(
        Mixture(made(Fp8MoEMethod, use_mxfp8=True, weight_block_size=[1, 32]))
    )
    other = Mixture(object())
    assert list(routed_operators(torch.nn.ModuleList([other]), {id(other): SEEN})) == []


def scheme(strategy: str) -> Any:
    quant = SimpleNamespace(strategy=strategy)
    return made(CompressedTensorsW8A8Fp8MoE, weight_quant=quant, weight_block_size=None)


@pytest.mark.parametrize(
    ("method", "scale", "expected"),
    [
        (in_blocks(), None, quantization.BLOCKS),
        (made(W8A8FP8MoEMethod), None, quantization.TOKENS),
        (scheme("channel"), None, quantization.TOKENS),
        (scheme("tensor"), None, quantization.BATCH),
        (scheme("tensor"), torch.ones(()), quantization.GIVEN),
        (made(Fp8MoEMethod, use_mxfp8=False, weight_block_size=None), None, quantization.BATCH),
    ],
    ids=["blocks", "w8a8", "channels", "tensor", "given", "by the server"],
)
def test_what_a_scale_is_made_of(method, scale, expected, monkeypatch):
    mixture = Mixture(method)
    mixture.w13_input_scale = scale
    assert quantization.are_known(mixture)
    assert quantization.rounding(mixture) == expected
    monkeypatch.setattr(loaded_model, "experts", lambda model: [("layer.experts", model)])
    if expected != quantization.BATCH:
        loaded_model.refuse_layers(mixture)
        return
    with pytest.raises(GateError, match=r"layer\.experts to FP8 by one scale .*weight_block_size"):
        loaded_model.refuse_layers(mixture)
    # Before anything of it is looked at or measured: this runner has nothing else.
    runner = SimpleNamespace(is_draft_worker=False, model=mixture)
    with pytest.raises(GateError, match=r"layer\.experts to FP8 by one scale"):
        startup.before_graphs(runner)


def test_unquantized_experts_round_nothing():
    mixture = Mixture(made(UnquantizedFusedMoEMethod))
    mixture.w13_weight = torch.nn.Parameter(torch.ones(2, 2, 2))
    assert quantization.rounding(mixture) == quantization.NONE
    assert routers.experts(mixture) == []


def tuned(tiles: dict[int, int]) -> Any:
    """As SGLang looks a tile up: that of the nearest tuned number of rows."""

    def find(w1: Any, w2: Any, top_k: int, dtype: str, rows: int, down: bool = False) -> Any:
        nearest = min(tiles, key=lambda each: abs(each - rows))
        config = {"BLOCK_SIZE_M": tiles[nearest], "tuned for": nearest}
        return (config, (None, None)) if down else config

    return find


def tiles_at(rows: int, tiles: dict[int, int], dtype: str = expert_tiles.FP8, **more: Any) -> Any:
    """By weights of a shape of their own, since tiles are looked for once for each shape."""
    shape = tuple(tiles.items())
    return expert_tiles.tuned_tiles(tuned(tiles), shape, (), 8, dtype, rows, **more)


def test_few_rows_get_the_tiles_of_more():
    """As SGLang's file for Qwen3-30B-A3B-FP8 on an H200 has them."""
    of_h200 = {1: 64, 2: 64, 4: 16, 128: 16, 256: 64, 4096: 64}
    assert [tiles_at(rows, of_h200)["tuned for"] for rows in (1, 2, 4, 64, 100, 300)] == [
        *(1, 2, 256, 256, 256, 256)
    ]
    assert tiles_at(8, of_h200, down=True)[0]["BLOCK_SIZE_M"] == 64
    assert tiles_at(8, of_h200, "int8_w8a8")["BLOCK_SIZE_M"] == 16
    assert tiles_at(8, {1: 16, 64: 32})["tuned for"] == 1, "there are no large ones"


def test_larger_tiles_are_looked_for_once():
    asked: list[int] = []

    def find(w1: Any, w2: Any, top_k: int, dtype: str, rows: int, **_more: Any) -> Any:
        asked.append(rows)
        return {"BLOCK_SIZE_M": 64 if rows >= 32 and w1 == (1, 2) else 16, "tuned for": rows}

    def tiles(shape: tuple[int, ...], rows: int, **more: Any) -> Any:
        asked.clear()
        given = expert_tiles.FP8, rows
        return expert_tiles.tuned_tiles(find, shape, (3,), 4, *given, **more)["tuned for"]

    assert (tiles((1, 2), 8), asked) == (32, [8, 16, 32, 32])
    assert (tiles((1, 2), 8), asked) == (32, [32])
    assert tiles((1, 2), 5) == 40, "another row count has others"
    assert tiles((1, 2), 8, block_shape=[64, 64]) == 32 and len(asked) == 4, "so may other scales"
    assert tiles((2, 2), 8) == 8 and len(asked) > 8
    assert (tiles((2, 2), 8), asked) == (8, [8]), "that there are none is known, too"
