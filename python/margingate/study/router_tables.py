"""A study's tables of a mixture of experts: what the margin of its routers tells of flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from margingate.confidence import clopper_pearson
from margingate.study.steps import Steps, steps_of
from margingate.study.tables import CONFIDENCE, Table, first_threshold, percent
from margingate.study.threshold import GRID, above

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # shares of steps that are flagged
SPLITS = tuple(i / 20 for i in range(21))  # of such a share, what goes to the row's own margin
PARTS = ((0.0, 0.01), (0.01, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.0))


class Bars(NamedTuple):
    """A step is flagged where either of its margins is at or below its bar, or no number."""

    margin: float  # logits
    router: float  # in the units of the routers' scores

    def flagged(self, steps: Steps) -> np.ndarray:
        """Bool per step."""
        either: np.ndarray = ~(steps.margins > self.margin) | ~(steps.routers > self.router)
        return either


def router_tables(record: Mapping[str, Any]) -> list[Table]:
    """None for a model without routers."""
    steps = steps_of(record)
    if not len(steps.routers):
        return []
    everywhere, sets = np.full(len(steps), True), list(record["sets"])
    found = [_parts(steps, first_threshold(record)), _recall(steps, "", everywhere, everywhere)]
    if len(sets) > 1:
        here = steps.sets == sets[0]
        title = f", chosen on {sets[0]}, tested on the others"
        found.append(_recall(steps, title, here, ~here))
    return found


def router_threshold(record: Mapping[str, Any], threshold: float) -> float | None:
    """For a gated server of this model: flags what a threshold of logits misses of the first set.

    The smallest multiple of 1/64 that does, at the least 1/64. None for a model without routers.
    """
    steps = steps_of(record)
    if not len(steps.routers):
        return None
    missed = (steps.sets == next(iter(record["sets"]))) & steps.flips & (steps.margins >= threshold)
    margins = steps.routers[missed & ~np.isnan(steps.routers)]
    return above(float(margins.max())) if len(margins) else 1 / GRID


def choose(steps: Steps, where: np.ndarray, rate: float, split: float) -> Bars:
    """Bars that flag at most `rate` of the steps `where`, a share of them by the row's own margin.

    That margin's bar comes first, and the routers' has what is left. Ties may leave some unused.
    """
    count = int(rate * where.sum())
    bar = _bar(steps.margins[where], int(split * count))
    rest = where & (steps.margins > bar)
    left = count - int((where & ~rest).sum())
    return Bars(bar, _bar(steps.routers[rest], max(left, 0)))


def best_of_both(steps: Steps, where: np.ndarray, rate: float) -> Bars:
    """The split whose bars flag the most flips `where`; among equals, the most by the margin."""
    bars = [choose(steps, where, rate, split) for split in reversed(SPLITS)]
    return max(bars, key=lambda one: int((one.flagged(steps) & steps.flips & where).sum()))


def _bar(values: np.ndarray, count: int) -> float:
    """The largest value that is at or above at most `count` of them; -inf where none is."""
    ordered = np.sort(np.where(np.isnan(values), -np.inf, values))
    if count >= len(ordered):
        return float(ordered[-1]) if len(ordered) else -np.inf
    below = ordered[:count][ordered[:count] < ordered[count]]
    return float(below[-1]) if len(below) else -np.inf


def _recall(steps: Steps, title: str, where: np.ndarray, there: np.ndarray) -> Table:
    """Flips caught by each margin and by both: bars of the steps `where`, tested `there`."""
    rows = []
    for rate in RATES:
        both = best_of_both(steps, where, rate)
        margin = choose(steps, where, rate, 1.0)._replace(router=-np.inf)
        router = choose(steps, where, rate, 0.0)
        cells = [_caught(bars.flagged(steps), steps, there) for bars in (margin, router, both)]
        rows.append((percent(rate), *cells, _shown(both)))
    return Table(
        f"Flips caught at the same trigger rate{title}",
        "Each column flags at most this share of the steps that its bars were chosen on, and shows "
        "the flips among those flagged, and in brackets the share that was flagged. By either: the "
        f"best of {len(SPLITS)} ways to share the rate, chosen with the flips known, so that it is "
        "never behind the margin on the steps that it was chosen on.",
        ("at most", "by the margin", "by the routers' margin", "by either", "bars of either"),
        rows,
    )


def _caught(flagged: np.ndarray, steps: Steps, there: np.ndarray) -> str:
    flips = steps.flips & there
    share = float(flagged[there].mean()) if there.any() else 0.0
    return f"{int((flips & flagged).sum())} of {int(flips.sum())} ({percent(share)})"


def _shown(bars: Bars) -> str:
    margin, router = (f"{bar:.4g}" if np.isfinite(bar) else "none" for bar in bars)
    return f"{margin} logits, routers {router}"


def _parts(steps: Steps, threshold: float) -> Table:
    """Flip rates by how small the routers' margin is, against what a threshold would flag."""
    order = np.argsort(np.where(np.isnan(steps.routers), -np.inf, steps.routers), kind="stable")
    rows = []
    for low, high in PARTS:
        here = order[int(low * len(order)) : int(high * len(order))]
        if len(here):
            rows.append(_part(f"{percent(low)} to {percent(high)}", steps, here, threshold))
    rows.append(_part("all", steps, order, threshold))
    return Table(
        "Flips by the routers' margin",
        "Steps by the smallest margin of a router in any layer, from the nearest on, in logits of "
        "the router or, with a correction bias, in its scores. The last column has the flips that "
        f"a threshold of {threshold:g} logits does not flag.",
        (
            *("nearest", "up to", "decode steps", "flips", "rate", "95 % interval"),
            *("median margin at flips", "flips above the threshold"),
        ),
        rows,
    )


def _part(name: str, steps: Steps, here: Sequence[int] | np.ndarray, threshold: float) -> tuple:
    flips, margins = steps.flips[here], steps.margins[here]
    count, found = len(flips), int(flips.sum())
    low, high = clopper_pearson(found, count, CONFIDENCE)
    return (
        name,
        f"{float(steps.routers[here][-1]):.4g}",
        f"{count:,}",
        str(found),
        percent(found / count),
        f"{percent(low)} to {percent(high)}",
        f"{float(np.median(margins[flips])):.4g}" if found else "-",
        str(int((flips & (margins >= threshold)).sum())),
    )
