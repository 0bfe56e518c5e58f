"""Which layers the gate's attention takes, and those with windows, caps, sinks and two pools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_backend
from sglang.srt.layers.radix_attention import AttentionType
from triton_backend import (
    CONTEXT,
    GEMMA,
    HEADS,
    KV_HEADS,
    POOL,
    SIZE,
    FlashInferAttnBackend,
    Kernels,
    TorchNativeAttnBackend,
    TritonAttnBackend,
    decode,
    extend,
    make,
    make_layer,
    make_runner,
    prefill_batch,
)

from margingate.config import GateError
from margingate.runtime.attention import fixed_split, invariant_attention, layer_rules
from margingate.runtime.attention.invariant_attention import MOST_ROWS, OwnAttention
from margingate.runtime.attention.layer_rules import unfit
from margingate.runtime.compat.kv import window_pool
from margingate_kernels import Rules, listed_keys

# Pytest finds a fixture by its name here.
kernels = triton_backend.kernels


# -- what does not fit


def test_what_is_not_triton_on_cuda_does_not_fit():
    on_cuda = make_runner(device="cuda")
    assert unfit(TritonAttnBackend(), on_cuda) == ""
    assert "not Triton's on CUDA" in unfit(TritonAttnBackend(), make_runner())
    assert "not Triton's on CUDA" in unfit(FlashInferAttnBackend(), on_cuda)
    assert "no attention layers" in unfit(TritonAttnBackend(), make_runner([], device="cuda"))


@pytest.mark.parametrize(
    ("changes", "store"),
    [
        ({"dtype": torch.float32}, torch.float32),
        ({}, torch.float8_e4m3fn),
        ({}, torch.float16),
        ({}, None),
    ],
)
def test_a_cache_of_another_dtype_does_not_fit(changes: dict[str, Any], store: Any):
    runner = make_runner(device="cuda", **changes)
    runner.token_to_kv_pool.store_dtype = store
    assert "not the model's dtype" in unfit(TritonAttnBackend(), runner)
    half = make_runner(device="cuda", dtype=torch.float16)
    half.token_to_kv_pool.store_dtype = torch.float16
    assert unfit(TritonAttnBackend(), half) == ""


@pytest.mark.parametrize("changes", [{"use_mla": True}, {"dcp_size": 2}])
def test_columns_that_are_latent_or_spread_do_not_fit(changes: dict[str, Any]):
    backend = TritonAttnBackend()
    vars(backend).update(changes)
    assert "latent or spread" in unfit(backend, make_runner(device="cuda"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v_head_dim": 128}, "a head has 64 lanes"),
        ({"logit_cap": 30.0, "logit_capping_method": "xai"}, "a cap that is no tanh"),
        ({"is_cross_attention": True}, "a scale or a mask"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "a scale or a mask"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, "a scale or a mask"),
        ({"num_heads": 32}, "other heads than others"),
        ({"head_dim": 128}, "other heads than others"),
        ({}, ""),
        ({"logit_cap": 30.0}, ""),
        ({"sliding_window_size": 128}, ""),
    ],
)
def test_one_layer_that_does_not_fit_is_enough(changes: dict[str, Any], reason: str):
    found = unfit(
        TritonAttnBackend(), make_runner([make_layer(0), make_layer(1, **changes)], device="cuda")
    )
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 80}, "a head has 80 lanes"),
        ({"num_heads": 34}, "more than 16 heads share"),
        ({"num_heads": 32}, ""),
        ({"head_dim": 128}, ""),
        ({"head_dim": 256}, ""),
    ],
)
def test_heads_that_do_not_fit(changes: dict[str, Any], reason: str):
    found = unfit(TritonAttnBackend(), make_runner([make_layer(0, **changes)], device="cuda"))
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize("changes", [{"k_scale": torch.ones(1)}, {"xai_temperature_len": 8}])
def test_scales_and_temperatures_do_not_fit(changes: dict[str, Any]):
    layer = make_layer(0)
    for name, value in changes.items():
        setattr(layer, name, value)
    assert "a scale or a mask" in unfit(TritonAttnBackend(), make_runner([layer], device="cuda"))


def test_scales_of_one_fit():
    """A checkpoint in FP8 has such, whose K/V columns are in the model's dtype."""
    layer = make_layer(0)
    layer.k_scale, layer.k_scale_float, layer.v_scale_float = torch.ones(()), 1.0, 1.0
    assert unfit(TritonAttnBackend(), make_runner([layer], device="cuda")) == ""
    layer.v_scale_float = 0.5
    assert "a scale or a mask" in unfit(TritonAttnBackend(), make_runner([layer], device="cuda"))


# -- layers with rules of their own


def test_each_window_is_planned_once_before_the_first_layer_that_has_it(kernels: Kernels):
    runner = make_runner([make_layer(i + 3, **changes) for i, changes in enumerate(GEMMA)])
    backend, own, _ = make(runner)
    decode(backend, runner, 5)
    planned = [(len(indptr), workspace.window) for indptr, workspace in kernels.plans]
    assert planned == [(6, 127), (6, None), (6, 511)]
    one, two = ["plan_decode", "decode_attention"], ["decode_attention"]
    assert kernels.launched == one + two + one + two + one + two
    for (_, paged, _, _, workspace, rules), changes in zip(kernels.decodes, GEMMA):
        window = changes["sliding_window_size"]
        assert rules == Rules(None if window < 0 else window)
        assert workspace.window == rules.window
        assert paged.slots.tolist() == list(range(5)), "the list of all keys, not that of a window"
    assert len({id(each[4].segments.means) for each in kernels.decodes}) == 1, "one room for sums"
    assert len({id(each[4].segments.records) for each in kernels.decodes}) == 3
    assert set(own.seen) == {3, 4, 5, 6, 7, 8} and own.seen[7] == Rules(511)


def test_rows_that_attend_some_at_a_time_are_planned_for_each_layer(kernels: Kernels):
    layers = [make_layer(i, **changes) for i, changes in enumerate(GEMMA[:3])]
    runner = make_runner(layers, context=10**6, pool=900)
    backend, own, _ = make(runner)
    decode(backend, runner, 3, lengths=[own.room // 2 + 1] * 3)
    assert kernels.launched == 3 * 3 * ["plan_decode", "decode_attention"]
    assert [workspace.window for _, workspace in kernels.plans] == 3 * [127] + 3 * [127] + 3 * [
        None
    ]


def test_layers_that_all_have_a_window_need_room_for_it_alone(kernels: Kernels):
    layers = [make_layer(i, sliding_window_size=127) for i in range(2)]
    _, own, _ = make(make_runner(layers, context=100_000, pool=10**6))
    (workspace,) = own._workspaces.values()
    assert len(workspace.segments.records) == MOST_ROWS * 2, "a window lies in two segments at most"
    assert own.room >= MOST_ROWS * 100_000, "however long the rows are"


def test_caps_and_sinks_go_to_both_kernels(kernels: Kernels):
    runner = make_runner([make_layer(0, logit_cap=30.0), make_layer(1)])
    backend, own, _ = make(runner)
    sinks = torch.zeros(HEADS)
    decode(backend, runner, 2, sinks=sinks)
    extend(backend, runner, prefill_batch(), sinks=sinks)
    assert [each[-1] for each in kernels.decodes] == [Rules(None, 30.0, sinks), Rules(sinks=sinks)]
    assert kernels.extends[0][-2] == Rules(None, 30.0, sinks)
    assert own.seen[0].cap == 30.0 and own.seen[1].sinks is sinks


# -- a pool of windows beside the other


def make_two_pools(monkeypatch: pytest.MonkeyPatch, window: int = 20) -> tuple[Any, Any, Any]:
    """Slot i of the whole pool is slot POOL - i of the other one."""
    pool = SimpleNamespace(size=POOL, full_to_swa_index_mapping=torch.arange(POOL, -1, -1))
    pool.translate_loc_from_full_to_swa = lambda slots: pool.full_to_swa_index_mapping[slots]
    monkeypatch.setattr(window_pool, "is_split", lambda found: found is pool)
    layers = [make_layer(3, sliding_window_size=window), make_layer(4)]
    runner = make_runner(layers, token_to_kv_pool=pool)
    backend = TritonAttnBackend()
    backend.sliding_window_size, prepared = 20, []
    backend.forward_metadata = None

    def init_forward_metadata(batch: Any) -> None:
        prepared.append(batch)
        backend.forward_metadata = SimpleNamespace()

    backend.init_forward_metadata = init_forward_metadata
    return backend, runner, prepared


def test_decode_reads_sglangs_list_of_the_pool_of_windows(kernels: Kernels, monkeypatch):
    """Which is made as long as the kernels read."""
    backend, runner, _ = make_two_pools(monkeypatch)
    own = OwnAttention(backend, runner)
    assert backend.sliding_window_size == listed_keys(20, SIZE, "cpu") == 84
    plans: list[Any] = []
    monkeypatch.setattr(invariant_attention, "plan_decode", lambda *given: plans.append(given))
    q = torch.zeros(2, HEADS, SIZE)
    whole, ends = torch.tensor([0, 100, 105]), torch.tensor([0, 84, 89, 89])
    backend.forward_metadata = SimpleNamespace(kv_indptr=whole, kv_indices=torch.arange(105))
    own._parts, own._layer = [slice(0, 2)], runner.model[0]
    slots = torch.arange(89)
    keys = torch.zeros(POOL, KV_HEADS, SIZE)
    window = {"sliding_window_size": 20}
    own._attend_rows(q, keys, keys, q, ends, slots, None, None, None, 1, 0.125, **window)
    ((lengths, workspace, told),) = plans
    assert lengths.tolist() == [0, 100, 105] and told.tolist() == [0, 84, 89]
    assert workspace.window == 20 and kernels.decodes[0][1].slots is slots


def test_a_prefill_reads_slots_that_were_looked_up_as_it_was_prepared(kernels, monkeypatch):
    backend, runner, prepared = make_two_pools(monkeypatch)
    OwnAttention(backend, runner)
    table = runner.req_to_token_pool.req_to_token
    table[5], table[2] = torch.arange(CONTEXT), torch.arange(CONTEXT) + 900
    batch = prefill_batch()
    batch.forward_mode = SimpleNamespace(is_extend=lambda: True)
    batch.extend_seq_lens, batch.extend_seq_lens_cpu = torch.tensor([3, 7]), [3, 7]
    batch.req_pool_indices, batch.extend_prefix_lens = torch.tensor([5, 2]), torch.tensor([200, 0])
    batch.starts, batch.longest = torch.tensor([0, 3, 10]), 7
    backend.init_forward_metadata(batch)
    assert prepared == [batch]
    table.zero_()  # as SGLang's scheduler may do while the forward runs
    for layer in runner.model:
        backend.forward_extend(*[torch.zeros(10, HEADS, SIZE)] * 3, layer, batch)
    (_, _, windowed, *_), (_, _, plain, *_) = kernels.extends
    assert plain.page_table is table and plain.table_rows is batch.req_pool_indices
    flat, rows = windowed.page_table, windowed.table_rows.tolist()
    assert flat.stride() == (1, 1) and flat.dtype == torch.int32
    for at, row, first, end in ((0, 5, 200 - 84, 203), (1, 2, 0, 7)):
        positions = torch.arange(first, end)
        whole = positions if row == 5 else positions + 900
        assert flat[rows[at] + positions, 0].tolist() == (POOL - whole).tolist()
    backend.forward_metadata = SimpleNamespace()  # prepared in another way
    with pytest.raises(RuntimeError, match="whose slots in the pool of windows were not looked up"):
        extend(backend, runner, batch)


def test_a_window_that_sglang_does_not_keep_is_refused(kernels, monkeypatch):
    backend, runner, _ = make_two_pools(monkeypatch, window=21)
    with pytest.raises(GateError, match="21 tokens before its own, but SGLang keeps 20"):
        OwnAttention(backend, runner)


@pytest.mark.parametrize(
    ("backend", "changes", "what"),
    [
        (TritonAttnBackend, {"sliding_window_size": 127}, "a layer that sees 128 tokens by Triton"),
        (FlashInferAttnBackend, {"sliding_window_size": 127}, "sees 128 tokens by FlashInfer"),
        (FlashInferAttnBackend, {"logit_cap": 50.0}, "caps scores at 50 by FlashInfer"),
        (TorchNativeAttnBackend, {"logit_cap": 50.0}, "caps scores at 50 by TorchNative"),
    ],
)
def test_windows_and_caps_that_only_sglang_could_serve_are_refused(backend, changes, what):
    runner = make_runner([make_layer(0), make_layer(1, **changes)])
    with pytest.raises(GateError, match=what):
        fixed_split.fix_split(backend(), runner)


def test_a_cpu_serves_windows():
    runner = make_runner([make_layer(0), make_layer(1, sliding_window_size=127)])
    fixed_split.fix_split(TorchNativeAttnBackend(), runner)


def test_a_stock_decode_that_drops_a_key_of_each_window_is_refused():
    layer_rules.refuse_short_windows(make_runner())
    with pytest.raises(GateError, match="windows of 127, 511 keys before a token: use --gate-fast"):
        layer_rules.refuse_short_windows(
            make_runner([make_layer(i, **changes) for i, changes in enumerate(GEMMA)])
        )
