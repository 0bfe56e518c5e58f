"""A request that lost its columns to memory pressure answers as if it had kept them.

SGLang would prefill prompt and output together, and prefilled columns of output tokens have other
bits than decoded ones. So only the prompt is prefilled again (canonically, as before); then the
settled output is replayed as verifier rows.
"""

from __future__ import annotations

import logging
from array import array
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.core.queue import Due
from margingate.runtime import constraints, ends, rollback, state, verdicts
from margingate.runtime.record import Kept, is_gated, logprob_lists

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController

logger = logging.getLogger(__name__)


def release(original: Any, *, req: Any, **kwargs: Any) -> None:
    """AROUND schedule_batch.release_req: keep the settled tokens apart, forget the rest."""
    controller = state.active()
    if controller is None or not is_gated(req) or req.gate.key not in controller.requests:
        original(req=req, **kwargs)
        return
    kept = controller.ledger.retract(req.gate.key)
    original(req=req, **kwargs)
    controller.queue.forget(req.gate.key)
    controller.prefilled_again = [other for other in controller.prefilled_again if other is not req]
    if _is_given_up(req):
        ends.forget(controller, req)
        return
    req.gate.counts.retractions += 1
    if req.gate.kept is None and kept > 0:
        _set_aside(req, kept)
    req.output_ids = array("q")
    req.full_untruncated_fill_ids = array("q")
    constraints.follow(req)
    req.gate.forget_rows(kept)
    req.gate.waits_since = None


def _is_given_up(req: Any) -> bool:
    """Whether SGLang ends it here: no memory even alone. Other aborts go back to the queue."""
    reason = req.to_finish
    code = HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(reason, FINISH_ABORT) and reason.status_code == code


def _set_aside(req: Any, kept: int) -> None:
    lists = logprob_lists(req)
    req.gate.kept = Kept(req.output_ids[:kept], {n: v[:kept] for n, v in lists.items()})
    for values in lists.values():
        values.clear()


def give_back(req: Any) -> None:
    """Put the kept tokens and log-probs back as the request's output."""
    kept = req.gate.kept
    req.gate.kept = None
    req.output_ids = kept.tokens
    for name, values in kept.logprobs.items():
        setattr(req.logprob, name, values)
    constraints.follow(req)


def restore(controller: GateController, batch: Any) -> None:
    """After the prompt's new prefill: give the output back and want its columns replayed."""
    reqs, controller.prefilled_again = controller.prefilled_again, []
    replayed = []
    for req in reqs:
        if not req.finished() and _restore_one(controller, batch, req):  # not aborted meanwhile
            replayed.append(req.gate.key)
    if replayed:
        _replay(controller, replayed)


def _replay(controller: GateController, keys: list[str]) -> None:
    """Compute the columns of what was kept, whatever else waits: the next step reads them."""
    controller.rides.enter()
    for key in keys:
        controller.queue.drain(key)  # first in each pass
    while any(_waits(controller, key) for key in keys):
        rows = controller.queue.next_batch(controller.ledger)
        verdicts.run_pass(controller, rows, Due.DRAINING)


def _waits(controller: GateController, key: str) -> bool:
    ledger = controller.ledger
    # One whose grammar failed is finished, and its rows are never computed.
    return (
        ledger.is_open(key) and bool(ledger.wanted(key)) and not controller.requests[key].finished()
    )


def _restore_one(controller: GateController, batch: Any, req: Any) -> bool:
    """Returns whether there was room."""
    tokens = req.gate.kept.tokens
    if len(tokens) > 1 and not rollback.extend_columns(controller.scheduler, req, len(tokens) - 1):
        _retract_again(controller, batch, req)
        return False
    if req.output_ids[0] != tokens[0]:
        req.gate.counts.missed += 1
        logger.warning(
            "margingate: request %s chose another first token after a retraction: its prefill is "
            "not canonical on this machine; please report it.",
            req.rid,
        )
    give_back(req)
    req.full_untruncated_fill_ids = array("q")
    req.decode_batch_idx += len(tokens) - 1
    rollback.set_running_tail(controller.scheduler, (batch,), req)
    rollback.recount_reasoning(controller.scheduler, req)
    controller.ledger.replay(req.gate.key)
    controller.queue.note(req.gate.key, controller.step)
    return True


def _retract_again(controller: GateController, batch: Any, req: Any) -> None:
    """No room for the replay: wait in the queue for the running requests to end."""
    scheduler = controller.scheduler
    index = batch.reqs.index(req)
    batch.release_req(index, len(batch.reqs) - 1, scheduler.server_args)
    stay = [i for i in range(len(batch.reqs)) if i != index]
    batch.filter_batch(keep_indices=stay)
    scheduler._add_request_to_queue(req, is_retracted=True)
