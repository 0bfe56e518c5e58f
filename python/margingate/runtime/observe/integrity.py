"""The invariants that hold between two steps, checked: ledger, requests, slots, radix tree."""

from __future__ import annotations

import time
from typing import Any

import torch

from margingate.runtime.compat.kv import columns, tree, window_pool
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests

EVERY_S = 60.0  # between two checks of a server that is never idle


def check(scheduler: Any, requests: OpenRequests, in_flight: InFlight) -> None:
    """Raises AssertionError with a sentence on the first thing that does not agree."""
    requests.ledger.check_integrity()
    for req in requests:
        _check_request(requests, in_flight, req)
    _check_slots(scheduler, ColumnHolders(scheduler, requests, in_flight).all())


class Reports:
    """What `check` last said: it reads every slot, on the scheduler's thread, so not each time."""

    def __init__(self, scheduler: Any, requests: OpenRequests, in_flight: InFlight) -> None:
        self._scheduler, self._requests, self._in_flight = scheduler, requests, in_flight
        self._said = ""
        self._due = 0.0  # on the clock of time.monotonic; for a server that is not idle

    def report(self) -> str:
        """ "ok", or the sentence that `check` raised.

        It is checked anew where the server is idle, and else once in EVERY_S.
        """
        if time.monotonic() >= self._due or self._scheduler.is_fully_idle():
            self._said = self._check()
            self._due = time.monotonic() + EVERY_S
        return self._said

    def _check(self) -> str:
        try:
            check(self._scheduler, self._requests, self._in_flight)
        except AssertionError as error:
            return str(error)
        return "ok"


def _check_request(requests: OpenRequests, in_flight: InFlight, req: Any) -> None:
    ledger, key = requests.ledger, req.gate.key
    assert key in set(ledger.requests()), f"request {req.rid} is open but not in the ledger"
    if not columns.holds(req):  # waits for its prompt to be prefilled again
        return
    tokens = len(req.gate.kept.tokens) if req.gate.kept is not None else len(req.output_ids)
    emitted = ledger.emitted(key)
    assert tokens == emitted, f"request {req.rid} has {tokens} tokens, the ledger {emitted}"
    again = not emitted and req.retraction_count > 0
    if req.gate.kept is not None or again:  # its prompt is being prefilled again
        return
    committed, allocated = columns.committed(req), columns.allocated(req)
    wanted = len(req.origin_input_ids) + tokens - 1 + _rows_in_flight(in_flight, req)
    assert committed == allocated == wanted, (
        f"request {req.rid} holds {committed} columns of {allocated} allocated, not {wanted}"
    )


def _rows_in_flight(in_flight: InFlight, req: Any) -> int:
    """Decode rows of the request whose results are not processed yet (overlap scheduling)."""
    batches = [b for b in in_flight.batches() if b.forward_mode.is_decode()]
    return sum(other is req for batch in batches for other in batch.reqs)


def _check_slots(scheduler: Any, live: list[Any]) -> None:
    """Each slot is free, in the tree, or owned by exactly one request."""
    allocator, cached = scheduler.token_to_kv_pool_allocator, tree.slots(scheduler.tree_cache)
    parts = [("free", tree.free_slots(allocator)), ("in the tree", cached)]
    parts += [(f"of request {req.rid}", _own(scheduler, req)) for req in live]
    split = window_pool.is_split(allocator.get_kvcache())
    _check_owners("slot", parts, window_pool.sizes(allocator)[0] if split else allocator.size)
    accounted = tree.accounted(scheduler.tree_cache)
    assert len(cached) == accounted, (
        f"the tree holds {len(cached)} columns but accounts for {accounted}"
    )
    if split:
        _check_windows(scheduler, live, cached)


def _own(scheduler: Any, req: Any) -> torch.Tensor:
    """int64 [columns] on the CPU: slots of the request that are not the tree's."""
    table = scheduler.req_to_token_pool.req_to_token
    own: torch.Tensor = table[columns.row(req), columns.protected(req) : columns.allocated(req)]
    return own.to(torch.int64).cpu()


def _check_owners(what: str, parts: list[tuple[str, torch.Tensor]], size: int) -> None:
    """Of slots 1 to `size` each is in one part, once; slot 0 is in none."""
    counts = torch.bincount(torch.cat([slots for _, slots in parts]), minlength=size + 1)
    twice, lost = counts > 1, counts[1:] == 0
    assert not counts[0], f"{what} 0 has an owner, and is to have none"
    if twice.any():
        slot = int(twice.nonzero()[0])
        owners = [name for name, slots in parts if (slots == slot).any()]
        raise AssertionError(f"{what} {slot} has several owners: {', '.join(owners)}")
    each = what.replace("slot", "slots", 1)
    assert not lost.any(), f"{int(lost.sum())} of {size} {each} are nobody's"


def _check_windows(scheduler: Any, live: list[Any], cached: torch.Tensor) -> None:
    """The same of the pool of windows. A request has all columns there that it did not give up."""
    allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    pool = allocator.get_kvcache()

    def windows(slots: torch.Tensor) -> torch.Tensor:
        return window_pool.windows_of(pool, slots).cpu()

    held = windows(cached)
    parts = [("free", window_pool.free_slots(allocator)), ("in the tree", held[held > 0])]
    for req in live:
        own = windows(_own(scheduler, req))
        gone = window_pool.given_up(req) - columns.protected(req)
        assert not own[:gone].any() and own[gone:].all(), (
            f"request {req.rid} gave up {gone} columns of its windows, but has other ones"
        )
        parts.append((f"of request {req.rid}", own[gone:]))
    _check_owners("slot with a window", parts, window_pool.sizes(allocator)[1])
    assert not windows(tree.free_slots(allocator)).any(), "a free slot has one with a window"
    accounted = tree.accounted_windows(cache)
    assert len(parts[1][1]) == accounted, (
        f"the tree holds {len(parts[1][1])} columns of windows but accounts for {accounted}"
    )
