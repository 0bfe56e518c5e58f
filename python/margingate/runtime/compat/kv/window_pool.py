"""SGLang's second K/V pool: that of the layers which see a window, beside that of the others.

The page table, the tree and SGLang's requests know slots of the whole pool, for layers that see
everything. A mapping gives the slot of the window pool which belongs to each of them, or 0, the
reserved slot, where the column has left its window and was given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def is_split(pool: Any) -> bool:
    """Whether layers with a window have a pool of their own in this K/V pool."""
    return isinstance(pool, SWAKVPool)


def whole(pool: Any) -> Any:
    """The pool of the layers that see everything; the pool itself where there is one."""
    return pool.full_kv_pool if is_split(pool) else pool


def whole_allocator(allocator: Any) -> Any:
    """That of the slots of layers that see everything; the allocator itself where there is one."""
    return allocator.full_attn_allocator if is_split(allocator.get_kvcache()) else allocator


def sizes(allocator: Any) -> tuple[int, int]:
    """Slots of the whole pool, and of that of windows."""
    return int(allocator.size_full), int(allocator.size_swa)


def why_unknown(pool: Any, allocator: Any) -> str:
    """What of a split pool is not as the gate knows it; empty where nothing is."""
    parts = (pool.full_kv_pool, pool.swa_kv_pool)
    kinds = {type(part).__name__ for part in parts if type(part) is not MHATokenToKVPool}
    if type(allocator) is not SWATokenToKVPoolAllocator:
        kinds.add(type(allocator).__name__)
    else:
        each = (allocator.full_attn_allocator, allocator.swa_attn_allocator)
        kinds |= {type(part).__name__ for part in each if type(part) is not TokenToKVPoolAllocator}
    return ", ".join(sorted(kinds))


def slots_in(pool: Any, layer_id: int, slots: torch.Tensor) -> torch.Tensor:
    """The slots, int64 of any shape, at which this layer has the columns of `slots`."""
    if is_split(pool) and pool.layers_mapping[layer_id][1]:
        slots = windows_of(pool, slots)
    return slots


def windows_of(pool: Any, slots: torch.Tensor) -> torch.Tensor:
    """Slots of the window pool, int64, that belong to slots, int64, of a split pool's other part.

    0: there is none any more.
    """
    on_device = slots.to(pool.full_to_swa_index_mapping.device)
    found: torch.Tensor = pool.translate_loc_from_full_to_swa(on_device)
    return found


def free_slots(allocator: Any) -> torch.Tensor:
    """int64 [slots] on the CPU: free in the window pool, or freed in a group not ended yet."""
    part = allocator.swa_attn_allocator
    groups = (*allocator.swa_free_group, *allocator.swa_page_ids_group)
    return on_cpu((part.free_pages, part.release_pages, *groups))


def on_cpu(parts: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """int64 [slots] on the CPU: those of the parts that are there, behind each other."""
    return torch.cat([part.to(torch.int64).cpu() for part in parts if part is not None])


def given_up_at_once() -> int:
    """Columns that leave their window before SGLang gives them up."""
    return max(1, int(envs.SGLANG_SWA_EVICTION_INTERVAL.get()))


def given_up(req: Any) -> int:
    """Columns of a request, from the first on, that it gave up or shares in the window pool."""
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    return int(max(req.kv.get_evicted_seqlen(ComponentType.SWA), req.kv.cache_protected_len))


@contextmanager
def scratch(pool: Any, count: int) -> Iterator[None]:
    """Slots 1 to `count` are each other's in both parts meanwhile. Only before the first request.

    Raises:
        ValueError: one part has fewer.
    """
    if not is_split(pool):
        yield
        return
    if count > min(pool.size, pool.size_swa):
        raise ValueError(f"{count} slots, of {pool.size} and {pool.size_swa} with a window")
    mapping = pool.full_to_swa_index_mapping
    slots = torch.arange(1, count + 1, dtype=mapping.dtype, device=mapping.device)
    before = mapping[1 : count + 1].clone()
    mapping[1 : count + 1] = slots
    try:
        yield
    finally:
        mapping[1 : count + 1] = before
