"""The invariants that hold between two steps, checked: ledger, requests, slots, radix tree."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController


EVERY_S = 60.0  # between two checks of a server that is never idle


def check(controller: GateController) -> None:
    """Raises AssertionError with a sentence on the first thing that does not agree."""
    controller.ledger.check_integrity()
    for key, req in controller.requests.items():
        _check_request(controller, key, req)
    _check_slots(controller)


class Reports:
    """What `check` last said: it reads every slot, on the scheduler's thread, so not each time."""

    def __init__(self) -> None:
        self._said = ""
        self._due = 0.0  # on the clock of time.monotonic; for a server that is not idle

    def report(self, controller: GateController) -> str:
        """ "ok", or the sentence that `check` raised.

        It is checked anew where the server is idle, and else once in EVERY_S.
        """
        if time.monotonic() >= self._due or controller.scheduler.is_fully_idle():
            self._said = _said(controller)
            self._due = time.monotonic() + EVERY_S
        return self._said


def _said(controller: GateController) -> str:
    try:
        check(controller)
    except AssertionError as error:
        return str(error)
    return "ok"


def _check_request(controller: GateController, key: str, req: Any) -> None:
    ledger = controller.ledger
    assert key in set(ledger.requests()), f"request {req.rid} is open but not in the ledger"
    if req.req_pool_idx is None:  # waits for its prompt to be prefilled again
        return
    tokens = len(req.gate.kept.tokens) if req.gate.kept is not None else len(req.output_ids)
    emitted = ledger.emitted(key)
    assert tokens == emitted, f"request {req.rid} has {tokens} tokens, the ledger {emitted}"
    if req.gate.kept is not None:
        return
    columns, allocated = req.kv_committed_len, req.kv.kv_allocated_len
    wanted = len(req.origin_input_ids) + tokens - 1 + _rows_in_flight(controller, req)
    assert columns == allocated == wanted, (
        f"request {req.rid} holds {columns} columns of {allocated} allocated, not {wanted}"
    )


def _rows_in_flight(controller: GateController, req: Any) -> int:
    """Decode rows of the request whose results are not processed yet (overlap scheduling)."""
    batches = [b for b in controller.in_flight.batches() if b.forward_mode.is_decode()]
    return sum(other is req for batch in batches for other in batch.reqs)


def _live_requests(controller: GateController) -> list[Any]:
    """Every request that holds slots, gated or not."""
    scheduler = controller.scheduler
    batches = [controller.batch, scheduler.running_batch, scheduler.last_batch]
    batches += controller.in_flight.batches()
    reqs = [req for batch in batches if batch is not None for req in batch.reqs]
    reqs += [*controller.held.values(), *controller.rejoining]
    if scheduler.chunked_req is not None:
        reqs.append(scheduler.chunked_req)
    unique = {id(req): req for req in reqs if req.req_pool_idx is not None}
    return list(unique.values())


def _check_slots(controller: GateController) -> None:
    """Each slot is free, in the tree, or owned by exactly one request."""
    scheduler = controller.scheduler
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    parts = [("free", _free_slots(allocator)), ("in the tree", _tree_slots(tree))]
    table = scheduler.req_to_token_pool.req_to_token
    for req in _live_requests(controller):
        own = table[req.req_pool_idx, req.cache_protected_len : req.kv.kv_allocated_len]
        parts.append((f"of request {req.rid}", own.to(torch.int64).cpu()))
    counts = torch.bincount(torch.cat([slots for _, slots in parts]), minlength=allocator.size + 1)
    twice, lost = counts > 1, counts[1:] == 0
    if twice.any():
        slot = int(twice.nonzero()[0])
        owners = [name for name, slots in parts if (slots == slot).any()]
        raise AssertionError(f"slot {slot} has several owners: {', '.join(owners)}")
    assert not lost.any(), f"{int(lost.sum())} of {allocator.size} slots are nobody's"
    total = tree.total_size() if hasattr(tree, "root_node") else 0
    accounted = tree.evictable_size() + tree.protected_size()
    assert total == accounted, f"the tree holds {total} columns but accounts for {accounted}"


def _free_slots(allocator: Any) -> torch.Tensor:
    pages = [allocator.free_pages, allocator.release_pages]
    return torch.cat([page.to(torch.int64).cpu() for page in pages if page is not None])


def _tree_slots(tree: Any) -> torch.Tensor:
    values, nodes = [torch.empty(0, dtype=torch.int64)], [getattr(tree, "root_node", None)]
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        nodes.extend(node.children.values())
        if node.parent is not None:
            values.append(node.value.to(torch.int64).cpu())
    return torch.cat(values)
