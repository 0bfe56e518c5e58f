"""How long flagged rows should wait for others: a model of what a delay costs and saves.

A verify pass costs what a decode step of as many rows does, however few are wanted: so a longer
wait means fewer passes. But what is decoded meanwhile is thrown away where a row flips. Held to the
scheduler's own ledger and queue in test_core_costs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

# Decode steps; where nothing is merged, 1 is no other than 0.
DELAYS = (0, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
MERGED_STEPS = 2  # steps more until a verdict, where its pass shares a step
# Shares of the time of a step with its verification. A shorter wait may cost a little: tokens
# arrive earlier, and the request that flips the most, which is not the mean, loses less.
SHORTER = 1.01
NEARLY = 1.02  # what keeping the present delay may cost
NOTCH = 1.5  # a present delay that is more times the chosen one is not kept


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
    merges: bool = False  # a pass that may wait takes a decode step's place


def steps_a_pass(delay: int, load: Load, costs: Costs) -> float:
    """Decode steps from one pass, or several that run at once, to the next."""
    return _until_flag(load) + _waited(delay, load, costs)


def lost_a_flip(delay: int, load: Load, costs: Costs) -> float:
    """Tokens that a flip throws away, the flipped one itself not counted, on average.

    All that were decoded since, if it is the first flag of its pass; half of that, if it is one of
    the others, which come at any time until the pass.
    """
    waited = _waited(delay, load, costs)
    others = load.trigger_rate * load.requests * waited
    return waited * (1 + others / 2) / (1 + others)


def overhead(delay: int, load: Load, costs: Costs) -> float:
    """Time that verification adds to a request, as a share of the decode steps' time."""
    steps = steps_a_pass(delay, load, costs)
    passes = max(load.requests * steps / costs.rows, 1)  # each time
    alone = not _merges(delay, load, costs)
    each = costs.pass_ms if alone else max(costs.pass_ms - costs.step_ms, 0)
    lost = lost_a_flip(delay, load, costs) + (0 if alone else MERGED_STEPS)
    return each * passes / steps / costs.step_ms + load.flip_rate * lost


def _merges(delay: int, load: Load, costs: Costs) -> bool:
    return costs.merges and delay > 0 and has_room(load.requests, costs.rows)


def has_room(requests: float, rows: int) -> bool:
    """Whether a pass of `rows` rows may share a step of so many requests: half of it is left."""
    return 2 * requests <= rows


def best_delay(load: Load, costs: Costs, current: int | None = None) -> int:
    """The shortest delay that costs nearly as little as the best.

    Args:
        current: stays where it does too (NEARLY) and is not much longer (NOTCH): no flapping.
    """
    times = {delay: 1 + overhead(delay, load, costs) for delay in DELAYS}
    least = min(times.values())
    best = next(delay for delay in DELAYS if times[delay] <= SHORTER * least)
    if current is None or current > NOTCH * best:
        return best
    return current if 1 + overhead(current, load, costs) <= NEARLY * least else best


def _waited(delay: int, load: Load, costs: Costs) -> float:
    """Decode steps from the first flag to its pass: `delay`, or less where it is full before.

    Spans bring nearly every row, so it is full after `rows` / `requests` steps. One step goes by in
    any case: the result that is in flight is brought in first.
    """
    until_full = costs.rows / max(load.requests, 1e-9)
    return max(min(delay, until_full - _until_flag(load)), 1)


def _until_flag(load: Load) -> float:
    """Decode steps until one has a flag, itself counted."""
    quiet = (1 - load.trigger_rate) ** load.requests
    return 1 / max(1 - quiet, 1e-9)
