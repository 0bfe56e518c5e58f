"""The file that `margingate calibrate` writes and --gate-calibration reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from margingate.errors import CliError
from margingate.study.journal import Journal
from margingate.study.steps_of_walk import ALONE, FIRST, Step, Walk, flips, moved
from margingate.study.threshold import (
    Choice,
    TooFewStepsError,
    Trials,
    choose_threshold,
    flagged_share,
)


class Target(NamedTuple):
    """What the threshold has to reach."""

    miss_rate: float  # missed flips per step, at most
    confidence: float  # of that bound, 0 to 1
    headroom: float  # logits on top of the threshold that was found


def make_record(
    target: Target,
    batch_sizes: Sequence[int],
    journal: Journal,
    machine: dict[str, str],
    model: dict[str, str],
) -> dict[str, Any]:
    """The calibration file; raises CliError where the steps are too few."""
    sizes = sorted(set(batch_sizes))
    walks = {k: one for k, one in journal.walks.items() if k[0] in (ALONE, *sizes)}
    batched = [one for (size, _), one in walks.items() if size != ALONE]
    margins = [margin for one in batched for margin in one.margins[FIRST - 1 :]]
    trials, flipped = _trials(walks)
    dtype = machine.get("lm_head", machine.get("dtype", ""))
    choice = _choose(trials, [one.gap(dtype) for one in flipped], target)
    found = flips(walks)
    return {
        "schema": 1,
        "model": model,
        "machine": machine,
        "threshold": choice.threshold,
        "trigger_rate": flagged_share(margins, choice.threshold),
        "steps": trials.steps,
        "moved_steps": trials.moved,
        "distinct_steps": trials.distinct,
        "flips": len(found),
        "distinct_flips": len(flipped),
        "missed": choice.missed,
        "miss_rate_bound": choice.miss_bound,
        "target_miss_rate": target.miss_rate,
        "confidence": target.confidence,
        "headroom": target.headroom,
        "batch_sizes": sizes,
        "prompts": len({name for _, name in walks}),
        "flipped_steps": found,
    }


def _trials(walks: Mapping[tuple[int, str], Walk]) -> tuple[Trials, list[Step]]:
    """The counts of steps, and the distinct ones that flipped."""
    alone = {name: one for (size, name), one in walks.items() if size == ALONE}
    batched = [one for (size, _), one in walks.items() if size != ALONE]
    steps = sum(len(one.margins) - (FIRST - 1) for one in batched)
    moving = moved(alone.values(), batched)
    once = dict.fromkeys(moving)
    flipped = [one for one in once if one.token != alone[one.prompt].tokens[one.row - 1]]
    return Trials(steps, len(moving), len(once)), flipped


def _choose(trials: Trials, gaps: Sequence[float], target: Target) -> Choice:
    """The threshold for distinct flips with these gaps, logits; raises CliError."""
    try:
        return choose_threshold(
            trials, gaps, target.miss_rate, target.confidence, headroom=target.headroom
        )
    except TooFewStepsError as err:
        raise CliError(
            f"{err.distinct} distinct steps with other numbers than alone cannot show a miss rate "
            f"of {target.miss_rate:g}, which takes {err.needed} where {trials.moved} of "
            f"{trials.steps} have such: give more --prompts, --tokens or --batch-sizes, or a "
            "higher --target-miss-rate; what was measured is kept."
        ) from err
