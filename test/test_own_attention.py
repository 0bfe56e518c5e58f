"""The gate's attention inside SGLang's Triton backend: what it replaces, and what it plans."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_backend
from hypothesis import given
from hypothesis import strategies as st
from triton_backend import (
    HEADS,
    POOL,
    SEGMENT,
    SIZE,
    Kernels,
    TritonAttnBackend,
    decode,
    extend,
    make,
    make_runner,
    prefill_batch,
)

from margingate.config import GateError
from margingate.runtime.attention import fixed_split, invariant_attention
from margingate.runtime.attention.invariant_attention import MOST_ROWS, OwnAttention, of
from margingate.runtime.verify.verifier import RowInput, Verifier
from margingate_kernels import PLAIN, segments_of
from margingate_kernels.attention import ARITHMETIC

# Pytest finds a fixture by its name here.
kernels = triton_backend.kernels


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


def test_a_prefill_is_told_whose_each_token_is(kernels: Kernels):
    backend, _, runner = make()
    out = extend(backend, runner, prefill_batch())
    ((_, (keys, values, new, new_values), chunks, scale, given, rules, room),) = kernels.extends
    assert rules == PLAIN and room is None
    assert given is out and keys is values and new is new_values and scale == 0.125
    assert len(keys) == POOL and len(new) == 5
    assert chunks.page_table is runner.req_to_token_pool.req_to_token
    assert chunks.table_rows.tolist() == [4, 2] and chunks.prefix_lens.tolist() == [5, 0]
    assert chunks.starts.tolist() == [0, 3, 5] and chunks.longest == 3


@pytest.mark.parametrize(("lengths", "most"), [(torch.tensor([8, 2]), 8), (None, 0)])
def test_a_prefill_whose_programs_share_keys_is_told_how_many_there_are(
    kernels: Kernels, lengths: torch.Tensor | None, most: int
):
    backend, own, runner = make()
    own.share_keys()
    batch = prefill_batch()
    batch.seq_lens_cpu = lengths
    extend(backend, runner, batch)
    (*_, chunks, _scale, _out, _rules, room) = kernels.extends[0]
    assert chunks.most_keys == most
    assert room is own._workspaces[None].segments, "the sums of decode, which runs before or after"


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
