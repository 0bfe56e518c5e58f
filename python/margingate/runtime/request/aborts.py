"""An abort by id ends the request of that id, and none whose id merely begins alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from margingate.runtime.request import lifecycle
from margingate.runtime.request.open_requests import OpenRequests


def abort_request(requests: OpenRequests, original: Any, scheduler: Any, recv_req: Any) -> None:
    """Around Scheduler.abort_request: the exact id, and the requests that SGLang does not know.

    SGLang's tokenizer process names the id of each request it means, those of a choice of `n`
    included; the scheduler then takes it for a beginning. An empty id is still all requests.
    """
    rid = "" if recv_req.abort_all else recv_req.rid
    with _hidden(scheduler, rid):
        original(scheduler, recv_req)
    lifecycle.abort(requests, scheduler.tree_cache, lambda req: not rid or req.rid == rid)


def abort_later(scheduler: Any, recv_req: Any) -> None:
    """Where `abort_request` raised: those of the id end with their next finish check."""
    for req in _known(scheduler):
        if recv_req.abort_all or req.rid == recv_req.rid:
            lifecycle.abort_next(req)


@contextmanager
def _hidden(scheduler: Any, rid: str) -> Iterator[None]:
    """Requests whose longer ids begin with `rid` have no id meanwhile; the scheduler waits."""
    alike = [r for r in _known(scheduler) if rid and r.rid != rid and r.rid.startswith(rid)]
    ids = [req.rid for req in alike]
    try:
        for req in alike:
            req.rid = ""
        yield
    finally:
        for req, own in zip(alike, ids, strict=True):
            req.rid = own


def _known(scheduler: Any) -> list[Any]:
    """Each request once that SGLang's abort looks at."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    found = [req for batch in batches if batch is not None for req in batch.reqs]
    found += [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    if scheduler.chunked_req is not None:
        found.append(scheduler.chunked_req)
    return list({id(req): req for req in found}.values())
