"""SGLang's radix tree, and how a request's columns come into it and are freed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from margingate.runtime.compat import columns


class LimitedRadixCache(RadixCache):
    """The tree, where a subclass says how much of a request it takes in and gives out.

    SGLang's own functions insert, lock and free, with a smaller length. All keys are those of one
    version: what entered under another is never found again.
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
        """As SGLang's; a hit ends where the request may use it."""
        params = replace(params, key=self._of_version(params.key))
        match = super().match_prefix(params)
        hit = match.device_prefix_len
        usable = self.usable(params.req, hit)
        if usable == hit:
            return match
        return super().match_prefix(replace(params, key=params.key[:usable]))

    def touch_prefix(self, key: RadixKey) -> None:
        """As SGLang's: what a waiting request will hit counts as used now."""
        super().touch_prefix(self._of_version(key))

    def insert(self, params: InsertParams) -> Any:
        """As SGLang's."""
        return super().insert(replace(params, key=self._of_version(params.key)))

    def checkpoint(self, req: Any, *, up_to: int) -> None:
        """After a prefill forward, and as the request is released: insert what is shareable.

        Where the tree has these columns already, the request's own are freed and its row holds the
        tree's. Mutates the row, the request's lock and its protected length. What is behind that is
        the request's own, and SGLang frees it with the request.
        """
        end = self.shareable(req, up_to)
        if end == up_to or end > columns.protected(req):
            super().checkpoint(req, up_to=end)


def release(req: Any, tree: Any, *, checkpoint: bool) -> None:
    """Free the row and the slots of a request, if it has any; `checkpoint`: insert them first."""
    if columns.holds(req):
        release_kv_cache(req, tree, checkpoint=checkpoint)


def evict(tree: Any, count: int) -> None:
    """Give up cached columns until so many slots are free, or nothing is left to give up."""
    evict_from_tree_cache(tree, count)


def slots(tree: Any) -> torch.Tensor:
    """int64 [columns] on the CPU, the slots that the tree holds; of a tree that is off, none."""
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


def free_slots(allocator: Any) -> torch.Tensor:
    """int64 [slots] on the CPU: free, or freed in a group that SGLang has not ended yet."""
    parts = [allocator.free_pages, allocator.release_pages, *(allocator.free_group or ())]
    return torch.cat([part.to(torch.int64).cpu() for part in parts if part is not None])
