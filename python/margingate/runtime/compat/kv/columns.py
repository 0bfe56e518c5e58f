"""SGLang's record of the K/V columns that a request has: nothing else reads or writes it.

A request's row of the page table holds the slots of its columns from position 0 on. Those below
`protected` are the prefix cache's, the others are its own.
"""

from __future__ import annotations

from typing import Any


def holds(req: Any) -> bool:
    """Whether the request has a row, and so slots."""
    return bool(req.kv.holds_kv)


def row(req: Any) -> int:
    """Its row of the page table. The request must hold one."""
    found: int = req.kv.req_pool_idx
    return found


def committed(req: Any) -> int:
    """Columns that are computed, or will be by a forward that was launched."""
    return int(req.kv.kv_committed_len)


def allocated(req: Any) -> int:
    """Columns that have a slot."""
    return int(req.kv.kv_allocated_len)


def protected(req: Any) -> int:
    """Columns that are the prefix cache's, and must not be written."""
    return int(req.kv.cache_protected_len)


def set_columns(req: Any, count: int) -> None:
    """It has so many columns, all of them computed; the slots are the caller's concern."""
    req.kv.kv_committed_len = req.kv.kv_allocated_len = count


def prefix(req: Any) -> int:
    """Tokens of the prompt whose columns are there: the next forward begins behind them."""
    return int(req.prefix_len)


def set_extend(req: Any, start: int, end: int) -> None:
    """The next prefill forward computes the columns of [start, end)."""
    req.prefix_len, req.extend_end = start, end


def park(req: Any) -> None:
    """The request's next chunk is in no forward yet; what it has so far stays."""
    req.extend_end = req.prefix_len


def retract(batch: Any, index: int) -> None:
    """Release one request of a running batch, as SGLang does; it stays in the batch."""
    batch.release_req(index, len(batch.reqs) - 1)
