"""The ends of requests: withheld while rows are pending, given back, aborted, forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import release_kv_cache

from margingate.runtime import constraints, guard
from margingate.runtime.request import Hold, now

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController


def hold(controller: GateController, req: Any) -> None:
    """AFTER the request's own finish check: withhold its end while rows are pending."""
    key = req.gate.key
    if key not in controller.requests or isinstance(req.finished_reason, FINISH_ABORT):
        return
    controller.ledger.stop(key)
    if controller.ledger.pending(key):
        req.gate.hold = Hold(req.finished_reason, req.finished_len, now())
        req.finished_reason = req.finished_len = None
        controller.held[key] = req
        controller.queue.note(key, controller.step)
        controller.queue.drain(key)


def let_go(controller: GateController, req: Any) -> None:
    """A request decodes on, or ends: it is not held any more."""
    if controller.held.pop(req.gate.key, None) is not None:
        req.gate.counts.drain_s += now() - req.gate.hold.since
        req.gate.hold = None


def release(controller: GateController, req: Any) -> None:
    """All rows of a held request are settled: give it its end back."""
    held = req.gate.hold
    let_go(controller, req)
    req.finished_reason, req.finished_len = held.reason, held.length
    end(controller, req)


def end(controller: GateController, req: Any) -> None:
    """Free the columns of a finished request; it is told with the next `stream`."""
    release_kv_cache(req, controller.scheduler.tree_cache)
    req.time_stats.set_completion_time()
    controller.ended.append(req)


def give_up(controller: GateController, req: Any) -> None:
    """Its grammar failed in a verify pass: abort it now. Only with nothing in flight."""
    if req.finished():
        return
    let_go(controller, req)
    controller.rejoining = [other for other in controller.rejoining if other is not req]
    controller.queue.forget(req.gate.key)
    constraints.abort(req)
    req.update_finish_state(1)
    end(controller, req)


def end_failed(controller: GateController) -> None:
    """Those that an exception of ours ends, and no finish check would. Nothing in flight."""
    controller.failed = False
    for req in (*controller.held.values(), *controller.rejoining):
        if req.gate.failed:
            give_up(controller, req)
    controller.stream([])


def abort(controller: GateController, matches: Any) -> None:
    """A client gave up: end held and rejoining requests, which SGLang does not know of."""
    gone = [req for req in (*controller.held.values(), *controller.rejoining) if matches(req)]
    for req in gone:
        controller.held.pop(req.gate.key, None)
        controller.rejoining = [other for other in controller.rejoining if other is not req]
        req.gate.hold = None
        req.finished_reason = FINISH_ABORT()
        controller.queue.forget(req.gate.key)
        end(controller, req)
    controller.stream([])


def forget(controller: GateController, req: Any) -> None:
    """The request's last output is on its way (or it vanished)."""
    gate = req.gate
    if controller.requests.pop(gate.key, None) is None:
        return
    controller.held.pop(gate.key, None)
    controller.ledger.close(gate.key)
    controller.queue.forget(gate.key)
    counts = gate.counts
    passes, counts.passes = counts.passes, 0  # passes are shared: the total counts its own
    controller.totals.add(counts)
    counts.passes = passes
    guard.tell(controller.observers, "ended", req)


def reap_dropped(controller: GateController) -> None:
    """Drop retracted requests that left SGLang's queue without a batch: aborted, or timed out."""
    away = [r for r in controller.requests.values() if r.is_retracted or r.gate.kept is not None]
    if not away:
        return
    scheduler = controller.scheduler
    batches = (scheduler.running_batch, scheduler.last_batch, *controller.in_flight.batches())
    known = {id(req) for batch in batches if batch is not None for req in batch.reqs}
    known |= {id(req) for req in (*scheduler.waiting_queue, *controller.rejoining)}
    known |= {id(scheduler.chunked_req), *map(id, controller.prefilled_again)}
    for req in away:
        if id(req) not in known and req.gate.key not in controller.held:
            forget(controller, req)


def reap(controller: GateController) -> None:
    """When SGLang is idle nothing is open; drop what an abort in its queues left behind."""
    for req in list(controller.requests.values()):
        forget(controller, req)
