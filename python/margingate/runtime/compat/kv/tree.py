"""SGLang's radix tree, and how a request's columns come into it and are freed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from margingate.runtime.compat.kv import columns, window_pool


class _Parted(BasePrefixCache):
    """What both trees are in front of SGLang's: all keys are those of one version.

    What entered under another is never found again.
    """

    version = 0

    def part(self, version: int) -> None:
        """Go on under another version. What no running request holds is given up at once."""
        self.version = version
        self.evict(EvictParams(num_tokens=self.evictable_size()))

    def _of_version(self, key: RadixKey) -> RadixKey:
        """The key in this version's namespace; no two namespaces come to share one."""
        more = "" if key.extra_key is None else f":{key.extra_key}"
        namespace = f"{self.version}{more}"
        return RadixKey(key.token_ids, namespace, key.is_bigram, key.limit, key.cache_salt)

    def touch_prefix(self, key: RadixKey) -> None:
        """As SGLang's: what a waiting request will hit counts as used now."""
        super().touch_prefix(self._of_version(key))

    def insert(self, params: InsertParams) -> Any:
        """As SGLang's."""
        return super().insert(replace(params, key=self._of_version(params.key)))


class _PartedTree(_Parted, RadixCache):
    """Of one pool."""

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        """As SGLang's."""
        return super().match_prefix(replace(params, key=self._of_version(params.key)))


class _PartedWindows(_Parted, UnifiedRadixCache):
    """Of two pools."""

    def _match_tree(self, params: MatchPrefixParams) -> Any:
        """As SGLang's; its own functions ask here too."""
        return super()._match_tree(replace(params, key=self._of_version(params.key)))


class Limits(BasePrefixCache):
    """In front of either tree: a subclass says how much of a request it takes in and gives out.

    SGLang's own functions insert, lock and free, with a smaller length.
    """

    def usable(self, req: Any, hit: int) -> int:
        """Of the columns that the tree has of a request's tokens, those that it may use.

        Args:
            req: None where SGLang looks without a request.
        """
        raise NotImplementedError

    def shareable(self, req: Any, length: int) -> int:
        """Of the first columns that a request has computed, those that enter the tree."""
        raise NotImplementedError

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        """As SGLang's; a hit ends where the request may use it.

        A shorter key may end in front of a window that is not all there, so that its hit is shorter
        again: it is cut until it fits.
        """
        match = super().match_prefix(params)
        while (usable := self.usable(params.req, hit := match.device_prefix_len)) < hit:
            params = replace(params, key=params.key[:usable])
            match = super().match_prefix(params)
        return match

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """After a prefill forward, and as the request is released: insert what is shareable.

        Where the tree has these columns already, the request's own are freed and its row holds the
        tree's. Mutates the row, the request's lock and its protected length. What is behind that is
        the request's own, and SGLang frees it with the request.
        """
        end = self.shareable(req, up_to)
        if end == up_to or end > columns.protected(req):
            super().checkpoint(req, up_to=end)


class LimitedRadixCache(Limits, _PartedTree):
    """The tree of one pool."""


class LimitedWindowCache(Limits, _PartedWindows):
    """The tree of two pools: the columns of a window may go before those of the other layers."""

    def replayable_from(self, req: Any) -> int:
        """The first position of a request that may have to be computed again, or is next."""
        raise NotImplementedError

    def evict_sliding_windows(self, req: Any, pre_len: int, *, eviction_interval: int = 1) -> None:
        """As SGLang's; what a replay would see stays.

        Args:
            pre_len: the position that is computed next.
        """
        pre_len = min(pre_len, self.replayable_from(req))
        super().evict_sliding_windows(req, pre_len, eviction_interval=eviction_interval)

    def release_swa_prefix_lock(self, req: Any) -> None:
        """As SGLang's; not while a replay would see what the tree has of the request."""
        if self.replayable_from(req) >= columns.protected(req) + self.sliding_window_size:
            super().release_swa_prefix_lock(req)

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """As the limits say. What does not enter the tree is the request's alone, and leaves its
        window as it goes: else a long prompt would not fit.
        """
        super().checkpoint(req, up_to=up_to)
        if columns.protected(req) < up_to and not req.finished():
            super().evict_sliding_windows(req, up_to)


def release(req: Any, tree: Any, *, checkpoint: bool) -> None:
    """Free the row and the slots of a request, if it has any; `checkpoint`: insert them first."""
    if columns.holds(req):
        release_kv_cache(req, tree, checkpoint=checkpoint)


@contextmanager
def hit_held(windows: LimitedWindowCache, req: Any) -> Iterator[int]:
    """What the tree has of a request that waits is not given up meanwhile.

    Yields the columns of a window.
    """
    lock = windows.lock(req.last_node)
    try:
        yield windows.sliding_window_size
    finally:
        windows.unlock(lock)


def evict(tree: Any, count: int) -> None:
    """Give up cached columns until so many slots are free, or nothing is left to give up."""
    evict_from_tree_cache(tree, count)


def slots(tree: Any) -> torch.Tensor:
    """int64 [columns] on the CPU, the slots that the tree holds; of a tree that is off, none."""
    if isinstance(windows := tree, LimitedWindowCache):
        found: torch.Tensor = windows.all_values_flatten()
        return found.to(torch.int64).cpu()
    values = [torch.empty(0, dtype=torch.int64)]
    nodes = list(tree.root_node.children.values()) if isinstance(tree, RadixCache) else []
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        values.append(node.value.to(torch.int64).cpu())
    return torch.cat(values)


def accounted(tree: Any) -> int:
    """The columns that the tree takes itself to hold."""
    return int(tree.evictable_size() + tree.protected_size())


def accounted_windows(windows: LimitedWindowCache) -> int:
    """The columns that the tree takes itself to hold in the pool of windows."""
    return int(windows.swa_evictable_size() + windows.swa_protected_size())


def room(scheduler: Any) -> int:
    """Tokens for which there are slots, counting what the tree can give up; of the fuller pool."""
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    if not window_pool.is_split(allocator.get_kvcache()):
        return int(allocator.available_size() + tree.evictable_size())
    both, windows = allocator, tree
    whole = both.full_available_size() + tree.evictable_size()
    return int(min(whole, both.swa_available_size() + windows.swa_evictable_size()))


def free_slots(allocator: Any) -> torch.Tensor:
    """int64 [slots] on the CPU: free, or freed in a group that SGLang has not ended yet."""
    allocator = window_pool.whole_allocator(allocator)
    groups = allocator.free_group or ()
    return window_pool.on_cpu((allocator.free_pages, allocator.release_pages, *groups))
