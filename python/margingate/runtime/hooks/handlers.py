"""Hooks of a gated scheduler: each hands over to the object that it serves.

SGLang's functions cannot carry a reference to the gate, and there is one scheduler per process; so
the gate is kept here, and nothing below these handlers looks for it.
"""

from __future__ import annotations

from typing import Any

from margingate.runtime.client.control import NotRecorded
from margingate.runtime.compat.arguments import settings
from margingate.runtime.observe import study
from margingate.runtime.request import aborts, admission, guard
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.schedule import memory, next_batch, server_info
from margingate.runtime.schedule.controller import GateController

_controller: GateController | None = None  # None: the scheduler is being made


def serve(controller: GateController | None) -> None:
    """From now on hooks hand over to this one."""
    global _controller  # noqa: PLW0603
    _controller = controller
    guard.serve(() if controller is None else controller.requests)


def _gate() -> GateController:
    if _controller is None:
        raise RuntimeError("margingate: a gate hook ran before the gate was set up")
    return _controller


# -- requests


def request_init(_result: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER Req.__init__."""
    if _controller is not None:
        admission.attach(req, _controller.config)


def add_request(_scheduler: Any, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE Scheduler._add_request_to_queue: answer what cannot be served with HTTP 400."""
    if _controller is None:
        admission.queue(req, "")
    else:
        admission.queue(req, _controller.checks.images, _controller.takes)


def abort_request(original: Any, _scheduler: Any, recv_req: Any) -> None:
    """AROUND Scheduler.abort_request."""
    _gate().abort(original, recv_req)


def abort_failed(_original: Any, scheduler: Any, recv_req: Any) -> None:
    """After a failure of `abort_request`: nobody ends but those it names."""
    aborts.abort_later(scheduler, recv_req)


def release_req(original: Any, *, req: Any, **kwargs: Any) -> bool:
    """AROUND schedule_batch.release_req: a retraction. SGLang aborts the request at False."""
    if _controller is None:
        return bool(original(req=req, **kwargs))
    return _controller.retractions.release(original, req, **kwargs)


def before_free(pool: Any, req: Any) -> None:
    """BEFORE ReqToTokenPool.free: whoever wants to read the request's columns does so now."""
    if _controller is not None:
        _controller.auditor.freed(req)
        allocator = _controller.scheduler.token_to_kv_pool_allocator
        study.before_free(pool, allocator.get_kvcache(), req)


def stream_output(
    original: Any, streamer: Any, reqs: Any, return_logprob: bool, skip_req: Any = None
) -> None:
    """AROUND SchedulerOutputStreamer.stream_output."""
    _gate().output.send(original, streamer, reqs, return_logprob, skip_req)


def stream_failed(
    original: Any, streamer: Any, reqs: Any, return_logprob: bool, skip_req: Any = None
) -> None:
    """After a failure of `stream_output`."""
    _gate().output.send_failed(original, streamer, reqs, return_logprob, skip_req)


# -- batches


def add_one_req(
    original: Any, adder: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None
) -> Any:
    """AROUND PrefillAdder.add_one_req."""
    gate = _gate()
    result = gate.admission.add_one_req(
        original, adder, req, has_chunked_req, truncation_align_size
    )
    gate.weights.begun(adder, req)
    return result


def add_chunked_req(original: Any, adder: Any, req: Any) -> Any:
    """AROUND PrefillAdder.add_chunked_req."""
    return _gate().admission.add_chunked_req(original, adder, req)


def get_next_batch_to_run(
    original: Any, _scheduler: Any, running_batch: Any, last_batch: Any
) -> Any:
    """AROUND Scheduler.get_next_batch_to_run."""
    return next_batch.next_batch(_gate(), original, running_batch, last_batch)


def next_batch_failed(original: Any, scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    """After a failure of `get_next_batch_to_run`."""
    plan = original(scheduler, running_batch=running_batch, last_batch=last_batch)
    next_batch.launch(_gate(), plan.batch_to_run)
    return plan


def process_batch_result(original: Any, _scheduler: Any, batch: Any, result: Any) -> None:
    """AROUND Scheduler.process_batch_result."""
    _gate().process(original, batch, result)


def process_failed(original: Any, scheduler: Any, batch: Any, result: Any) -> None:
    """After a failure of `process_batch_result`. A result that came early has been processed."""
    if not InFlight.is_processed(result):
        original(scheduler, batch, result)


# -- forwards


def forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ModelRunner._forward_raw."""
    if _controller is None:
        return original(runner, forward_batch, *args, **kwargs)
    return _controller.merged.forward(original, runner, forward_batch, *args, **kwargs)


def sample(original: Any, runner: Any, logits_output: Any, forward_batch: Any) -> Any:
    """AROUND ModelRunner.sample."""
    if _controller is None:
        return original(runner, logits_output, forward_batch)
    return _controller.sampling.sample(original, runner, logits_output, forward_batch)


def after_preprocess(logits: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER Sampler._preprocess_logits."""
    return None if _controller is None else _controller.sampling.after_preprocess(logits)


def compute_logprobs(original: Any, processor: Any, logprobs: Any, *asked: Any) -> Any:
    """AROUND OutputLogprobProcessor.compute_logprobs."""
    if _controller is None:
        return original(processor, logprobs, *asked)
    return _controller.sampling.compute_logprobs(original, processor, logprobs, *asked)


def logprobs_failed(original: Any, processor: Any, logprobs: Any, *asked: Any) -> Any:
    """After a failure of `compute_logprobs`."""
    return _gate().sampling.logprobs_failed(original, processor, logprobs, *asked)


# -- the server


def is_fully_idle(_result: bool, *_args: Any, **_kwargs: Any) -> bool | None:
    """AFTER Scheduler.is_fully_idle: held requests own slots, so the server is not idle."""
    return False if _gate().requests.outside() else None


def on_idle(_result: Any, scheduler: Any) -> None:
    """AFTER Scheduler.on_idle: drop what a vanished request left behind; audit."""
    gate = _gate()
    if (len(gate.requests) or gate.auditor.audits.waiting) and scheduler.is_fully_idle():
        gate.idle()


def pause_generation(_scheduler: Any, _received: Any) -> None:
    """BEFORE Scheduler.pause_generation: let nothing wait across a pause."""
    gate = _gate()
    gate.verify_everything()
    next_batch.join(gate)


def weights_change(original: Any, manager: Any, received: Any) -> Any:
    """AROUND what replaces weights in SchedulerWeightUpdaterManager."""
    return _gate().weights.around(original, manager, received)


def release_memory(original: Any, manager: Any, received: Any) -> Any:
    """AROUND SchedulerWeightUpdaterManager.release_memory_occupation."""
    gate = _gate()
    gate.verify_everything()
    refused = memory.refusal(gate.scheduler, received)
    return memory.release(original, manager, received) if refused is None else refused


def record_experts(original: Any, scheduler: Any, received: Any) -> Any:
    """AROUND Scheduler.expert_distribution_handle."""
    if settings.view(scheduler.server_args).expert_distribution_recorder_mode is None:
        return NotRecorded(
            message="This server counts no experts: start it with "
            "--expert-distribution-recorder-mode."
        )
    return original(scheduler, received)


def weight_version_change(_scheduler: Any, new_version: str | None) -> None:
    """BEFORE Scheduler.record_weight_version_change."""
    _gate().weights.relabelled(new_version)


def init_info(result: dict[str, Any], *_args: Any) -> None:
    """AFTER Scheduler.get_init_info: the launcher refuses schedulers that do not say this."""
    result[server_info.INFO_KEY] = server_info.init_info(_gate().config)


def internal_state(result: Any, *_args: Any) -> None:
    """AFTER Scheduler.get_internal_state: the counters in `/server_info`."""
    result.internal_state[server_info.INFO_KEY] = server_info.internal_state(_gate())
