"""Two K/V pools, SGLang's own: what leaves a window, what is held back, and whose each slot is.

As in radix_world.py there is no model. A row reads its window in one pool and all before it in the
other, and each slot that it reads must hold the column that belongs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import radix_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from radix_steps import STEPS, Step
from radix_steps import take as take_step
from radix_turns import Turn
from radix_world import (
    ALONE,
    ANSWERS,
    CHUNK,
    LONGEST,
    PROMPT,
    REQUESTS,
    SLOTS,
    TOGETHER,
    Column,
    World,
)
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from margingate.config import GateConfig, GateError
from margingate.core.ledger import Outcome
from margingate.runtime.compat.kv import window_pool
from margingate.runtime.observe import integrity
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.schedule.radix import GateWindowCache
from margingate.runtime.start import pools
from margingate.runtime.verify import rollback

WINDOW = 6  # keys before its own that a row sees
WINDOW_SLOTS = 110
LAYER = 1  # the one with a window

server = radix_world.server


class Windows(World):
    """SGLang's two pools and the gate's tree over them."""

    def make(self) -> None:
        self.kv = SWAKVPool(
            **{"size": SLOTS, "size_swa": WINDOW_SLOTS, "page_size": 1, "dtype": torch.bfloat16},
            **{"head_num": 1, "head_dim": 8, "device": "cpu"},
            **{"full_attention_layer_ids": [0], "swa_attention_layer_ids": [LAYER]},
        )
        sizes = (SLOTS, WINDOW_SLOTS, 1)
        self.allocator = SWATokenToKVPoolAllocator(*sizes, torch.bfloat16, "cpu", self.kv, False)
        self.params = CacheInitParams(
            *(False, self.pool, self.allocator, 1),
            sliding_window_size=WINDOW,
            tree_components=(ComponentType.FULL, ComponentType.SWA),
        )
        self.tree = GateWindowCache(self.params, CHUNK)
        self.windowed: dict[int, Column] = {}  # by slot of the pool of windows

    def arrive(self, prompt: Sequence[int], gated: bool = True, salt: str | None = None) -> Any:
        req = super().arrive(prompt, gated, salt)
        hit = [self.columns[slot] for slot in self.tree.prefix_device_indices(req).tolist()]
        assert [column.tokens for column in hit] == [
            tuple(prompt[: i + 1]) for i in range(len(hit))
        ]
        assert not gated or all(column.canonical for column in hit), "not canonical"
        assert all(column.weights == {self.tree.version} for column in hit), "of other weights"
        return req

    def decode(self, req: Any, canonical: bool = True) -> None:
        """As SGLang does, what has left the window goes before the row is computed."""
        position = req.kv.kv_allocated_len
        self.tree.evict_sliding_windows(req, position)
        if position - len(req.origin_input_ids) >= WINDOW:
            self.tree.release_swa_prefix_lock(req)
        super().decode(req, canonical)

    def flip(self, req: Any) -> None:
        """The first row that is not canonical gets another token; what is behind it goes."""
        key = req.gate.key
        self.ledger.request_tail(key)
        rows = self.ledger.take(key, LONGEST)
        for row in rows:
            self._compute(req, len(req.origin_input_ids) + row.index - 2, True)
        for i, row in enumerate(rows):
            outcome = self.ledger.verdict(row, match=False)
            assert outcome in ((Outcome.FLIP, Outcome.MISSED) if i == 0 else Outcome)
            if outcome is Outcome.FLIP:
                rollback._free_columns(
                    self.scheduler, req, len(req.origin_input_ids) + row.index - 1
                )
                req.output_ids = req.output_ids[: row.index]
                return

    def given_up(self, req: Any) -> int:
        return int(req.kv.get_evicted_seqlen(ComponentType.SWA))

    def windows(self, req: Any, first: int, last: int) -> list[int]:
        slots = torch.tensor(self.slots(req, last)[first:], dtype=torch.int64)
        return window_pool.slots_in(self.kv, LAYER, slots).tolist()

    def _compute(self, req: Any, position: int, canonical: bool) -> None:
        super()._compute(req, position, canonical)
        first = max(position - WINDOW, 0)
        *seen, own = self.windows(req, first, position + 1)
        tokens = self.tokens(req)
        for i, slot in enumerate(seen, first):
            assert slot and self.windowed[slot].tokens == tokens[: i + 1], (position, i, slot)
        assert own, "a row writes a column that was given up"
        self.windowed[own] = self.columns[self.slots(req, position + 1)[-1]]

    def check(self) -> None:
        integrity.check(self.scheduler, self.requests, self.in_flight)
        for req in self.live:
            if req.kv.holds_kv:
                slots = self.slots(req, req.kv.kv_allocated_len)
                self._check_columns(slots, self.tokens(req))
                for slot, window in zip(slots, self.windows(req, 0, len(slots)), strict=True):
                    assert not window or self.windowed[window].tokens == self.columns[slot].tokens

    def end(self) -> None:
        for req in [*self.live]:
            while not req.kv.holds_kv:
                self.prefill(req)
            self.finish(req)
        self.check()
        assert self.tree.protected_size() == self.tree.swa_protected_size() == 0
        self.tree.evict(EvictParams(num_tokens=SLOTS, swa_num_tokens=WINDOW_SLOTS))
        assert self.allocator.full_available_size() == SLOTS
        assert self.allocator.swa_available_size() == WINDOW_SLOTS
        self.check()


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Any:
    made = Windows(getattr(request, "param", TOGETHER))
    yield made
    made.check()
    made.end()


def prefilled(world: Windows, prompt: Sequence[int] = PROMPT) -> Any:
    req = world.arrive(prompt)
    while not world.is_prefilled(req):
        world.prefill(req)
    return req


def test_a_column_that_left_its_window_is_given_up_in_one_pool(world: Windows):
    req = prefilled(world)
    for _ in range(12):
        world.decode(req)
    assert world.given_up(req) == 10 + 11 - WINDOW, "before the last row"
    alive = world.windows(req, 0, 22)
    assert not any(alive[10:15]) and all(alive[15:])
    world.check()


def test_what_a_replay_would_see_is_held_back_until_it_is_verified(world: Windows):
    req = prefilled(world)
    for canonical in (True, True, True, False, *[True] * 15):
        world.decode(req, canonical)
    first = 10 + 3  # the position of the row that is not canonical
    assert all(world.windows(req, first - WINDOW, 29))
    world.verify(req)  # reads and writes what it must
    world.decode(req)
    assert world.given_up(req) == 29 - WINDOW


@pytest.mark.parametrize("behind", [0, 1, 2, 15])
def test_a_flip_takes_back_columns_of_both_pools(world: Windows, behind: int):
    req = prefilled(world)
    for canonical in (*[True] * 8, False, *[True] * behind):
        world.decode(req, canonical)
    world.flip(req)
    assert req.kv.kv_allocated_len == 10 + 9
    world.check()
    for _ in range(9):
        world.decode(req)
    world.check()


def test_the_prompt_of_a_tree_stays_while_a_replay_would_see_it(world: Windows):
    """SGLang lets the tree give it up once the request has decoded past its window."""
    req, other = prefilled(world), prefilled(world, range(50, 58))
    world.decode(req, False)
    for _ in range(WINDOW + 4):
        world.decode(req)
        world.decode(other)
    world.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=WINDOW_SLOTS))
    assert all(world.windows(req, 10 - WINDOW, 10)), "still to be seen"
    assert not any(world.windows(other, 8 - WINDOW, 8)), "not to be seen any more"
    world.verify(req)


@pytest.mark.parametrize("hit", [0, 11])
def test_a_prompt_that_enters_no_tree_leaves_its_window_as_it_goes(world: Windows, hit: int):
    if hit:
        world.answer(tuple(range(hit)))
    req = world.arrive(tuple(range(30)))
    assert req.prefix_len == hit
    world.prefill(req, 4)
    start = req.prefix_len
    req.gate.crosses(1, 0)  # of two weights
    while not world.is_prefilled(req):
        world.prefill(req, 4)
        world.check()
    assert world.given_up(req) == 30 - WINDOW
    assert not any(world.windows(req, start, 30 - WINDOW)), "they would fill the pool"


@pytest.mark.parametrize("world", [ALONE], indirect=True)
def test_a_chunk_that_finds_no_room_in_the_pool_of_windows_waits_whole(world, monkeypatch):
    """SGLang would compute as much of it as there is room for, and its columns had other bits."""
    req = world.arrive(tuple(range(30)))
    world.prefill(req)
    turn = Turn(world, monkeypatch)
    turn.adder.memory_budget.swa_offset = world.allocator.swa_available_size() - CHUNK
    assert turn.go_on(req) is req and not turn.spans
    assert req.extend_end == req.prefix_len == CHUNK, "SGLang stashes nothing of a parked chunk"
    turn.adder.memory_budget.swa_offset -= 1
    assert turn.go_on(req) is req and turn.spans == [(CHUNK, 2 * CHUNK)]


@pytest.mark.parametrize("short", [1, 0])
@pytest.mark.parametrize("hit", [0, 10])
def test_a_retracted_request_waits_for_windows_of_all_that_it_keeps(world, monkeypatch, short, hit):
    """Else its prompt is computed in each turn, and finds no room for what is to be replayed."""
    if hit:
        world.answer(PROMPT)
    req, turn = world.arrive((*PROMPT[:hit], 1, 2, 3, 4)), Turn(world, monkeypatch)
    room = turn.adder.memory_budget.remaining_swa
    assert req.prefix_len == hit and room == WINDOW_SLOTS - min(hit, WINDOW)
    world.tree.unlock(req.lock)  # as it waits: the windows of its hit could be given up
    req.gate.kept = SimpleNamespace(tokens=[0] * 9)
    turn.adder.memory_budget.swa_offset = room - (4 + 9 + 1) + short
    turn.adder.running_batch.reqs.append(req)
    assert (turn.add(req) is AddReqResult.NO_TOKEN) is bool(short)
    assert len(turn.spans) == 1 - short
    req.gate.kept = None
    if short:
        req.lock = world.tree.lock(req.last_node)


@pytest.mark.parametrize("world", [ALONE], indirect=True)
def test_a_hit_ends_on_the_grid_and_has_its_window(world: Windows):
    """Where the window in front of the shorter hit is gone, a shorter one is looked for."""
    world.answer((*range(8), 9), [True] * 2)
    world.tree.evict(EvictParams(num_tokens=0, swa_num_tokens=3))
    for length in (9, 8, 7, 5):
        req = world.arrive((*range(length - 1), 99))
        assert req.prefix_len % CHUNK == 0
        while not world.is_prefilled(req):
            world.prefill(req)
        world.finish(req)
        world.check()


def test_the_answer_of_a_long_request_can_be_hit(world: Windows):
    world.tree.share(ANSWERS, world.requests)
    req = world.answer(PROMPT, [*[True] * 14, False, True])
    whole = (*PROMPT, *req.output_ids)
    turn = world.arrive((*whole[:24], 77))
    assert turn.prefix_len == 24, "all that is canonical, and its last window"
    world.prefill(turn)


def test_integrity_tells_of_each_pool(world: Windows):
    req = prefilled(world)
    world.decode(req)
    world.decode(req)
    mapping = world.kv.full_to_swa_index_mapping
    before, slot = world.slots(req, 12)[-2:]
    own, mapping[slot] = int(mapping[slot]), 0
    with pytest.raises(AssertionError, match="gave up 0 columns of its windows"):
        world.check()
    mapping[slot] = mapping[before]
    with pytest.raises(AssertionError, match=r"slot with a window .* has several owners"):
        world.check()
    mapping[slot] = own
    world.allocator.swa_attn_allocator.alloc(1)
    with pytest.raises(AssertionError, match="1 of 110 slots with a window are nobody's"):
        world.check()
    world.allocator.swa_attn_allocator.free(torch.tensor([window_slot(world)]))


def window_slot(world: Windows) -> int:
    """The one that is lost."""
    mapped = {int(slot) for slot in world.kv.full_to_swa_index_mapping if slot > 0}
    free = {*window_pool.free_slots(world.allocator).tolist()}
    (lost,) = {*range(1, WINDOW_SLOTS + 1)} - mapped - free
    return lost


def test_slots_that_are_tried_before_the_first_request_are_in_both_pools():
    world = Windows()
    with window_pool.scratch(world.kv, 5):
        slots = torch.arange(7)
        assert window_pool.slots_in(world.kv, LAYER, slots).tolist() == [0, 1, 2, 3, 4, 5, 0]
        assert window_pool.slots_in(world.kv, 0, slots) is slots
    assert not world.kv.full_to_swa_index_mapping[:-1].any()
    with (
        pytest.raises(ValueError, match="111 slots, of 160 and 110"),
        window_pool.scratch(world.kv, 111),
    ):
        pass


def test_pools_that_are_not_known_are_named():
    world = Windows()
    assert not window_pool.why_unknown(world.kv, world.allocator)
    assert window_pool.sizes(world.allocator) == (SLOTS, WINDOW_SLOTS)
    other = SimpleNamespace(full_kv_pool=world.kv.full_kv_pool, swa_kv_pool=world.kv)
    assert window_pool.why_unknown(other, world.pool) == "ReqToTokenPool, SWAKVPool"


def test_two_pools_that_cannot_be_served_are_refused_with_the_reason(monkeypatch):
    world, wide = Windows(), WINDOW
    runner = SimpleNamespace(token_to_kv_pool=world.kv, model=None)
    stub = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        token_to_kv_pool_allocator=world.allocator,
        tree_cache=world.tree,
    )
    monkeypatch.setattr(pools, "windows_of", lambda _: [wide])
    config = GateConfig(prefill_chunk=CHUNK, rows=8)
    needs = 2 * (CHUNK + WINDOW) + 8 + 128
    said = f"that of windows has room for {WINDOW_SLOTS} tokens, where a request may need {needs}"
    assert pools._unfit(stub, config, "") == said
    monkeypatch.setattr(window_pool, "given_up_at_once", lambda: 0)
    assert pools._unfit(stub, config, "") == ""
    assert pools._unfit(stub, config, "a study replays all rows") == "a study replays all rows"
    wide = WINDOW + 1
    assert pools._unfit(stub, config, "") == "they keep 6 tokens of a window of 7"
    stub.tree_cache = object()
    assert pools._unfit(stub, config, "") == "their radix tree is object, not the gate's"
    runner.token_to_kv_pool = SimpleNamespace(full_kv_pool=world.pool, swa_kv_pool=world.pool)
    assert pools._unfit(stub, config, "").endswith("does not know (ReqToTokenPool)")


def test_windows_in_a_pool_of_another_kind_end_the_start(monkeypatch):
    monkeypatch.setattr(pools, "has_two_pools", lambda _: True)
    monkeypatch.setattr(pools.settings, "in_effect", lambda _: 0.8)
    monkeypatch.setattr(pools, "why_one", lambda *_: "")
    model = SimpleNamespace(is_hybrid_swa=True)
    runner = SimpleNamespace(model_config=model, token_to_kv_pool=object())
    server_args = SimpleNamespace(_resolved_overrides=None)
    stub = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner), server_args=server_args)
    with pytest.raises(GateError, match=r"of a kind that the gate does not know \(object\)"):
        pools.confirm(stub, GateConfig())


def take(world: Windows, step: Step, flips: bool) -> None:
    """As there; a verdict may be a flip, and the pool of windows may be emptied by itself."""
    if step.what == "evict":
        count = 4 * step.count
        world.tree.evict(EvictParams(num_tokens=count * flips, swa_num_tokens=count))
        return
    req = world.live[step.which % len(world.live)] if world.live else None
    prefilled = req is not None and world.is_prefilled(req)
    if flips and step.what == "verify" and prefilled and req.gate.gated:
        world.flip(req)
        return
    take_step(world, step)


@pytest.mark.parametrize("mode", [ALONE, TOGETHER, ANSWERS], ids=["alone", "together", "answers"])
@settings(max_examples=80, deadline=None)
@given(steps=st.lists(st.tuples(STEPS, st.booleans()), min_size=15, max_size=60))
def test_requests_that_come_and_go_in_any_order(mode: Prefill, steps: list[Any]):
    assert REQUESTS * (WINDOW + CHUNK) < WINDOW_SLOTS < REQUESTS * LONGEST
    world = Windows(mode)
    for step, flips in steps:
        take(world, step, flips)
        world.check()
    world.end()
