"""Hooks are seen to run: one that is in place may still never be called.

SGLang may reach what a hook is on by another way, or not at all any more, and then all is in place
and nothing is done. So each hook that a start must run is asked for when the checks at start end,
and each that any gated request must run is asked for when the first one ends, in the scheduler and
in the launcher. SGLang's server sends one itself when it starts. What is left runs only if a client
or an operator asks for something: a route, log-probs, an abort, an update.

Hooks on server arguments and on the launcher are told by what they leave: the settings, resolved,
the launcher's mark for its schedulers, and the word of each scheduler in its ready message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.config import GateConfig, GateError
from margingate.runtime.client import openai_answers
from margingate.runtime.compat.process import replicas
from margingate.runtime.compat.release import SGLANG_VERSION
from margingate.runtime.request import guard
from margingate.runtime.request.observer import Observer
from margingate.runtime.request.record import INFO_KEY, is_gated
from margingate.runtime.sampling import router_margins

_SCHEDULER = "managers.scheduler.Scheduler."
# Targets of hooks, in the scheduler.
LAYERS = (
    "model_executor.model_runner.ModelRunner.init_cuda_graphs",
    "layers.logits_processor.LogitsProcessor._compute_lm_head",
)
LINEAR = "layers.quantization.unquant.UnquantizedLinearMethod.apply"
SUMS = "distributed.parallel_state.GroupCoordinator.all_reduce"
REQUEST = (
    "managers.schedule_batch.Req.__init__",
    _SCHEDULER + "_add_request_to_queue",
    "managers.schedule_policy.PrefillAdder.add_one_req",
    "model_executor.model_runner.ModelRunner.sample",
    "layers.sampler.Sampler._preprocess_logits",
    "sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch",
    _SCHEDULER + "get_next_batch_to_run",
    _SCHEDULER + "process_batch_result",
    _SCHEDULER + "get_init_info",
    "mem_cache.memory_pool.ReqToTokenPool.free",
    "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
)
COPY = "managers.utils.GenerationBatchResult.copy_to_cpu"
FORWARD = "model_executor.model_runner.ModelRunner._forward_raw"
_MANAGER = "managers.tokenizer_manager.TokenizerManager."
# In the launcher.
CLIENT = (
    _MANAGER + "_validate_one_request",
    _MANAGER + "_create_tokenized_object",
    _MANAGER + "update_request_meta_info",
    _MANAGER + "generate_request",
)
_AT_A_REQUEST = "for a request"
_answered = False  # an answer of this process was seen to have passed all of it


def at_start(config: GateConfig, *, ranks: int, quantized: bool = False) -> Iterator[str]:
    """Targets whose hooks the checks at start run.

    Args:
        ranks: of tensor parallelism.
        quantized: whether the model is, so that it may have no linear layer of the usual kind.
    """
    if config.invariant:
        yield from LAYERS
        if not quantized:
            yield LINEAR
        if ranks > 1:
            yield SUMS


def by_a_request(config: GateConfig) -> Iterator[str]:
    """Targets whose hooks every gated request runs that gets a token."""
    yield from REQUEST
    if config.overlap == "on":
        yield COPY
    if not config.invariant:
        yield FORWARD
    if router_margins.TARGET in guard.tallies():  # hooked where the model has routers
        yield router_margins.TARGET


def silent(targets: Iterable[str]) -> list[str]:
    """Those whose hooks never ran in this process."""
    counts = guard.tallies()
    return [name for name in targets if name not in counts or not counts[name].fired]


def confirm(targets: Iterable[str], when: str) -> None:
    """Raises GateError with the first of the targets whose hook never ran; `when` says by when."""
    for name in silent(targets):
        raise GateError(
            f"--deterministic-gate patched sglang.srt.{name}, and SGLang did not call it {when}: "
            f"reinstall sglang=={SGLANG_VERSION}, or restrict the plugins with SGLANG_PLUGINS."
        )


class FirstRequest(Observer):
    """Ends this process when the first gated request has ended without a hook that it must run."""

    def __init__(self, config: GateConfig, *, replicas: int = 1) -> None:
        self._config, self._replicas = config, replicas
        self._seen = False

    def ended(self, req: Any) -> None:
        """Raises SystemExit, which no hook contains: SGLang's launcher ends with its schedulers."""
        reason = req.finished_reason
        done = reason is not None and not isinstance(reason, FINISH_ABORT) and req.output_ids
        if self._seen or not done or not is_gated(req):
            return
        self._seen = True
        try:
            confirm(by_a_request(self._config), _AT_A_REQUEST)
        except GateError as error:
            replicas.end_all(self._replicas)
            raise SystemExit(f"margingate: {error}") from None


def generate_request(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND TokenizerManager.generate_request: the first answers are looked at.

    What the client gets raises GateError then, until one answer has passed all hooks.
    """
    outputs = openai_answers.generate_request(original, manager, obj, request)
    return outputs if _answered else _looked_at(outputs)


async def _looked_at(outputs: Any) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            for each in output if isinstance(output, list) else [output]:
                _look_at(each["meta_info"])
            yield output


def _look_at(meta_info: dict[str, Any]) -> None:
    """The end of an answer has the gate's record, wherever a scheduler's hooks ran.

    Before its end, SGLang need not have called all of this process's hooks: an answer that is
    streamed has no record yet.
    """
    global _answered  # noqa: PLW0603
    reason = meta_info.get("finish_reason")
    if not reason or reason["type"] == "abort":
        return
    confirm(CLIENT, _AT_A_REQUEST)
    if INFO_KEY not in meta_info:
        raise GateError(
            "--deterministic-gate was given, and SGLang sent an answer that did not pass the "
            f"gate's hook on its stream: reinstall sglang=={SGLANG_VERSION}, or restrict the "
            "plugins with SGLANG_PLUGINS."
        )
    _answered = True
