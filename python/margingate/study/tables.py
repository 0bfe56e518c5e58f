"""The tables of a study: pure functions from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from margingate import markdown
from margingate.confidence import clopper_pearson, miss_bound
from margingate.study.steps import Signal, Steps, bars_by_size, signals, steps_of
from margingate.study.threshold import above

CONFIDENCE = 0.95
THRESHOLDS = (0.015625, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
HEADROOM = (1.0, 1.5, 2.0)
POSITIONS = ((2, 16), (17, 64), (65, 128), (129, 256), (257, 1 << 30))
NO_FLIPS = 0.5  # logits, where nothing was seen to flip


class Table(NamedTuple):
    """Text by columns; the first is left-aligned."""

    title: str
    about: str  # what the figures are, in a sentence or two
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def make_tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables of the walk."""
    steps = steps_of(record)
    return [
        _by("data set", steps, [(name, steps.sets == name) for name in record["sets"]]),
        _by("requests in the step", steps, _company(steps)),
        _by("row", steps, _positions(steps)),
        _margins(steps, list(record["sets"])),
        _thresholds(steps),
        _signals(steps),
        _transfer(steps, list(record["sets"])),
    ]


def calibrated_table(record: Mapping[str, Any], calibration: Mapping[str, Any]) -> Table:
    """What the threshold of a calibration file flags and misses here."""
    steps, threshold = steps_of(record), calibration["threshold"]
    flagged = ~(steps.margins >= threshold)  # as the gate does
    rows = []
    for name in (*record["sets"], "all"):
        where = (steps.sets == name) | (name == "all")
        count, caught = int(where.sum()), int((flagged & where).sum())
        missed = int((steps.flips & ~flagged & where).sum())
        low, high = clopper_pearson(caught, count, CONFIDENCE)
        row = [name, f"{count:,}", f"{int(steps.flips[where].sum()):,}", str(missed)]
        row += [_bound(missed, count), percent(caught / max(count, 1))]
        rows.append((*row, f"{percent(low)} to {percent(high)}"))
    return Table(
        f"The calibrated threshold, {threshold:g} logits",
        f"It was chosen on {calibration['steps']:,} steps{_distinct(calibration)}, for at most "
        f"{calibration['target_miss_rate']:g} missed flips per step, and flagged "
        f"{percent(calibration['trigger_rate'])} of them. Here it is tested; bounds are "
        "at 95 % confidence.",
        (
            *("data set", "decode steps", "flips", "missed", "missed per step, at most"),
            *("flagged", "95 % interval"),
        ),
        rows,
    )


def _distinct(calibration: Mapping[str, Any]) -> str:
    """Told where the file has it."""
    known = calibration.get("distinct_steps")
    moved = calibration.get("moved_steps")
    if not isinstance(known, int):
        return ""
    if not isinstance(moved, int):  # before they were counted apart
        return f" ({known:,} of them distinct)"
    return f" ({moved:,} of them with other numbers than alone, {known:,} of these distinct)"


def first_threshold(record: Mapping[str, Any]) -> float:
    """Logits: the smallest multiple of 1/64 that flags every flip of the first data set."""
    steps = steps_of(record)
    bar = signals(steps)[0].bar(steps.sets == next(iter(record["sets"])))
    return above(bar) if np.isfinite(bar) else NO_FLIPS


def percent(share: float) -> str:
    """With the digits that a share this small needs."""
    return f"{share:.3%}" if share < 0.01 else f"{share:.2%}"


def _bound(count: int, of: int) -> str:
    return f"{miss_bound(count, max(of, 1), CONFIDENCE):.1e}"


def _positions(steps: Steps) -> list[tuple[str, np.ndarray]]:
    found = []
    for low, high in POSITIONS:
        where = (steps.rows >= low) & (steps.rows <= high)
        if where.any():
            found.append((f"{low} to {min(high, steps.rows.max())}", where))
    return found


def _company(steps: Steps) -> list[tuple[str, np.ndarray]]:
    sizes = np.unique(steps.sizes).tolist()
    return [(str(n) if n <= 2 else f"{n // 2 + 1} to {n}", steps.sizes == n) for n in sizes]


def _by(what: str, steps: Steps, parts: Sequence[tuple[str, np.ndarray]]) -> Table:
    """Flip rates by parts of the steps, and of all."""
    everything = [*parts, ("all", np.full(len(steps), True))]
    rows = []
    for name, where in everything:
        flips, count = int(steps.flips[where].sum()), int(where.sum())
        low, high = clopper_pearson(flips, count, CONFIDENCE)
        ties = int((steps.flips & where & (steps.margins == 0)).sum())
        row = [name, f"{count:,}", f"{flips:,}", percent(flips / max(count, 1))]
        row += [f"{percent(low)} to {percent(high)}", str(ties)]
        row.append(percent(steps.moved[where].mean()) if count else "-")
        if what == "data set":
            row.append(_prefill(steps, name))
        rows.append(tuple(row))
    columns: tuple[str, ...] = (what, "decode steps", "flips", "rate", "95 % interval")
    columns += ("flips at margin 0", "logits moved")
    if what == "data set":
        columns += ("flips of first tokens",)
    return Table(
        f"Flips by {what}",
        "A decode step flips if the batched run, forced along the answer alone so far, chooses "
        "another token than the run alone. Intervals are Clopper-Pearson's. Logits moved: the best "
        "logit or a margin is another than alone.",
        columns,
        rows,
    )


def _prefill(steps: Steps, name: str) -> str:
    pairs = steps.prefill.values() if name == "all" else [steps.prefill.get(name, (0, 0))]
    flips, number = (sum(column) for column in zip(*pairs, strict=True))
    return f"{flips} of {number}"


def _margins(steps: Steps, sets: Sequence[str]) -> Table:
    rows = []
    for name in (*sets, "all"):
        where = steps.flips & ((steps.sets == name) | (name == "all"))
        rows.append((name, str(int(where.sum())), *_quantiles(steps.margins[where])))
    exact = steps.flips if len(steps.signed) else np.full(len(steps), False)
    if exact.any():
        count = str(int(exact.sum()))
        rows.append(("all, float32 logits", count, *_quantiles(steps.signed[exact])))
        rows.append(("all, in steps of the dtype", count, *_quantiles(steps.ulps[exact])))
    return Table(
        "Margins at flips",
        "The batched run's margin where it flips, in logits: what a gate would have seen. The "
        "margin of float32 logits is 0 where their best token is not the one chosen.",
        ("data set", "flips", "50 %", "90 %", "99 %", "largest"),
        rows,
    )


def _quantiles(values: np.ndarray) -> tuple[str, ...]:
    if not len(values):
        return ("-",) * 4
    return tuple(f"{value:.4g}" for value in np.quantile(values, (0.5, 0.9, 0.99, 1.0)))


def _thresholds(steps: Steps) -> Table:
    signal = signals(steps)[0]
    largest = signal.bar(np.full(len(steps), True))
    chosen = [above(largest)] if np.isfinite(largest) else []
    rows = []
    for threshold in sorted({*THRESHOLDS, *chosen}):
        flagged = ~(signal.values >= threshold)
        caught, flips = int((flagged & signal.flips).sum()), int(signal.flips.sum())
        rows.append(
            (
                f"{threshold:g}" + (" (all flips)" if threshold in chosen else ""),
                percent(flagged.mean()),
                f"{caught} of {flips}",
                _bound(flips - caught, len(steps)),
            )
        )
    return Table(
        "Trigger rate against recall, by threshold",
        "A step is flagged below the threshold. The last column bounds missed flips per step at "
        f"95 % confidence, if all {len(steps):,} steps count. {steps.distinct:,} of them are "
        "distinct: where two batches give a step the same bits, it is one trial and not two, and "
        "the bound is as many times larger.",
        ("threshold [logits]", "flagged", "flips caught", "missed per step, at most"),
        rows,
    )


def _signals(steps: Steps) -> Table:
    rows = []
    for signal in signals(steps):
        flips = signal.values[signal.flips]
        caught = [f"{int(signal.flips.sum())}"]
        for recall in (0.95, 0.99, 1.0):
            if not len(flips):
                caught.append("-")
                continue
            bar = float(np.quantile(flips, recall, method="higher"))
            caught.append(f"{percent(signal.flagged(bar).mean())} (up to {bar:.3g})")
        bars = bars_by_size(signal, steps, np.full(len(steps), True))
        rows.append((signal.name, *caught, percent(signal.flagged(bars).mean())))
    return Table(
        "Signals: steps flagged at a given recall",
        "Every signal with the threshold that just reaches the recall on these very steps, and "
        "with one threshold per batch size at full recall. The last signal belongs to a server "
        "whose lm_head is float32 and chooses the token: its flips are its own.",
        ("signal", "flips", "95 %", "99 %", "100 %", "100 %, by batch size"),
        rows,
    )


def _transfer(steps: Steps, sets: Sequence[str]) -> Table:
    here = steps.sets == sets[0]
    rows = []
    for signal in signals(steps):
        bar = signal.bar(here)
        for factor in HEADROOM if 0 < bar < np.inf else (1.0,):
            name = signal.name + (f", times {factor:g}" if factor > 1 else "")
            shown = f"{bar * factor:.4g}" if np.isfinite(bar) else "none"
            rows.append(_transferred(name, signal, bar * factor, shown, ~here))
        bars = bars_by_size(signal, steps, here)
        rows.append(_transferred(f"{signal.name}, by batch size", signal, bars, "-", ~here))
        if signal.values is steps.margins and len(steps.gaps) and (here & steps.flips).any():
            bar = float(steps.gaps[here & steps.flips].max())
            name = f"{signal.name}, and a rounding step"
            rows.append(_transferred(name, signal, bar, f"{bar:.4g}", ~here))
    return Table(
        f"Transfer: chosen on {sets[0]}, tested on the others",
        f"The threshold just catches every flip of {sets[0]} ({int(here.sum()):,} steps); then, "
        "with headroom, it is multiplied. With a rounding step it is above what may have lain "
        "between the two best logits before they were rounded, as margingate calibrate has it. "
        "Missed flips and the bound are of the other data sets alone.",
        ("signal", "threshold", "steps tested", "flips", "missed", "at most, 95 %", "flagged"),
        rows if len(sets) > 1 else [],
    )


def _transferred(
    name: str, signal: Signal, bar: np.ndarray | float, shown: str, there: np.ndarray
) -> tuple[str, ...]:
    flagged = signal.flagged(bar)[there]
    flips = signal.flips[there]
    missed, count = int((flips & ~flagged).sum()), len(flips)
    share = percent(float(flagged.mean())) if count else "-"
    return (
        name,
        shown,
        f"{count:,}",
        str(int(flips.sum())),
        str(missed),
        _bound(missed, count),
        share,
    )


def to_markdown(table: Table) -> str:
    """The table under its title, as Markdown."""
    lines = markdown.table(table.columns, table.rows)
    return "\n".join([f"### {table.title}", "", table.about, "", *lines])
