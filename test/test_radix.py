"""The radix tree over SGLang's own pools: what enters, what is freed, and whose each slot is."""

from __future__ import annotations

from array import array
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import radix_world
from radix_world import (
    ALONE,
    ANSWERS,
    CHUNK,
    PROMPT,
    SLOTS,
    TOGETHER,
    World,
)
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from margingate.config import GateConfig
from margingate.runtime.request.record import CACHE_NAMESPACE
from margingate.runtime.schedule import radix
from margingate.runtime.schedule.radix import GateRadixCache

server = radix_world.server
world = radix_world.world


@pytest.mark.parametrize("world", [TOGETHER], indirect=True)
def test_together_all_of_a_prompt_enters_and_a_hit_has_any_length(world: World):
    world.answer(PROMPT, [True] * 5)
    assert world.shared() == [PROMPT]
    other = world.arrive((*PROMPT[:7], 1, 2))
    assert other.prefix_len == other.kv.cache_protected_len == 7
    world.prefill(other)
    world.finish(other)
    assert world.shared() == sorted([PROMPT, (*PROMPT[:7], 1, 2)])


def test_alone_hits_and_insertions_end_on_the_grid(world: World):
    world.answer(PROMPT, [True] * 5)
    assert world.shared() == [PROMPT[:8]]
    assert world.allocator.available_size() == SLOTS - 8, "the rest is free again"
    for length, hit in ((10, 8), (8, 4), (7, 4), (4, 0), (3, 0)):  # one token is always computed
        other = world.arrive((*PROMPT[: length - 1], 99))
        assert other.prefix_len == other.kv.cache_protected_len == hit
        world.prefill(other)
        world.check()
        world.finish(other)


def test_a_prompt_that_is_shorter_than_a_chunk_adds_nothing(world: World):
    req = world.arrive(PROMPT[:3])
    world.prefill(req)
    world.check()
    assert world.shared() == [] and req.kv.cache_protected_len == 0
    world.finish(req)
    assert world.allocator.available_size() == SLOTS


@pytest.mark.parametrize("world", [ALONE, TOGETHER, ANSWERS], indirect=True)
def test_two_that_compute_the_same_at_once_share_one_copy(world: World):
    one, two = world.arrive(PROMPT), world.arrive(PROMPT)
    for req in (one, two, one, two, one, two):
        if not world.is_prefilled(req):
            world.prefill(req, CHUNK)
            world.check()
    end = one.kv.cache_protected_len
    assert end == (8 if world.alone else 10)
    assert world.slots(one, end) == world.slots(two, end)
    assert world.tree.protected_size() == end
    world.finish(one)
    assert world.tree.protected_size() == end
    world.finish(two)
    assert world.tree.protected_size() == 0


@pytest.mark.parametrize("world", [ANSWERS], indirect=True)
def test_the_canonical_run_of_an_answer_enters_and_the_rest_is_freed(world: World):
    req = world.answer(PROMPT, [True, True, False, True, True])  # the later ones stand on a gap
    assert world.shared() == [(*PROMPT, *req.output_ids[:2])]
    assert world.allocator.available_size() == SLOTS - 12
    world.answer(PROMPT, [True, True, False, True])  # not longer: all of it is there already
    assert world.allocator.available_size() == SLOTS - 12
    longer = world.answer(PROMPT, [True] * 5)
    assert world.shared() == [(*PROMPT, *longer.output_ids[:5])], "the last token has no column"
    turn = world.arrive((*PROMPT, *longer.output_ids, 7, 8))
    assert turn.prefix_len == 15


@pytest.mark.parametrize("world", [ANSWERS], indirect=True)
def test_what_a_verify_pass_repaired_enters_too(world: World):
    req = world.arrive(PROMPT)
    world.prefill(req)
    for canonical in (True, False, True):
        world.decode(req, canonical)
    assert world.requests.canonical_columns(req) == 11
    world.verify(req)
    assert world.requests.canonical_columns(req) == 13
    world.decode(req, False)
    world.finish(req)
    assert world.shared() == [(*PROMPT, *req.output_ids[:3])]


@pytest.mark.parametrize("world", [ANSWERS], indirect=True)
@pytest.mark.parametrize("how", [{"insert": False}, {"known": False}])
def test_what_is_not_to_enter_or_not_known_adds_nothing(world: World, how: dict[str, bool]):
    world.answer(PROMPT, [True] * 4, **how)
    assert world.shared() == [PROMPT]
    assert world.allocator.available_size() == SLOTS - len(PROMPT)


@pytest.mark.parametrize("world", [ANSWERS], indirect=True)
def test_of_a_request_that_is_not_open_no_column_is_canonical(world: World):
    req = world.arrive(PROMPT)
    world.prefill(req)
    assert world.requests.canonical_columns(req) == 10
    world.requests.close(req)
    assert world.requests.canonical_columns(req) == 0


@pytest.mark.parametrize("world", [ALONE, TOGETHER, ANSWERS], indirect=True)
@pytest.mark.parametrize("length", [8, 10])
def test_the_prompt_of_an_answer_of_one_token_enters(world: World, length: int):
    """As where SGLang prefills it once for several choices, and where an answer is a class."""
    req = world.arrive(PROMPT[:length])
    while not world.is_prefilled(req):
        world.prefill(req, ends=True)
    assert world.shared() == [PROMPT[: 8 if world.alone else length]]
    assert world.allocator.available_size() == SLOTS - len(world.shared()[0])


@pytest.mark.parametrize("world", [TOGETHER], indirect=True)
def test_answers_stay_out_where_decode_has_other_bits(world: World):
    world.answer(PROMPT, [True] * 4)
    assert world.shared() == [PROMPT]


@pytest.mark.parametrize("world", [ALONE, ANSWERS], indirect=True)
def test_ungated_requests_are_left_to_sglang_and_kept_apart(world: World):
    other = world.arrive(PROMPT, gated=False)
    world.prefill(other)
    world.decode(other, False)
    world.finish(other)
    assert world.shared() == [] and world.tree.total_size() == 11, "all of it entered as ever"
    assert world.arrive(PROMPT).prefix_len == 0


@pytest.mark.parametrize("world", [ALONE, ANSWERS], indirect=True)
def test_requests_of_different_salts_share_nothing(world: World):
    """SGLang keys them apart; a key made without the salt would mix their columns."""
    for salt, hit in (("a", 0), ("b", 0), (None, 0), ("a", 8 if world.alone else 9)):
        req = world.arrive(PROMPT, salt=salt)
        assert req.prefix_len == hit
        while not world.is_prefilled(req):
            world.prefill(req)
        world.decode(req)
        world.check()
        world.finish(req)


@pytest.mark.parametrize("world", [ALONE, ANSWERS], indirect=True)
@pytest.mark.parametrize("gated", [True, False])
def test_columns_of_replaced_weights_serve_nobody(world: World, gated: bool):
    """Those that nobody holds go with the update, and those of a request that runs when it ends."""
    world.answer(PROMPT, [True] * 3)
    running = world.arrive(PROMPT, gated)
    while not world.is_prefilled(running):
        world.prefill(running)
    world.update()
    world.check()
    held = running.kv.cache_protected_len
    assert held >= 8 and world.tree.total_size() == held, "it computes on with its columns"
    for _ in range(3):
        world.decode(running)
    late = world.arrive(PROMPT)
    assert late.prefix_len == 0
    while not world.is_prefilled(late):
        world.prefill(late)
    world.check()
    shared = world.shared()
    assert shared == [PROMPT[:8] if world.alone else PROMPT]
    world.finish(running)
    assert world.shared() == shared, "columns computed across the update stay out"
    world.check()
    other = world.arrive((*PROMPT, 1, 2))
    assert other.prefix_len == late.kv.cache_protected_len
    world.finish(late)
    world.tree.evict(EvictParams(num_tokens=held))
    assert all(world.is_current(node) for node, *_ in world.nodes()), "the old ones go first"


@pytest.mark.parametrize("world", [TOGETHER], indirect=True)
def test_a_prompt_whose_chunks_see_two_weights_adds_nothing(world: World):
    req = world.arrive(PROMPT)
    world.prefill(req, 4)
    world.update()
    world.prefill(req, 6)
    world.check()
    assert world.is_prefilled(req) and world.shared() == [] and req.kv.cache_protected_len == 4
    world.finish(req)
    assert world.shared() == []


def test_no_two_namespaces_come_to_share_one(world: World):
    """Whatever a client sends as extra_key, and whatever version it is sent under."""
    found = set()
    keys = (None, "", "1", "1:", "0", CACHE_NAMESPACE, f"1:{CACHE_NAMESPACE}")
    for version in range(2):
        world.tree.part(version)
        found |= {world.tree._of_version(RadixKey(array("q", [1]), key)).extra_key for key in keys}
    assert len(found) == 2 * len(keys)


def test_sglang_calls_each_function_that_is_overridden(monkeypatch: pytest.MonkeyPatch):
    """One that it calls no more would be silent, and all columns would enter the tree."""
    layers = GateRadixCache.__mro__[: GateRadixCache.__mro__.index(RadixCache)]
    written = {name: it for layer in layers for name, it in vars(layer).items() if callable(it)}
    overridden = {name for name in written if hasattr(RadixCache, name) and name[:2] != "__"}
    assert overridden == {"match_prefix", "checkpoint", "insert", "touch_prefix"}
    called: list[str] = []
    for name in overridden:
        function = getattr(GateRadixCache, name)
        wanted, found = (signature(getattr(each, name)) for each in (RadixCache, GateRadixCache))
        assert list(found.parameters) == list(wanted.parameters)

        def counted(self: Any, *args: Any, name=name, function=function, **named: Any) -> Any:
            called.append(name)
            return function(self, *args, **named)

        monkeypatch.setattr(GateRadixCache, name, counted)
    world = World(ANSWERS)
    req = world.arrive(PROMPT)
    assert called == ["match_prefix"], "as it arrives"
    called.clear()
    common.touch_waiting_prefix(req, world.tree)
    assert called == ["touch_prefix"], "as it waits"
    world.prefill(req)
    assert {"checkpoint", "insert"} <= {*called}, "after its prefill"
    called.clear()
    world.finish(req)
    assert "checkpoint" in called, "as it ends"


def test_slots_that_sglang_collects_to_free_at_once_are_free(world: World):
    req = world.arrive(PROMPT)
    while not world.is_prefilled(req):
        world.prefill(req)
    world.allocator.free_group_begin()
    world.finish(req)
    world.check()
    world.allocator.free_group_end()
    world.check()


def test_the_factory_gives_the_gates_tree_where_a_gate_and_a_tree_are_wanted(monkeypatch):
    names = ("disable_radix_cache", "is_hybrid_swa")
    context: Any = SimpleNamespace(server_args=SimpleNamespace(), **dict.fromkeys(names, False))
    context.params = World().params
    monkeypatch.setattr(radix, "default_radix_cache_factory", lambda _context: "SGLang's")
    monkeypatch.setattr(radix, "replace", lambda context: context)
    assert radix.build(context) == "SGLang's"
    monkeypatch.setattr(radix, "gate_config", lambda _args: GateConfig(prefill_chunk=64))
    assert type(radix.build(context)) is GateRadixCache
    context.disable_radix_cache = True
    assert radix.build(context) == "SGLang's"


def test_what_is_left_of_a_chunk_is_no_hit(world: World):
    """Two chunks share their first tokens; when both are evicted these may still be there."""
    for tail in ((1, 1, 1), (2, 2, 2)):
        world.answer((0, *tail))
    world.tree.evict(EvictParams(num_tokens=4))
    assert world.shared() == [(0,)]
    world.check()
    req = world.arrive((0, 1, 1, 1, 5))
    assert req.prefix_len == 0
    world.prefill(req)
    world.prefill(req)
    world.check()
    assert world.shared() == [(0, 1, 1, 1)]
