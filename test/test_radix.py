"""The radix tree over SGLang's own pools: what enters, what is freed, and whose each slot is.

There is no model. A slot holds what its column was computed from, so that a column in the wrong
place, or one that is not canonical, is seen wherever it turns up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers import schedule_batch, schedule_policy
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.config import GateConfig
from margingate.runtime.observe import integrity
from margingate.runtime.probe.check_prefill import Prefill
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import CACHE_NAMESPACE, GateRequest
from margingate.runtime.schedule import radix
from margingate.runtime.schedule.prefill_admission import Admission
from margingate.runtime.schedule.radix import GateRadixCache

CHUNK = 4
SLOTS = 160
REQUESTS = 6
LONGEST = 40  # columns of a request
ALONE, TOGETHER, ANSWERS = Prefill(), Prefill(together=True), Prefill(True, as_decoded=True)


class Column(NamedTuple):
    """What a slot holds: the column of the last of these tokens, behind the others."""

    tokens: tuple[int, ...]
    canonical: bool
    weights: frozenset[int]  # versions that it was computed by, itself or those before it


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """SGLang's global settings, which a server would have published, and the gate's state."""
    published = SimpleNamespace(strip_thinking_cache=False, speculative_algorithm=None)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((common, "get_serving"), (common, "get_spec")):
            patch.setattr(module, name, lambda: published)
        patch.setattr(schedule_batch, "get_serving", lambda: published)
        yield


class World:
    """SGLang's pools and the gate's tree and ledger, with the scheduler's part played by hand."""

    def __init__(self, prefill: Prefill = ALONE) -> None:
        self.pool = ReqToTokenPool(REQUESTS, LONGEST, "cpu", False)
        self.make()
        self.requests = OpenRequests(GateConfig(rows=64))
        self.tree.share(prefill, self.requests)
        self.alone = not prefill.together
        self.columns: dict[int, Column] = {}  # by slot
        self.live: list[Any] = []
        self.ledger = self.requests.ledger
        self.made = 0
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator,
            tree_cache=self.tree,
            req_to_token_pool=self.pool,
            running_batch=SimpleNamespace(reqs=self.live),
            last_batch=None,
            chunked_req=None,
            enable_overlap=False,
        )
        self.in_flight = InFlight(self.scheduler)

    def make(self) -> None:
        """The allocator of slots, and the tree."""
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.bfloat16, "cpu", None, False)
        self.params = CacheInitParams(False, self.pool, self.allocator, page_size=1)
        self.tree = GateRadixCache(self.params, CHUNK)

    # -- what the scheduler does

    def arrive(self, prompt: Sequence[int], gated: bool = True, salt: str | None = None) -> Any:
        """A request is matched with the tree, and its hit locked."""
        self.made += 1
        namespace = CACHE_NAMESPACE if gated else None
        params = SamplingParams(temperature=0, max_new_tokens=LONGEST)
        name, tokens = str(self.made), array("q", prompt)
        req = Req(name, "", tokens, params, extra_key=namespace, cache_salt=salt)
        req.gate = GateRequest(str(self.made), gated)
        req.init_next_round_input(self.tree)
        if gated and self.alone:
            assert req.prefix_len % CHUNK == 0
        req.lock = self.tree.lock(req.last_node)
        self.live.append(req)
        return req

    def prefill(self, req: Any, count: int = LONGEST, *, ends: bool = False) -> None:
        """The next `count` tokens of the prompt, or its next chunk where that is prescribed.

        `ends`: its first token, if this gives it, is its last.
        """
        start, prompt = req.prefix_len, len(req.origin_input_ids)
        whole = start // CHUNK * CHUNK + CHUNK
        end = min(whole if self.alone and req.gate.gated else start + count, prompt)
        full = not self.alone or (start % CHUNK == 0 and end == whole)
        if not req.kv.holds_kv:
            hit = self.tree.prefix_device_indices(req)
            self.pool.alloc([req])
            self.pool.write((req.kv.req_pool_idx, slice(0, start)), hit.to(torch.int32))
        self._allocate(req, start, end)
        for position in range(start, end):
            self._compute(req, position, full)
        req.extend_end = end
        if end == prompt:
            self._emit(req, True)
            if ends:
                self.finish(req)
                return
        common.checkpoint_kv_cache(req, self.tree)
        assert req.prefix_len == end, "the next chunk begins elsewhere"

    def decode(self, req: Any, canonical: bool = True) -> None:
        end = req.kv.kv_allocated_len
        self._allocate(req, end, end + 1)
        self._emit(req, canonical)
        rows = len(req.output_ids)
        found = self.ledger.canonical(req.gate.key) == rows if req.gate.gated else canonical
        self._compute(req, end, found)

    def verify(self, req: Any) -> None:
        """All rows that are not canonical become so."""
        self.ledger.request_tail(req.gate.key)
        for row in self.ledger.take(req.gate.key, LONGEST):
            self.ledger.verdict(row, match=True)
            self._compute(req, len(req.origin_input_ids) + row.index - 2, True)

    def update(self) -> None:
        """Other weights, while requests are where they are."""
        version = self.tree.version + 1
        waiting = [req for req in self.live if not req.kv.holds_kv]
        for req in self.live:
            if req in waiting:
                self.tree.unlock(req.lock)
            else:
                req.gate.crosses(version, len(req.output_ids))
        self.tree.part(version)
        for req in waiting:  # SGLang matches anew in each turn
            req.init_next_round_input(self.tree)
            req.lock = self.tree.lock(req.last_node)

    def finish(self, req: Any, insert: bool = True, known: bool = True) -> None:
        if not known:
            self._forget(req)
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        common.release_kv_cache(req, self.tree, checkpoint=insert)
        assert not req.kv.holds_kv and req.lock is None
        self._forget(req)
        self.live[:] = [other for other in self.live if other is not req]

    def answer(self, prompt: Sequence[int], rows: Sequence[bool] = (), **how: Any) -> Any:
        """A whole request; `rows` after the first, whether each is canonical."""
        req = self.arrive(prompt)
        while not self.is_prefilled(req):
            self.prefill(req)
        for canonical in rows:
            self.decode(req, canonical)
        self.finish(req, **how)
        self.check()
        return req

    @staticmethod
    def is_prefilled(req: Any) -> bool:
        return len(req.output_ids) > 0

    def _emit(self, req: Any, canonical: bool) -> None:
        key = req.gate.key
        if req.gate.gated:
            if key not in self.requests:
                self.requests.open(req)
            self.ledger.emit(key, flagged=False, canonical=canonical)
        req.output_ids.append(len(req.output_ids) % 2)

    def _forget(self, req: Any) -> None:
        self.requests.close(req)

    def _allocate(self, req: Any, start: int, end: int) -> None:
        common.evict_from_tree_cache(self.tree, end - start)
        slots = self.allocator.alloc(end - start)
        self.pool.write((req.kv.req_pool_idx, slice(start, end)), slots.to(torch.int32))
        req.kv.kv_committed_len = req.kv.kv_allocated_len = end

    def _compute(self, req: Any, position: int, canonical: bool) -> None:
        """One row of a forward: reads all columns before its own, and writes its own."""
        slots, tokens = self.slots(req, position + 1), self.tokens(req)[: position + 1]
        assert position >= req.kv.cache_protected_len, "a shared column is rewritten"
        before = [self.columns[slot].weights for slot in slots[:-1]]
        weights = frozenset({self.tree.version}).union(*before)
        self.columns[slots[-1]] = Column(tokens, canonical, weights)

    # -- what is to hold

    def slots(self, req: Any, count: int) -> list[int]:
        return self.pool.req_to_token[req.kv.req_pool_idx, :count].tolist()

    @staticmethod
    def tokens(req: Any) -> tuple[int, ...]:
        return (*req.origin_input_ids, *req.output_ids)

    def check(self) -> None:
        """Each slot is somebody's, each column where it belongs, each lock somebody's too."""
        integrity.check(self.scheduler, self.requests, self.in_flight)
        for req in self.live:
            if req.kv.holds_kv:
                self._check_columns(self.slots(req, req.kv.kv_allocated_len), self.tokens(req))
                path = self.tree.path_device_indices(req.lock.node).tolist()
                assert path == self.slots(req, req.kv.cache_protected_len)
        for node, tokens, slots in self.nodes():
            self._check_columns(slots, tokens)
            if self.is_current(node):
                seen = {self.columns[slot].weights for slot in slots}
                assert seen <= {frozenset({self.tree.version})}, "columns of other weights"
            else:
                assert self.tree.version > 0
            below = [req for req in self.live if self._is_behind(req.lock.node, node)]
            assert node.lock_ref == len(below), "a lock is nobody's, or missing"
        # Alone, a chunk that two share in part is split, and may lose one of its ends to others;
        # what is left is canonical, but no hit ends in it.
        for _, slots in self.gated_paths():
            assert all(self.columns[slot].canonical for slot in slots), "not canonical"

    def _check_columns(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        for i, slot in enumerate(slots):
            assert self.columns[slot].tokens == tuple(tokens[: i + 1]), f"slot {slot} is another's"

    def _is_behind(self, node: Any, other: Any) -> bool:
        while node is not other and node is not None:
            node = node.parent
        return node is not None

    def nodes(self) -> Iterator[tuple[Any, tuple[int, ...], list[int]]]:
        """Each node with the tokens and the slots up to its end."""
        nodes = [(child, (), []) for child in self.tree.root_node.children.values()]
        while nodes:
            node, tokens, slots = nodes.pop()
            tokens, slots = (*tokens, *node.key), [*slots, *node.value.tolist()]
            yield node, tokens, slots
            nodes += [(child, tokens, slots) for child in node.children.values()]

    def gated_paths(self) -> list[tuple[tuple[int, ...], list[int]]]:
        """What a gated request may hit: the leaves of their namespace."""
        found = []
        for node, tokens, slots in self.nodes():
            gated = CACHE_NAMESPACE in node.key.extra_key
            if gated and self.is_current(node) and not node.children:
                found.append((tokens, slots))
        return found

    def shared(self) -> list[tuple[int, ...]]:
        return sorted(tokens for tokens, _ in self.gated_paths())

    def is_current(self, node: Any) -> bool:
        """Whether requests may hit it: it is of the weights in memory."""
        version, *_ = node.key.extra_key.split(":")
        return bool(int(version) == self.tree.version)

    def end(self) -> None:
        """With every request gone nothing is locked, and all slots can be had back."""
        for req in [*self.live]:
            while not req.kv.holds_kv:  # a request that was never prefilled has nothing to release
                self.prefill(req)
            self.finish(req)
        self.check()
        assert self.tree.protected_size() == 0
        self.tree.evict(EvictParams(num_tokens=SLOTS))
        assert self.allocator.available_size() == SLOTS and self.pool.available_size() == REQUESTS
        assert self.tree.total_size() == 0 and self.tree.evictable_size() == 0


PROMPT = tuple(range(10, 20))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(getattr(request, "param", ALONE))
    yield made
    made.check()
    made.end()


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


# -- SGLang's admission over these pools, with the gate's around it


class Turn:
    """One prefill batch that SGLang makes up: its own adder, under the gate's admission."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        features = SimpleNamespace(enable_encoder_swa_bounded_replay=False)
        monkeypatch.setattr(schedule_policy, "get_exec", lambda: SimpleNamespace(features=features))
        self.admission = Admission(ALONE if world.alone else TOGETHER, CHUNK)
        running = schedule_batch.ScheduleBatch(reqs=[])
        self.adder = PrefillAdder(1, world.tree, world.allocator, running, 0.5, 4096, 6)

    def add(self, req: Any, chunked: bool = False) -> Any:
        return self.admission.add_one_req(PrefillAdder.add_one_req, self.adder, req, chunked, None)

    def go_on(self, req: Any) -> Any:
        return self.admission.add_chunked_req(PrefillAdder.add_chunked_req, self.adder, req)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(req.prefix_len, req.extend_end) for req in self.adder.can_run_list]


@pytest.mark.parametrize("world", [ALONE, TOGETHER], indirect=True)
def test_sglang_cuts_a_gated_prompt_where_the_grid_says(world: World, monkeypatch):
    """The server's own chunks have 6 tokens. A lock that the adder takes is the request's."""
    world.answer(PROMPT)
    req, beside = world.arrive((*PROMPT[:9], 1, 2, 3, 4, 5, 6, 7)), world.arrive((7, 8))
    for each in (req, beside):
        world.tree.unlock(each.lock)  # as they wait
    turn = Turn(world, monkeypatch)
    turn.add(req)
    assert turn.spans == [(8, 12) if world.alone else (9, 15)]
    assert turn.adder.new_chunked_req is req and req.lock.node is req.last_node
    assert turn.add(beside) is AddReqResult.OTHER and len(turn.spans) == 1
    world.tree.unlock(req.lock)
    for each in (req, beside):
        each.lock = world.tree.lock(each.last_node)


def test_a_chunk_that_finds_no_room_is_parked_and_goes_on_later(world: World, monkeypatch):
    req = world.arrive(tuple(range(30, 40)))
    world.prefill(req)
    turn = Turn(world, monkeypatch)
    turn.adder.memory_budget.current_offset = world.allocator.available_size() - CHUNK + 1
    assert turn.go_on(req) is req and not turn.spans
    assert req.extend_end == req.prefix_len == CHUNK, "SGLang stashes nothing of a parked chunk"
    turn.adder.memory_budget.current_offset -= 1
    assert turn.go_on(req) is req and turn.spans == [(CHUNK, 2 * CHUNK)]


def test_shorter_prompts_that_wait_leave_a_gated_chunk_whole(world: World, monkeypatch):
    """SGLang keeps room for them, with --schedule-policy shortest-prefill-first."""
    req, waits = world.arrive(tuple(range(30, 40))), world.arrive((7, 8))
    world.prefill(req)
    turn = Turn(world, monkeypatch)
    policy = schedule_policy.SchedulePolicy(
        "shortest-prefill-first", world.tree, False, False, False
    )
    limit = policy.shortest_prefill_chunk_limit(req, [waits], CHUNK, 1)
    assert limit == CHUNK - 2
    turn.adder.chunked_req_limit = limit
    assert turn.go_on(req) is req and turn.spans == [(CHUNK, 2 * CHUNK)]


PROMPTS = st.builds(  # answers go 0, 1, 0, 1 too: what one says may be what another is asked
    lambda length, tail: (*((0, 1) * 7)[:length], *tail),
    st.integers(1, 14),
    st.sampled_from([(), (), (1, 1), (0, 0, 1)]),
)


class Step(NamedTuple):
    """Something that happens to one of the requests; what does not fit it becomes what does."""

    what: str
    which: int
    prompt: tuple[int, ...]
    gated: bool
    count: int  # of tokens in a chunk, or to be evicted
    rows: list[bool]  # to be decoded, whether each is canonical
    insert: bool
    known: bool


MOSTLY = st.sampled_from([True, True, True, False])
KINDS = ("arrive", "go on", "go on", "go on", "verify", "finish", "abort", "evict", "update")
STEPS = st.builds(
    Step,
    what=st.sampled_from(KINDS),
    which=st.integers(0, REQUESTS - 1),
    prompt=PROMPTS,
    gated=MOSTLY,
    count=st.integers(1, 9),
    rows=st.lists(MOSTLY, min_size=1, max_size=4),
    insert=MOSTLY,
    known=MOSTLY,
)


def take(world: World, step: Step) -> None:
    if step.what == "evict":
        world.tree.evict(EvictParams(num_tokens=4 * step.count))
        return
    if step.what == "update":
        world.update()
        return
    if not world.live or (step.what == "arrive" and len(world.live) < REQUESTS):
        world.arrive(step.prompt, step.gated)
        return
    req = world.live[step.which % len(world.live)]
    if not world.is_prefilled(req) and (step.what != "abort" or not req.kv.holds_kv):
        world.prefill(req, step.count)
    elif step.what in ("finish", "abort"):  # an abort may come between two chunks
        world.finish(req, step.insert, step.known)
    elif step.what == "verify" and req.gate.gated:
        world.verify(req)
    else:
        for canonical in step.rows[: LONGEST - len(world.tokens(req))]:
            world.decode(req, canonical)


@pytest.mark.parametrize("mode", [ALONE, TOGETHER, ANSWERS], ids=["alone", "together", "answers"])
@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEPS, min_size=15, max_size=60))
def test_requests_that_come_and_go_in_any_order(mode: Prefill, steps: list[Step]):
    world = World(mode)
    for step in steps:
        take(world, step)
        world.check()
    world.end()
