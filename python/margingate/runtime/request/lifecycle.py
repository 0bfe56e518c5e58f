"""The ends of requests: withheld while rows are pending, given back, aborted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic as now
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.compat.kv.tree import release as release_columns
from margingate.runtime.compat.model import images
from margingate.runtime.request import guard
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import Hold


@contextmanager
def ends_withheld(requests: OpenRequests, reqs: list[Any]) -> Iterator[None]:
    """Meanwhile SGLang's finish checks of `reqs` are `check_finish`. No hook: it would run for each
    row of each step, and few are pending.
    """
    for req in reqs:
        req.update_finish_state = partial(check_finish, requests, req)
    try:
        yield
    finally:
        for req in reqs:
            del req.update_finish_state


def check_finish(requests: OpenRequests, req: Any, accepted: int = 1) -> None:
    """SGLang's finish check behind so many tokens; an end with pending rows is withheld."""
    type(req).update_finish_state(req, accepted)
    if req.finished_reason is not None:
        with guard.request(req, "a finish check"):
            finish_checked(requests, req)


def finish_checked(requests: OpenRequests, req: Any) -> None:
    """SGLang found that a gated request is finished: withhold its end while rows are pending."""
    if req.gate.kept is not None and not isinstance(req.finished_reason, FINISH_ABORT):
        # Prefilled again after a retraction: this token only stands in for the output it had.
        req.finished_reason = req.finished_len = None
        return
    key = req.gate.key
    if key not in requests or isinstance(req.finished_reason, FINISH_ABORT):
        return
    requests.ledger.stop(key)
    if requests.ledger.pending(key):
        requests.withhold(req, Hold(req.finished_reason, req.finished_len, now()))
        req.finished_reason = req.finished_len = None


def release(requests: OpenRequests, tree: Any, req: Any) -> None:
    """All rows of a held request are settled: give it its end back."""
    held = requests.unhold(req)
    assert held is not None, f"request {req.rid} is not held"
    req.finished_reason, req.finished_len = held.reason, held.length
    end(requests, tree, req)


def end(requests: OpenRequests, tree: Any, req: Any) -> None:
    """Free the columns of a finished request; its end is to be sent, whatever raises here."""
    requests.mark_ended(req)
    try:
        routed_experts.keep(req, tree)
    finally:
        release_columns(req, tree, checkpoint=True)
        images.release_features(req)
    req.time_stats.set_completion_time()


def give_up(requests: OpenRequests, tree: Any, req: Any) -> None:
    """Its grammar failed in a verify pass: abort it now. Only with nothing in flight."""
    if req.finished():
        return
    requests.unhold(req)
    requests.verify_no_more(req)
    abort_next(req)
    req.update_finish_state(1)
    end(requests, tree, req)


def end_failed(requests: OpenRequests, tree: Any) -> None:
    """End those that an exception of ours ended, and no finish check would. Nothing in flight."""
    for req in requests.failed():
        with guard.request(req, "the end of a failed request"):
            give_up(requests, tree, req)


def abort_next(req: Any) -> None:
    """End the request with its next finish check, as SGLang does where a token is not taken."""
    if not req.finished() and req.to_finish is None:
        req.to_finish = FINISH_ABORT()


def abort(requests: OpenRequests, tree: Any, matches: Callable[[Any], bool]) -> None:
    """A client gave up: end held and rejoining requests, which SGLang does not know of, by the
    reason that one has for its end already, if any.
    """
    for req in filter(matches, (*requests.held, *requests.rejoining)):
        with guard.request(req, "an abort"):
            requests.verify_no_more(req)
            said, req.to_finish = req.to_finish, None
            req.finished_reason = said if isinstance(said, FINISH_ABORT) else FINISH_ABORT()
            end(requests, tree, req)


@contextmanager
def passed_over(reqs: list[Any]) -> Iterator[None]:
    """SGLang's result processing skips `reqs`, as it does with requests that were retracted."""
    for req in reqs:
        req.is_retracted = True
    try:
        yield
    finally:
        for req in reqs:
            req.is_retracted = False
