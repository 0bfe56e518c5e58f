"""What a gated server says of itself: counters, and that its gate is up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import margingate
from margingate.runtime import audit, guard, invariance, machine, state, tally
from margingate.runtime.observer import summed

INFO_KEY = "margingate"


def init_info(result: dict[str, Any], *_args: Any) -> None:
    """AFTER Scheduler.get_init_info: the launcher refuses schedulers that do not say this."""
    controller = state.controller()
    result[INFO_KEY] = {"version": margingate.__version__, **asdict(controller.config)}


def internal_state(result: Any, *_args: Any) -> None:
    """AFTER Scheduler.get_internal_state: the counters in `/server_info`."""
    controller = state.controller()
    totals = asdict(summed(controller))
    steps = totals["steps"]
    result.internal_state[INFO_KEY] = {
        **totals,
        "trigger_rate": totals["flagged"] / steps if steps else 0.0,
        "reasons": dict(controller.reasons),
        "fast_path": controller.config.fast_path,
        "overlap": controller.in_flight.overlaps,
        "canonical_steps": controller.canonical_steps,
        "canonical_rows": str(controller.canonical),
        "machine": machine.describe(controller.scheduler.server_args),
        "probe": {
            "operators": invariance.records(),
            "steps": controller.canonical.record() if controller.canonical else None,
        },
        "largest_batch": controller.largest_batch,
        "margins": controller.histogram.record(),
        "passes_by_reason": dict(controller.dues),
        "passes_that_rode": controller.rides.count,
        "max_delay": controller.queue.max_delay,
        "hooks_fired": {name: each.fired for name, each in guard.tallies().items()},
        "hooks_failed": guard.failures(),
        "open": len(controller.requests),
        "held": len(controller.held),
        "guarantee": controller.config.guarantee,
        "policy": controller.config.policy,
        "prefill": controller.prefill.record(),
        "tally": tally.report(controller),
        "audit": audit.report(controller.auditor.audits),
        "integrity": controller.integrity.report(controller),
        **controller.fingerprint.of(),
        "fingerprint_of": controller.fingerprint.parts,
    }
