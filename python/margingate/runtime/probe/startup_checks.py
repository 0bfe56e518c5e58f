"""What is measured on the whole model before the first request: verifier, decode steps, prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from margingate.config import GateConfig
from margingate.runtime.attention import invariant_attention
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.probe.checks import (
    check_attention,
    check_decode,
    check_images,
    check_prefill,
)
from margingate.runtime.probe.checks.check_decode import CanonicalSteps
from margingate.runtime.probe.checks.check_prefill import Prefill
from margingate.runtime.probe.startup import largest_rows
from margingate.runtime.sampling import logprobs, seeds
from margingate.runtime.verify import verifier
from margingate.runtime.verify.verifier import Verifier


@dataclass(frozen=True)
class StartupChecks:
    """The verifier, and what was found with it."""

    verifier: Verifier
    decode: CanonicalSteps | None  # None: no decode step counts as canonical
    prefill: Prefill
    images: str = ""  # why they are not encoded canonically; empty: they are

    @property
    def drift(self) -> bool:
        """Whether some decode steps make rows that are not canonical."""
        return self.decode is None or not self.decode.everywhere

    def scores(self, config: GateConfig) -> str:
        """What the log-probs of a prompt's tokens are: those that decoding the same tokens gives,
        where every answer has canonical ones, or those that a prefill gives.
        """
        decoded = self.prefill.as_decoded and (not self.drift or config.guarantee == "exact")
        return "as_decoded" if decoded else "as_prefilled"


def run_checks(scheduler: Any, config: GateConfig) -> StartupChecks:
    """Run the forwards that decide, on free slots; a collective of all ranks.

    Fixes what the attention kernels compute from here on.

    Raises:
        GateError: the verifier's own rows depend on the padding beside them, or the gate's
            attention does not do what the model's layers ask for.
    """
    runner = scheduler.tp_worker.model_runner
    logprobs.as_log_softmax(runner.model)
    seeds.compile_draws(scheduler.model_config.vocab_size, runner.device)
    made = verifier.build(runner, config)
    with routed_experts.unrecorded():  # not of its graphs, which are made by now
        return _checked(scheduler, config, made)


def _checked(scheduler: Any, config: GateConfig, made: Verifier) -> StartupChecks:
    runner, decode = scheduler.tp_worker.model_runner, None
    if config.invariant:
        decode = check_decode.measure(made, scheduler, largest_rows(runner.device))
    elif config.policy != "observe":
        check_decode.check_padding(made, scheduler)
    wanted = config.invariant and config.prefill == "auto"
    prefill = check_prefill.measure(scheduler, made, wanted)
    own = invariant_attention.of(made.backend)
    if own is not None:
        own.confirm(prefill=prefill.together)
        check_attention.check(runner, made.backend)
    if prefill.as_decoded and decode is not None:
        decode.extend()
    images = check_images.UNGATED
    if config.policy != "observe":
        images = check_images.measure(scheduler, prefill)
    return StartupChecks(made, decode, prefill, images)
