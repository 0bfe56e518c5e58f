"""Which requests the next batch may hold: none that waits for its end, all that rejoined."""

from __future__ import annotations

from typing import Any

from margingate.runtime.compat.kv import tree
from margingate.runtime.request import guard
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import is_gated
from margingate.runtime.schedule.controller import GateController
from margingate.runtime.verify import rollback

CLOSE_VANISHED_EVERY = 64  # batches


def next_batch(controller: GateController, original: Any, running: Any, last: Any) -> Any:
    """AROUND Scheduler.get_next_batch_to_run: batches hold only what may decode on."""
    scheduler, requests = controller.scheduler, controller.requests
    if requests.step % CLOSE_VANISHED_EVERY == 0:
        close_vanished(scheduler, requests, controller.in_flight.batches())
    controller.before_next_batch(last)
    if requests.held:
        for batch in (running, last):
            if batch is not None and batch.reqs:
                _eject(requests, batch)
        if _memory_is_short(scheduler, running):
            controller.verify_everything()
    if requests.rejoining:
        running = _rejoin(scheduler, running, requests)
    _after_launch(last)
    plan = original(scheduler, running_batch=running, last_batch=last)
    launch(controller, plan.batch_to_run)
    if plan.batch_to_run is None and (requests.held or requests.any_pending()):
        controller.verify_everything()  # nobody will join them; they decode on in the next turn
    requests.observers.turned()
    return plan


def join(controller: GateController) -> None:
    """Between two steps: those that are to decode on are in SGLang's running batch, so that a
    pause finds them there.
    """
    scheduler, requests = controller.scheduler, controller.requests
    if requests.rejoining:
        scheduler.running_batch = _rejoin(scheduler, scheduler.running_batch, requests)


def launch(controller: GateController, batch: Any) -> None:
    """SGLang's next forward is that of this batch, if it is not None."""
    guard.launches(batch)
    if batch is not None and batch.forward_mode.is_extend():
        controller.penalties.admit(batch)
        if batch.is_prefill_only and any(map(is_gated, batch.reqs)):
            # SGLang samples none of a batch of scores, and all of one with a score. The log-probs
            # behind a prompt are computed in one way, then, and each gated row has its margin.
            batch.is_prefill_only = False


def _after_launch(last: Any) -> None:
    """Scores are in no decode step, while their prefill is in flight too: SGLang asks for it."""
    if last is not None and last.reqs and last.forward_mode.is_extend():
        last.is_prefill_only = all(req.is_prefill_only for req in last.reqs)


def _rejoin(scheduler: Any, running: Any, requests: OpenRequests) -> Any:
    """The batch to run; a failure ends those that were to rejoin, with the next turn."""
    reqs = requests.take_rejoining()
    try:
        return rollback.rejoin(scheduler, running, reqs)
    except Exception as error:
        for req in reqs:
            guard.failed(req, "a return to decoding", error)
            requests.mark_rejoining(req)
        return running


def close_vanished(scheduler: Any, requests: OpenRequests, in_flight: list[Any]) -> None:
    """Drop retracted requests that left SGLang's queue without a batch: aborted, or timed out."""
    away = [req for req in requests if req.is_retracted or req.gate.kept is not None]
    if not away:
        return
    batches = (scheduler.running_batch, scheduler.last_batch, *in_flight)
    known = {id(req) for batch in batches if batch is not None for req in batch.reqs}
    known |= {id(req) for req in (*scheduler.waiting_queue, *requests.rejoining)}
    known |= {id(scheduler.chunked_req), *map(id, requests.prefilled_again)}
    for req in away:
        if id(req) not in known and not requests.is_held(req):
            requests.close(req)


def _eject(requests: OpenRequests, batch: Any) -> None:
    stay = [i for i, req in enumerate(batch.reqs) if not requests.is_held(req)]
    if len(stay) < len(batch.reqs):
        batch.filter_batch(keep_indices=stay)
        batch.batch_is_full = False


def _memory_is_short(scheduler: Any, running: Any) -> bool:
    """Whether SGLang would soon retract requests for columns that held ones could free."""
    return tree.room(scheduler) < 2 * len(running.reqs)
