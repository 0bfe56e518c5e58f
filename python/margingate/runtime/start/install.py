"""A gated server starts: its processes are patched, and each scheduler is asked for its gate."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from sglang.srt.mem_cache.registry import (
    register_radix_cache_backend,
    registered_radix_cache_backends,
)

from margingate.config import GateError
from margingate.runtime.compat import release, surface
from margingate.runtime.compat.arguments.server_args import LAUNCHED, RADIX_BACKEND, gate_config
from margingate.runtime.compat.model import vision
from margingate.runtime.compat.process import ranks, replicas
from margingate.runtime.hooks import firing, handlers, registry, scheduler_table
from margingate.runtime.hooks.launcher_table import DETOKENIZER_HOOKS, TOKENIZER_HOOKS
from margingate.runtime.observe import audit, event_records, metrics
from margingate.runtime.probe.checks import loaded_model
from margingate.runtime.probe.startup_checks import run_checks
from margingate.runtime.request.observer import Observer
from margingate.runtime.schedule import radix, server_info
from margingate.runtime.schedule.controller import GateController
from margingate.runtime.start import arguments, pools, refused_models, replicas_alike
from margingate.runtime.start.engine import gate_to_launch
from margingate.runtime.verify import delay

logger = logging.getLogger(__name__)


def init(original: Any, self: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND Scheduler.__init__: a gated scheduler is patched here, and nowhere else."""
    config = gate_config(server_args)
    if config is None:
        original(self, server_args, *args, **kwargs)
        return
    release.check_version()
    surface.check()
    arguments.confirm_settings(server_args)
    confirm_launcher(server_args)
    registry.install(scheduler_table.RUNTIME_HOOKS)
    registry.install(
        scheduler_table.INVARIANT_HOOKS if config.invariant else scheduler_table.STOCK_HOOKS
    )
    if config.study:
        registry.install(scheduler_table.STUDY_HOOKS)
    if RADIX_BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(RADIX_BACKEND, radix.build)
    original(self, server_args, *args, **kwargs)
    refused_models.refuse_columns(self.tp_worker.model_runner)
    refused_models.refuse_stock_experts(self.tp_worker.model_runner.model, config)
    refused_models.refuse_other_masks(self.tp_worker.model_runner.model, config)
    if not config.invariant:  # whose probe has looked already
        loaded_model.refuse(self.tp_worker.model_runner)
    pools.confirm(self, config)
    checks = run_checks(self, config)
    quantized = self.tp_worker.model_runner.model_config.quantization is not None
    targets = firing.at_start(config, ranks=ranks.tp_size(self), quantized=quantized)
    firing.confirm(targets, "by the end of the checks")
    controller = GateController(self, config, checks)
    if isinstance(self.tree_cache, radix.GateTree):
        self.tree_cache.share(controller.checks.prefill, controller.requests)
    controller.requests.observe(*_observers(controller))
    handlers.serve(controller)
    replicas_alike.announce(self, config, checks.verifier, controller.fingerprint.parts)
    logger.info("margingate: the deterministic gate is up: %s", config)


def _observers(controller: GateController) -> Iterator[Observer]:
    """Those that this server has, in the order in which they are told."""
    scheduler, config, requests = controller.scheduler, controller.config, controller.requests
    audits, observes = controller.auditor.audits, controller.observes_only
    yield from metrics.observers(
        scheduler,
        requests,
        audits,
        observes=observes,
        fingerprint=lambda: controller.fingerprint.of()["fingerprint"],
    )
    yield from event_records.observers(config.events_endpoint, requests)
    yield from audit.observers(controller.auditor)
    verifier, merges = controller.checks.verifier, controller.merged.serves
    yield from delay.observers(scheduler, config, verifier, requests, merges=merges)
    yield controller.tally
    yield firing.FirstRequest(config, replicas=replicas.size(scheduler.server_args))


def init_detokenizer(_manager: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE DetokenizerManager.__init__: that of a gated server is patched here."""
    if gate_config(server_args) is not None:
        registry.install(DETOKENIZER_HOOKS)


def launch(original: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Engine._launch_subprocesses: patch this process, then ask every scheduler."""
    if gate_to_launch(server_args) is None:
        return original(cls, server_args, *args, **kwargs)
    with arguments.ending(server_args):
        return _launch(original, cls, server_args, *args, **kwargs)


def _launch(original: Any, cls: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    registry.install(TOKENIZER_HOOKS)
    setattr(server_args, LAUNCHED, True)  # schedulers look for it
    with replicas.rendezvous(server_args):
        result = original(cls, server_args, *args, **kwargs)
        arguments.confirm_settings(server_args)
        confirm_schedulers(result)
    if (manager := result[0]) is not None:
        vision.warm_up_with_text(manager.model_config)
    return result


def confirm_schedulers(result: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER Engine._launch_subprocesses: every scheduler must have said that its gate is up.

    Raises:
        GateError: a scheduler came up ungated (its process did not load the plugin).
    """
    tokenizer_manager, _, _, init_result, *_rest = result
    if tokenizer_manager is None or gate_config(tokenizer_manager.server_args) is None:
        return
    if replicas.size(tokenizer_manager.server_args) > 1:  # the controller speaks for its schedulers
        said = replicas_alike.confirm(tokenizer_manager.server_args)
        init_result.scheduler_infos[0][server_info.INFO_KEY] = said
        return
    for rank, info in enumerate(init_result.scheduler_infos):
        if server_info.INFO_KEY not in info:
            raise GateError(
                f"scheduler {rank} came up without the gate although --deterministic-gate is set: "
                "check that SGLANG_PLUGINS and SGLANG_PLATFORM let the plugin 'margingate' load."
            )


def confirm_launcher(server_args: Any) -> None:
    """The process that launched this scheduler must have its hooks.

    Raises:
        GateError: it did not run `launch`.
    """
    if not getattr(server_args, LAUNCHED, False):
        raise GateError(
            "--deterministic-gate was given, but the launcher of this scheduler went around "
            "Engine._launch_subprocesses, and so has no hooks for answers: launch with sglang "
            "serve or sglang.Engine."
        )
