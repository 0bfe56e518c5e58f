"""What a gated server says of itself: counters, and that its gate is up."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import margingate
from margingate.config import GateConfig
from margingate.runtime.compat.process import machine, ranks
from margingate.runtime.observe import audit
from margingate.runtime.probe import startup
from margingate.runtime.request import guard
from margingate.runtime.schedule.controller import GateController

INFO_KEY = "margingate"


def init_info(config: GateConfig) -> dict[str, Any]:
    """For Scheduler.get_init_info: the launcher refuses schedulers that do not say this."""
    return {"version": margingate.__version__, **asdict(config)}


def internal_state(controller: GateController) -> dict[str, Any]:
    """For Scheduler.get_internal_state: the counters in `/server_info`."""
    config, requests, checks = controller.config, controller.requests, controller.checks
    totals = asdict(requests.summed())
    steps = totals["steps"]
    return {
        "replica": ranks.dp_rank(),
        **totals,
        "trigger_rate": totals["flagged"] / steps if steps else 0.0,
        "reasons": dict(requests.reasons),
        "fast_path": config.fast_path,
        "overlap": controller.in_flight.overlaps,
        "canonical_steps": requests.canonical_steps,
        "canonical_rows": str(checks.decode),
        "machine": machine.describe(controller.scheduler.server_args),
        "probe": {
            "operators": startup.records(),
            "steps": checks.decode.record() if checks.decode else None,
        },
        "largest_batch": requests.largest_batch,
        "margins": requests.histogram.record(),
        "passes_by_reason": dict(requests.dues),
        "merged_passes": controller.merged.count,
        "max_delay": requests.queue.max_delay,
        "hooks_fired": {name: each.fired for name, each in guard.tallies().items()},
        "hooks_failed": guard.failures(),
        "open": len(requests),
        "held": len(requests.held),
        "guarantee": config.guarantee,
        "policy": config.policy,
        "prefill": checks.prefill.record(),
        "scores": checks.scores(config),
        "images": checks.images or "canonical",
        "tally": asdict(controller.tally),
        "audit": audit.report(controller.auditor.audits),
        "integrity": controller.integrity.report(),
        **controller.fingerprint.of(),
        "weight_generation": controller.fingerprint.generation,
        "fingerprint_of": controller.fingerprint.parts,
    }
