"""The file that `margingate calibrate` writes and --gate-calibration reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from margingate.errors import CliError
from margingate.study.journal import Journal
from margingate.study.steps_of_walk import ALONE, FIRST, Walk, flips, moved
from margingate.study.threshold import TooFewStepsError, Trials, choose_threshold, flagged_share


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
    walks: dict[tuple[int, str], Walk]
    walks = {k: one for k, one in journal.walks.items() if k[0] in (ALONE, *sizes)}
    alone = {name: one for (size, name), one in walks.items() if size == ALONE}
    batched = [one for (size, _), one in walks.items() if size != ALONE]
    margins = [margin for one in batched for margin in one.margins[FIRST - 1 :]]
    moving = moved(alone.values(), batched)
    once = dict.fromkeys(moving)
    trials = Trials(len(margins), len(moving), len(once))
    flipped = [one for one in once if one.token != alone[one.prompt].tokens[one.row - 1]]
    dtype = machine.get("lm_head", machine.get("dtype", ""))
    try:
        choice = choose_threshold(
            trials,
            [one.gap(dtype) for one in flipped],
            target.miss_rate,
            target.confidence,
            headroom=target.headroom,
        )
    except TooFewStepsError as err:
        raise CliError(
            f"{err.distinct} distinct steps with other numbers than alone cannot show a miss rate "
            f"of {target.miss_rate:g}, which takes {err.needed} where {len(moving)} of "
            f"{len(margins)} have such: give more --prompts, --tokens or --batch-sizes, or a "
            "higher --target-miss-rate; what was measured is kept."
        ) from err
    found = flips(walks)
    return {
        "schema": 1,
        "model": model,
        "machine": machine,
        "threshold": choice.threshold,
        "trigger_rate": flagged_share(margins, choice.threshold),
        "steps": len(margins),
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
