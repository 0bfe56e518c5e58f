"""The demo's report: what changed with the batch on each server, and what the gate cost."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

import margingate
from margingate.harness.answers import changed, identical
from margingate.processor import cpu_name
from margingate.study.comparison import COUNTERS, RUNS, SIDES, TOGETHER, Run, Side


def make_report(sides: Mapping[str, Side], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
    report: dict[str, Any] = {
        "schema": 1,
        "versions": {"margingate": margingate.__version__}
        | {name: metadata.version(name) for name in ("sglang", "torch")},
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "python": platform.python_version(),
        },
        **options,
        "prompts": len(sides["stock"].runs["alone"].answers),
        "sides": {name: _side_record(side) for name, side in sides.items()},
        "overhead": {
            name: sides["gated"].runs[name].wall_s / sides["stock"].runs[name].wall_s
            for name in RUNS
        },
    }
    return {**report, "meaning": meaning(report)}


def _side_record(side: Side) -> dict[str, Any]:
    alone = side.runs["alone"].answers
    gate = {name: sum(run.gate.get(name, 0) for run in side.runs.values()) for name in COUNTERS}
    record: dict[str, Any] = {
        "identical": {name: identical(alone, side.runs[name].answers) for name in TOGETHER},
        "changed": {name: changed(alone, side.runs[name].answers) for name in TOGETHER},
        "runs": {name: _run_record(run) for name, run in side.runs.items()},
    }
    if side.margins is not None:
        rate = gate["flagged"] / gate["steps"] if gate["steps"] else 0.0
        record["gate"] = {**gate, "trigger_rate": rate, "threshold": side.threshold}
        record["margins"] = asdict(side.margins)
    return record


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "wall_s": run.wall_s,
        "tokens": run.tokens,
        "tokens_per_s": run.tokens / run.wall_s,
        **({"gate": run.gate} if run.gate else {}),
    }


def _processor() -> str:
    """The GPU's name, else the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name() or platform.processor() or platform.machine()


def meaning(report: dict[str, Any]) -> str:
    """The result in plain sentences."""
    count = report["prompts"]
    stock, gated = (len(set().union(*report["sides"][side]["changed"].values())) for side in SIDES)
    cost = report["overhead"]
    first = (
        f"Without the gate, {stock} of {count} answers changed when the requests shared a batch"
        if stock
        else f"Without the gate, none of {count} answers happened to change in a batch"
    )
    second = (
        f"with it, {gated} still changed: that is a bug, or a threshold too low for this model."
        if gated
        else "with it, every answer was the same token for token, alone, batched, shuffled and "
        "cached."
    )
    return (
        f"{first}; {second} Batched, the gate took {cost['batched']:.2f} times the stock time; "
        f"alone, {cost['alone']:.2f} times."
    )
