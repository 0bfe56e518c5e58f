"""Hooks on SGLang's Scheduler: each hands over to the controller."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.runtime import audit, batches, ends, request, state, study
from margingate.runtime.record import is_gated


def request_init(_result: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER Req.__init__."""
    controller = state.active()
    if controller is not None:
        request.attach(req, controller.config)
        req.gate.generation = controller.fingerprint.admit()


def add_request(_scheduler: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE Scheduler._add_request_to_queue: answer what cannot be served with HTTP 400."""
    gate = getattr(req, "gate", None)
    if gate is None or req.to_finish is not None:
        return
    if refusal := gate.refusal or request.without_room(req):
        req.set_finish_with_abort(refusal)  # it goes on as a prompt of one token
        req.input_embeds = req.positional_embed_overrides = None


def process_batch_result(original: Any, _scheduler: Any, batch: Any, result: Any) -> None:
    """AROUND Scheduler.process_batch_result."""
    state.controller().process(original, batch, result)


def get_next_batch_to_run(
    original: Any, _scheduler: Any, running_batch: Any, last_batch: Any
) -> Any:
    """AROUND Scheduler.get_next_batch_to_run."""
    return batches.next_batch(state.controller(), original, running_batch, last_batch)


def update_finish_state(original: Any, req: Any, new_accepted_len: int = 1) -> None:
    """AROUND Req.update_finish_state: withhold the end of a request with pending rows."""
    original(req, new_accepted_len)
    if not req.finished() or not is_gated(req):
        return
    if req.gate.kept is not None and not isinstance(req.finished_reason, FINISH_ABORT):
        # Prefilled again after a retraction: this token only stands in for the output it had.
        req.finished_reason = req.finished_len = None
        return
    ends.hold(state.controller(), req)


def is_fully_idle(result: bool, *_args: Any, **_kwargs: Any) -> bool | None:
    """AFTER Scheduler.is_fully_idle: held requests own slots, so the server is not idle."""
    controller = state.controller()
    return False if controller.held or controller.rejoining else None


def before_free(pool: Any, req: Any) -> None:
    """BEFORE ReqToTokenPool.free: whoever wants to read the request's columns does so now."""
    audit.before_free(req)
    study.before_free(pool, req)


def on_idle(_result: Any, scheduler: Any) -> None:
    """AFTER Scheduler.on_idle: drop what a vanished request left behind; audit."""
    controller = state.controller()
    waiting = controller.auditor.audits.waiting
    if (controller.requests or waiting) and scheduler.is_fully_idle():
        ends.reap(controller)
        controller.auditor.idle()


def pause_generation(_scheduler: Any, _received: Any) -> None:
    """BEFORE Scheduler.pause_generation: let nothing wait across a pause."""
    state.controller().settle_all()
