"""The gate's attention inside SGLang's Triton backend: what it replaces, plans and refuses."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from margingate.config import GateConfig, GateError
from margingate.runtime.attention import fixed_split, invariant_attention, layer_rules
from margingate.runtime.attention.invariant_attention import MOST_ROWS, OwnAttention, of
from margingate.runtime.attention.layer_rules import unfit
from margingate.runtime.compat.kv import window_pool
from margingate.runtime.probe import check_attention
from margingate.runtime.probe.attention_error import Found
from margingate.runtime.verify.verifier import RowInput, Verifier, build
from margingate_kernels import PLAIN, Rules, listed_keys, segments_of
from margingate_kernels.attention import ARITHMETIC

HEADS, KV_HEADS, SIZE = 4, 2, 64
CONTEXT, POOL = 1000, 2000  # tokens
SEGMENT = 256  # keys
LAYERS = (3, 4)  # a rank of a pipeline need not begin with layer 0


class TritonAttnBackend:
    """As far as the gate touches it; its own forward calls the kernels as SGLang's does."""

    use_mla = False
    dcp_size = 1

    def __init__(self) -> None:
        self.max_kv_splits = 8
        self.calls: list[Any] = []
        self.decode_attention_fwd = self.extend_attention_fwd = None

    def get_num_kv_splits(self, num_kv_splits, seq_lens, uneven_batch=None):
        raise AssertionError("its own rule was asked")

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None):
        self.calls.append(("decode", save_kv_cache))
        out = torch.empty_like(q)
        keys = torch.zeros(POOL, KV_HEADS, SIZE)
        scratch = (None, None, None, self.max_kv_splits)
        indptr, slots = forward_batch.indptr, forward_batch.slots
        self.forward_metadata = SimpleNamespace(kv_indptr=indptr, kv_indices=slots)
        if layer.sliding_window_size >= 0:  # SGLang's own lists for windows: not to be read
            indptr = slots = None
        self.decode_attention_fwd(
            *(q, keys, keys, out, indptr, slots, *scratch),
            *(layer.scaling, 1.0, 1.0),
            logit_cap=layer.logit_cap,
            sinks=sinks,
            xai_temperature_len=-1,
            page_size=1,
        )
        return out

    def forward_extend(self, q, k, v, layer, forward_batch, **extras):
        mask, causal = extras.pop("mask", None), extras.pop("causal", True)
        out, keys = torch.empty_like(q), torch.zeros(POOL, KV_HEADS, SIZE)
        self.extend_attention_fwd(
            *(q, k, v, out, keys, keys, forward_batch.starts, None, None, mask, causal, None),
            *(forward_batch.longest, 1.0, 1.0, layer.scaling),
            **{
                "logit_cap": layer.logit_cap,
                "sliding_window_size": layer.sliding_window_size,
                "sinks": None,
                **extras,
            },
        )
        return out


class FlashInferAttnBackend(TritonAttnBackend):
    pass


def make_layer(layer_id: int, **changes: Any) -> RadixAttention:
    given = {"num_heads": HEADS, "head_dim": SIZE, "scaling": 0.125, "num_kv_heads": KV_HEADS}
    return RadixAttention(**{**given, **changes}, layer_id=layer_id)


def make_runner(layers: list[Any] | None = None, **changes: Any) -> SimpleNamespace:
    model = torch.nn.ModuleList([make_layer(i) for i in LAYERS] if layers is None else layers)
    graphs = SimpleNamespace(decode=SimpleNamespace(max_bs=changes.pop("graphs", 32)))
    pool = SimpleNamespace(store_dtype=torch.bfloat16, size=changes.pop("pool", POOL))
    runner = SimpleNamespace(
        model=model,
        device="cpu",
        dtype=torch.bfloat16,
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(8, CONTEXT, dtype=torch.int32)),
        model_config=SimpleNamespace(context_len=changes.pop("context", CONTEXT)),
        server_args=SimpleNamespace(cuda_graph_config=graphs),
    )
    vars(runner).update(changes)
    return runner


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


# -- in place of the backend's


class Kernels:
    """Records what would be launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[str] = []
        self.plans: list[Any] = []
        self.decodes: list[Any] = []
        self.extends: list[Any] = []
        kernels = {"plan_decode": self.plans, "decode_attention": self.decodes}
        kernels["extend_attention"] = self.extends
        for name, calls in kernels.items():
            monkeypatch.setattr(invariant_attention, name, partial(self._launch, name, calls))

    def _launch(self, name: str, calls: list[Any], *args: Any) -> None:
        self.launched.append(name)
        calls.append(args)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


def make(runner: SimpleNamespace | None = None) -> tuple[TritonAttnBackend, OwnAttention, Any]:
    backend, runner = TritonAttnBackend(), runner or make_runner()
    return backend, OwnAttention(backend, runner), runner


def decode(backend: TritonAttnBackend, runner: Any, rows: int, **extras: Any) -> list[torch.Tensor]:
    """A forward of all layers. In a graph the index tensors are longer than the batch."""
    lengths = extras.pop("lengths", [1] * rows)
    batch = SimpleNamespace(
        batch_size=rows,
        seq_lens_sum=sum(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        indptr=torch.arange(0, rows + 4, dtype=torch.int32),
        slots=torch.arange(rows),
    )
    q = torch.zeros(rows, HEADS, SIZE)
    return [backend.forward_decode(q, q, q, each, batch, **extras) for each in runner.model]


def test_a_backend_without_the_kernels_has_none():
    assert of(TritonAttnBackend()) is None and of(object()) is None


def test_the_backend_has_room_for_one_split_and_counts_none(kernels: Kernels):
    backend, own, _ = make()
    assert of(backend) is own and backend.max_kv_splits == 1
    splits = torch.full((3,), 7, dtype=torch.int32)
    backend.get_num_kv_splits(splits, torch.tensor([1, 500, 9]), torch.zeros(1))
    assert splits.tolist() == [7, 7, 7], "a launch a step, for a kernel that does not run"
    assert fixed_split.split_of(backend) == own.record() == [ARITHMETIC, 64, SEGMENT]


def test_a_forward_is_planned_once_and_all_its_layers_attend(kernels: Kernels):
    backend, _, runner = make()
    outs = decode(backend, runner, 5)
    decode(backend, runner, 3)
    assert [len(indptr) for indptr, _ in kernels.plans] == [6, 4], "one plan a forward, cut to it"
    assert kernels.launched == 2 * ["plan_decode", "decode_attention", "decode_attention"]
    assert backend.calls == [("decode", True)] * 4
    for (q, paged, scale, out, workspace, rules), expected in zip(kernels.decodes, outs):
        assert rules == PLAIN
        assert out._base is expected and len(q) == len(out) == 5 and scale == 0.125
        assert len(paged.indptr) == 6 and paged.slots.tolist() == list(range(5))
        assert workspace is kernels.plans[0][1]


def test_a_larger_batch_has_another_workspace_and_the_first_stays(kernels: Kernels):
    backend, _, runner = make()
    for rows in (1, MOST_ROWS, MOST_ROWS + 1, MOST_ROWS + 40, 2 * MOST_ROWS + 1, MOST_ROWS + 2, 2):
        decode(backend, runner, rows)
    used = [workspace for _, workspace in kernels.plans]
    first, larger, largest = used[0], used[2], used[4]
    assert used == [first, first, larger, larger, largest, largest, first]
    assert len({id(each.segments.records) for each in used}) == 3
    assert len(larger.segments.firsts) - 1 == 2 * MOST_ROWS, "not another one for each row more"
    for (_, workspace), (*_, used_by_first, _), (*_, used_by_second, _) in zip(
        kernels.plans, kernels.decodes[::2], kernels.decodes[1::2]
    ):
        assert workspace is used_by_first is used_by_second


def test_the_workspace_has_rows_for_the_largest_graph(kernels: Kernels):
    _, own, _ = make(make_runner(graphs=MOST_ROWS + 8))
    assert len(own._workspaces[None].segments.firsts) - 1 == MOST_ROWS + 8
    _, without, _ = make(make_runner(graphs=None))
    assert len(without._workspaces[None].segments.firsts) - 1 == MOST_ROWS


@pytest.mark.parametrize(
    ("context", "pool"), [(1000, 2000), (100, 2000), (256, 100), (50_000, 900), (257, 10**6)]
)
def test_rows_that_see_as_much_as_there_is_room_for_fit(context: int, pool: int, kernels: Kernels):
    """However they share it out: each may leave one segment nearly empty, and so may padding."""
    _, own, _ = make(make_runner(context=context, pool=pool))
    capacity, rows = len(own._workspaces[None].segments.records), MOST_ROWS
    assert own.room >= SEGMENT
    for length in (1, 2, 255, 256, 257, context):
        keys = min(length, context)
        count = min(own.room // keys, rows)
        left = own.room - count * keys if count < rows else 0
        needed = count * segments_of(keys, SIZE) + (rows - count)  # padding sees one key
        needed += segments_of(left, SIZE) - 1 if left else 0
        assert needed <= capacity, f"{count} rows of {keys} keys"


def test_rows_that_share_more_than_there_is_room_for_attend_some_at_a_time(kernels: Kernels):
    backend, own, runner = make(make_runner(context=10**6, pool=900))
    length = own.room // 2 - 3
    outs = decode(backend, runner, 5, lengths=[length] * 5)
    assert kernels.launched == 2 * 3 * ["plan_decode", "decode_attention"], "planned anew each time"
    for of_layer, out in zip((kernels.decodes[:3], kernels.decodes[3:]), outs):
        assert [len(q) for q, *_ in of_layer] == [2, 2, 1]
        assert [paged.indptr.tolist() for _, paged, *_ in of_layer] == [
            [0, 1, 2],
            [2, 3, 4],
            [4, 5],
        ]
        at = [given.storage_offset() for *_, given, _, _ in of_layer]
        assert at == [row * HEADS * SIZE for row in (0, 2, 4)]
        assert all(given._base is out for *_, given, _, _ in of_layer)
    decode(backend, runner, 2, lengths=[length] * 2)
    assert len(kernels.decodes) == 8, "these have room"


def test_a_step_that_there_is_no_room_for_takes_no_graph(kernels: Kernels, caplog):
    backend, own, _ = make()
    graphs, asked = SimpleNamespace(attn_backend=backend), []
    fits = SimpleNamespace(seq_lens_sum=own.room)
    counted = SimpleNamespace(seq_lens_sum=None, seq_lens=torch.tensor([own.room, 1]))

    def original(_graphs: Any, batch: Any) -> bool:
        asked.append(batch)
        return True

    assert invariant_attention.can_run_graph(original, graphs, fits) and asked == [fits]
    for _ in range(2):
        assert not invariant_attention.can_run_graph(original, graphs, counted)
    assert caplog.text.count("such decode steps run without one") == 1
    graphs.attn_backend = object()
    assert invariant_attention.can_run_graph(original, graphs, counted), (
        "another backend has no such end"
    )


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"logit_cap": 30.0}, "the cap 30.0, not 0.0"),
        ({"score_mod": abs}, "a function of its own"),
        ({"sliding_window_size": 0}, "the window 0, not None"),
    ],
)
def test_what_is_not_the_layers_own_raises(extras: dict[str, Any], message: str, kernels: Kernels):
    backend, _, runner = make()
    with pytest.raises(RuntimeError, match=message):
        extend(backend, runner, prefill_batch(), **extras)
    with pytest.raises(RuntimeError, match=message):
        backend.decode_attention_fwd(*[torch.zeros(1)] * 9, 1, 1.0, 1.0, 1.0, **extras)
    assert not kernels.decodes and not kernels.extends and not kernels.plans


# -- layers with rules of their own


GEMMA = tuple({"sliding_window_size": w} for w in (127, 127, -1, 127, 511, -1))


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
    assert kernels.extends[0][-1] == Rules(None, 30.0, sinks)
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


class TorchNativeAttnBackend:
    pass


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


def prefill_batch() -> SimpleNamespace:
    """Two prompts: 3 tokens behind 5, and 2 behind none."""
    return SimpleNamespace(
        req_pool_indices=torch.tensor([4, 2]),
        extend_prefix_lens=torch.tensor([5, 0]),
        starts=torch.tensor([0, 3, 5, 5, 5], dtype=torch.int32),  # as long as the backend's buffer
        longest=3,
    )


def extend(backend: TritonAttnBackend, runner: Any, batch: Any, **extras: Any) -> torch.Tensor:
    q = torch.zeros(5, HEADS, SIZE)
    return backend.forward_extend(q, q, q, runner.model[0], batch, **extras)


def test_a_prefill_is_told_whose_each_token_is(kernels: Kernels):
    backend, _, runner = make()
    out = extend(backend, runner, prefill_batch())
    ((_, (keys, values, new, new_values), chunks, scale, given, rules),) = kernels.extends
    assert rules == PLAIN
    assert given is out and keys is values and new is new_values and scale == 0.125
    assert len(keys) == POOL and len(new) == 5
    assert chunks.page_table is runner.req_to_token_pool.req_to_token
    assert chunks.table_rows.tolist() == [4, 2] and chunks.prefix_lens.tolist() == [5, 0]
    assert chunks.starts.tolist() == [0, 3, 5] and chunks.longest == 3


@pytest.mark.parametrize("extras", [{"mask": torch.ones(1)}, {"causal": False}])
def test_a_prefill_with_a_mask_of_its_own_raises(extras: dict[str, Any], kernels: Kernels):
    backend, _, runner = make()
    with pytest.raises(RuntimeError, match="a mask of its own"):
        extend(backend, runner, prefill_batch(), **extras)
    assert not kernels.extends


def test_the_rules_of_splits_take_what_sglang_gives_them():
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend as Sglangs

    theirs = list(inspect.signature(Sglangs.get_num_kv_splits).parameters)[1:]
    ruled = SimpleNamespace(max_kv_splits=8, max_context_len=100, device="cpu")
    fixed_split._fix_triton(ruled)
    for rule in (ruled.get_num_kv_splits, invariant_attention._no_splits):
        taken = inspect.signature(rule).parameters
        assert list(taken)[: len(theirs)] == theirs
        assert all(taken[name].default is None for name in taken.keys() - theirs)


def test_the_places_of_arguments_are_those_of_sglangs_kernels():
    """SGLang's backend passes them by place: a new one among them would be taken for another."""
    from sglang.kernels.ops.attention import decode_attention, extend_attention

    theirs = {
        "decode": (decode_attention.decode_attention_fwd, OwnAttention._attend_rows),
        "extend": (extend_attention.extend_attention_fwd, OwnAttention._attend_chunks),
    }
    same = {"o": "out", "o_extend": "out", "q_extend": "q", "k_extend": "k", "v_extend": "v"}
    same |= {"kv_indptr": "indptr", "kv_indices": "slots", "sm_scale": "scale"}
    same |= {"num_kv_splits": "splits", "max_kv_splits": "max_splits", "qo_indptr": "starts"}
    same |= {"custom_mask": "mask", "is_causal": "causal", "max_len_extend": "longest"}
    same_in_extend = {**same, "kv_indptr": "indptr", "kv_indices": "indices"}
    for name, (their, our) in theirs.items():
        renamed = same if name == "decode" else same_in_extend
        expected = [renamed.get(each, each) for each in inspect.signature(their).parameters]
        given = [each.lstrip("_") for each in inspect.signature(our).parameters][1:]
        named = given[: given.index("scale") + 1]
        assert named == expected[: len(named)], name
        assert expected[len(named)] == ("k_scale" if name == "decode" else "logit_cap")


# -- passes of no more rows than there is room for


def groups(room: int | None, keys: list[int]) -> list[list[int]]:
    """The numbers of the rows by group; row i sees keys[i] keys."""
    backend = SimpleNamespace(margingate=room if room is None else SimpleNamespace(room=room))
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=None))
    made = Verifier(runner, 8, backend=backend)
    rows = [RowInput(1, each - 1, token) for token, each in enumerate(keys)]
    return [[row.token for row in some] for some in made.that_fit(rows)]


def test_rows_share_a_pass_where_there_is_room():
    assert groups(None, [900] * 8) == [list(range(8))], "another backend needs none"
    assert groups(10, [5, 5]) == [[0, 1]]
    assert groups(10, [5, 5, 1]) == [[0, 1], [2]]
    assert groups(10, [20, 3, 8, 30]) == [[0], [1], [2], [3]], "one row always goes"
    assert groups(10, [3, 20, 3]) == [[0], [1], [2]]


@given(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_every_row_goes_once_in_order_and_no_group_could_take_the_next(room, lengths):
    found = groups(room, lengths)
    assert [row for group in found for row in group] == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in group) for group in found]
    assert all(total <= room or len(group) == 1 for total, group in zip(sums, found))
    following = [lengths[group[0]] for group in found[1:]]
    assert all(total + more > room for total, more in zip(sums, following))


def test_a_pass_is_run_in_as_many_forwards_as_it_needs(monkeypatch: pytest.MonkeyPatch):
    backend = SimpleNamespace(margingate=SimpleNamespace(room=10))
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=None))
    made, sizes = Verifier(runner, 8, backend=backend), []

    def forward(rows: list[RowInput], count: int) -> torch.Tensor:
        sizes.append((len(rows), count))
        logits = torch.zeros(count, 50)
        logits[range(len(rows)), [row.token for row in rows]] = 9.0
        return logits

    monkeypatch.setattr(made, "forward", forward)
    results = made.run([RowInput(1, 3, token) for token in (7, 8, 9, 10, 11)])
    assert [result.token for result in results] == [7, 8, 9, 10, 11]
    assert sizes == [(2, 8), (2, 8), (1, 8)]


# -- fail closed


def test_kernels_that_were_not_called_end_the_start(kernels: Kernels):
    backend = TritonAttnBackend()
    own = OwnAttention(backend, make_runner())
    with pytest.raises(GateError, match="replaced decode attention, but SGLang did not call it"):
        own.confirm(prefill=False)
    own._ran["decode"] = True
    own.confirm(prefill=False)
    with pytest.raises(GateError, match="replaced prefill attention"):
        own.confirm(prefill=True)


def test_a_backend_without_what_is_replaced_is_refused():
    backend = TritonAttnBackend()
    del backend.extend_attention_fwd
    with pytest.raises(GateError, match="extend_attention_fwd, which SGLang"):
        OwnAttention(backend, make_runner())


# -- checked at start


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
    (kind,) = check_attention.kinds([make_layer(0), make_layer(1)], {1: Rules(sinks=sinks)})
    assert kind.rules.sinks is sinks


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
