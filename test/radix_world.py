"""SGLang's own pools, the gate's tree, and requests without a model, for the tests of radix trees.

A slot holds what its column was computed from, so that a column in the wrong place, or one that is
not canonical, is seen wherever it turns up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.config import GateConfig
from margingate.runtime.observe import integrity
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import CACHE_NAMESPACE, GateRequest
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
