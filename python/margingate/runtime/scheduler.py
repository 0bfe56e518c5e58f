"""Hooks on SGLang's Scheduler: each hands over to the controller."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.registry import (
    register_radix_cache_backend,
    registered_radix_cache_backends,
)

from margingate.runtime import (
    audit,
    batches,
    detokenizer,
    ends,
    events,
    hook_table,
    hooks,
    metrics,
    pacing,
    radix,
    refused_models,
    request,
    state,
    study,
)
from margingate.runtime.arguments import (
    RADIX_BACKEND,
    confirm_schedulers,
    gate_config,
    gate_to_launch,
)
from margingate.runtime.tally import Tally

logger = logging.getLogger(__name__)


def init(original: Any, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__: a gated scheduler is patched here, and nowhere else."""
    config = gate_config(server_args)
    if config is None:
        original(self, server_args, *args, **kwargs)
        return
    from margingate.runtime.controller import GateController

    hooks.check_version()
    hooks.install(hook_table.RUNTIME_HOOKS)
    hooks.install(hook_table.INVARIANT_HOOKS if config.invariant else hook_table.STOCK_HOOKS)
    if config.study:
        hooks.install(hook_table.STUDY_HOOKS)
    if RADIX_BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(RADIX_BACKEND, radix.build)
    original(self, server_args, *args, **kwargs)
    refused_models.refuse_columns(self.tp_worker.model_runner)
    controller = GateController(self, config)
    controller.observers += metrics.observers(controller)
    controller.observers += events.observers(controller)
    controller.observers += audit.observers(controller)
    controller.observers += pacing.observers(controller)
    controller.observers += (Tally(exact=config.guarantee == "exact"),)
    state.set_controller(controller)
    logger.info("margingate: the deterministic gate is up: %s", config)


def launch(original: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Engine._launch_subprocesses: patch this process, then ask every scheduler."""
    config = gate_to_launch(server_args)
    if config is None:
        return original(cls, server_args, *args, **kwargs)
    hooks.install(hook_table.TOKENIZER_HOOKS)
    # By name, as SGLang passes it: this process starts detokenizers, which load no plugins.
    run = kwargs["run_detokenizer_process_func"]
    kwargs["run_detokenizer_process_func"] = partial(detokenizer.run, run)
    result = original(cls, server_args, *args, **kwargs)
    confirm_schedulers(result)
    return result


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
    request.clip(req)
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
    if not req.finished() or not radix.is_gated(req):
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
