"""How long flagged rows should wait for company: a model of what a delay costs and saves.

A verify pass costs what a decode step of as many rows does, however few are wanted: so a longer
wait means fewer passes. But what is decoded meanwhile is thrown away where a row flips.
"""

from __future__ import annotations

from dataclasses import dataclass

DELAYS = (0, 1, 2, 4, 8, 16, 32, 64)  # decode steps
NEARLY = 1.02  # of the time of a step with its verification
LATER = 0.98  # a longer wait has to be cheaper by this: tokens arrive later


@dataclass(frozen=True)
class Load:
    """What the decode steps of late looked like."""

    requests: float  # gated, in a step
    trigger_rate: float  # flagged rows of all, 0 to 1
    flip_rate: float  # flips per row, 0 to 1


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one forward."""

    step_ms: float  # of a decode step
    pass_ms: float  # of a verify pass of `rows` rows
    rows: int


def overhead(delay: int, load: Load, costs: Costs) -> float:
    """Time that verification adds, as a share of the decode steps' time.

    A pass runs when `delay` steps went by since the first flag, or when it is full: spans bring
    nearly every row, so that takes `rows` / `requests` steps. A flip throws away what its request
    decoded since: half the delay on average.
    """
    quiet = (1 - load.trigger_rate) ** load.requests
    until_flag = 1 / max(1 - quiet, 1e-9)
    until_full = costs.rows / max(load.requests, 1e-9)
    steps_a_pass = max(min(until_flag + delay, max(until_full, 1)), 1)
    passes = max(load.requests * steps_a_pass / costs.rows, 1)  # each time
    passing = costs.pass_ms * passes / steps_a_pass / costs.step_ms
    waited = min(delay, max(until_full - until_flag, 0))
    return passing + load.flip_rate * waited / 2


def best_delay(load: Load, costs: Costs, current: int | None = None) -> int:
    """The delay with the least overhead; of nearly equal ones the shortest.

    Args:
        current: stays where it costs nearly as little, so that the delay does not flap.
    """
    best = min(overhead(delay, load, costs) for delay in DELAYS)
    if current is not None and 1 + overhead(current, load, costs) <= NEARLY * (1 + best):
        return current
    return next(delay for delay in DELAYS if overhead(delay, load, costs) * LATER <= best)
