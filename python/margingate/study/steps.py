"""The decode steps of a study as arrays, and the signals that may foretell their flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from margingate.study.steps_of_walk import ALONE, Walk, distinct
from margingate.study.threshold import MANTISSA


@dataclass(frozen=True)
class Steps:
    """One entry per batched decode step (row 2 and later), in the record's order.

    `ulps`, `gaps` and the exact arrays are empty where the server computed no exact products, and
    `routers` where the model has none.
    """

    sets: np.ndarray  # str: data set
    sizes: np.ndarray  # int: requests in the step, rounded up to a power of two
    rows: np.ndarray  # int: 2 and up
    margins: np.ndarray  # logits
    ulps: np.ndarray  # the margin in steps of the logits' own precision at the best logit
    gaps: np.ndarray  # logits: the margin and one such step, as `threshold.widest_gap`
    flips: np.ndarray  # bool: another token than alone
    moved: np.ndarray  # bool: other numbers than alone, as far as they are known
    distinct: int  # steps, less those with the numbers of the same step in another batch
    signed: np.ndarray  # logits: exact margin; 0 where the exact best is not the chosen token
    exact_margins: np.ndarray  # logits: best minus second, by exact products
    exact_flips: np.ndarray  # bool: another exact best than alone
    routers: np.ndarray  # the least router margin, in the units of the scores
    prefill: Mapping[str, tuple[int, int]]  # by set: flips and number of first tokens

    def __len__(self) -> int:
        return len(self.margins)


def steps_of(record: Mapping[str, Any]) -> Steps:
    """All batched decode steps of a study."""
    sets = {name: key for key, names in record["sets"].items() for name in names}
    alone = {one["name"]: one for one in record["walks"] if one["batch_size"] == ALONE}
    batched = [one for one in record["walks"] if one["batch_size"] != ALONE]
    exact = bool(batched) and all(one["exact_tokens"] for one in (*batched, *alone.values()))
    parts = [_walk(one, alone[one["name"]], exact) for one in batched]
    lengths = [len(one["tokens"]) - 1 for one in batched]
    joined = _joined(parts)
    margins, tops = joined.margins, joined.tops
    step = _ulp(tops, _logits_dtype(record))
    return Steps(
        sets=np.repeat([sets[one["name"]] for one in batched], lengths),
        sizes=np.exp2(np.ceil(np.log2(joined.requests))).astype(int),
        rows=joined.rows,
        margins=margins,
        ulps=margins / step if len(tops) else tops,
        gaps=margins + step if len(tops) else tops,
        flips=joined.flips,
        moved=joined.moved,
        distinct=len(distinct(map(Walk.from_record, batched))),
        signed=joined.signed,
        exact_margins=joined.exact_margins,
        exact_flips=joined.exact_flips,
        routers=joined.routers,
        prefill=_prefill(batched, alone, sets),
    )


class _WalkSteps(NamedTuple):
    """One entry per decode step of a walk; as in Steps, some are empty."""

    rows: np.ndarray  # int: 2 and up
    requests: np.ndarray  # int: in the step
    margins: np.ndarray  # logits
    flips: np.ndarray  # bool: another token than alone
    moved: np.ndarray  # bool: other numbers than alone
    routers: np.ndarray  # their margin
    tops: np.ndarray  # the best logit
    signed: np.ndarray  # as in Steps, like the two below
    exact_margins: np.ndarray
    exact_flips: np.ndarray


def _walk(one: Mapping[str, Any], alone: Mapping[str, Any], exact: bool) -> _WalkSteps:
    """The decode steps of one walk, beside those of the same request alone."""
    tokens = np.array(one["tokens"][1:])
    pairs = zip(_numbers(one), _numbers(alone), strict=True)
    return _WalkSteps(
        rows=np.arange(2, len(tokens) + 2),
        requests=np.array(one["rows"][1:]),
        margins=np.array(one["margins"][1:], float),
        flips=tokens != np.array(alone["tokens"][1:]),
        moved=np.array([a != b for a, b in pairs][1:], dtype=bool),
        routers=np.array(one.get("routers", ())[1:], float),  # older studies do not have it
        **(_exact(one, alone, tokens) if exact else dict.fromkeys(_EXACT, np.array([]))),
    )


_EXACT = ("tops", "signed", "exact_margins", "exact_flips")


def _joined(parts: Sequence[_WalkSteps]) -> _WalkSteps:
    """All walks' steps behind each other; raises ValueError without a walk."""
    fields = range(len(_WalkSteps._fields))
    return _WalkSteps(*(np.concatenate([part[i] for part in parts]) for i in fields))


def _exact(
    one: Mapping[str, Any], alone: Mapping[str, Any], tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """What exact products of the same hidden states tell of a walk, by the names of _EXACT."""
    best, margins = np.array(one["exact_tokens"][1:]), np.array(one["exact_margins"][1:], float)
    return {
        "tops": np.array(one["tops"][1:], float),
        "signed": np.where(best == tokens, margins, 0.0),
        "exact_margins": margins,
        "exact_flips": best != np.array(alone["exact_tokens"][1:]),
    }


def _numbers(one: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """All that is known of each row's logits."""
    lists = ("tokens", "margins", "tops", "exact_tokens", "exact_margins")
    return list(zip(*(one[name] for name in lists if one[name]), strict=True))


def _logits_dtype(record: Mapping[str, Any]) -> str:
    machine: Mapping[str, str] = record["machine"]
    return machine.get("lm_head", machine["dtype"])


def _ulp(tops: np.ndarray, dtype: str) -> np.ndarray:
    """The distance of neighbouring numbers of `dtype` at these magnitudes."""
    exponents = np.floor(np.log2(np.maximum(np.abs(tops), 2.0**-100)))
    return np.exp2(exponents - MANTISSA.get(dtype, 23))


def _prefill(
    batched: Sequence[Mapping[str, Any]],
    alone: Mapping[str, Mapping[str, Any]],
    sets: Mapping[str, str],
) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for one in batched:
        key = sets[one["name"]]
        flips, number = found.get(key, (0, 0))
        flips += one["tokens"][0] != alone[one["name"]]["tokens"][0]
        found[key] = flips, number + 1
    return found


@dataclass(frozen=True)
class Signal:
    """A number per step; a threshold flags the steps whose number is below it, or no number."""

    name: str
    values: np.ndarray
    flips: np.ndarray  # bool: what it should foretell

    def bar(self, where: np.ndarray) -> float:
        """The largest number at a flip among the steps `where`; -inf without one."""
        found = self.values[where & self.flips & ~np.isnan(self.values)]
        return float(found.max()) if len(found) else float("-inf")

    def flagged(self, bar: np.ndarray | float) -> np.ndarray:
        """Bool per step: at or below `bar`, or no number."""
        flagged: np.ndarray = ~(self.values > bar)
        return flagged


def signals(steps: Steps) -> list[Signal]:
    """The candidates. The last is another server: one whose lm_head is exact and chooses."""
    found = [Signal("margin", steps.margins, steps.flips)]
    if len(steps.routers):
        found.append(Signal("margin of the routers", steps.routers, steps.flips))
    if len(steps.signed):
        found += [
            Signal("margin in steps of the dtype", steps.ulps, steps.flips),
            Signal("margin of float32 logits", steps.signed, steps.flips),
            Signal("float32 lm_head that also chooses", steps.exact_margins, steps.exact_flips),
        ]
    return found


def bars_by_size(signal: Signal, steps: Steps, where: np.ndarray) -> np.ndarray:
    """Per step, the bar that catches every flip `where` its batch size is the same."""
    bars = np.full(len(steps), -np.inf)
    for size in np.unique(steps.sizes):
        same = steps.sizes == size
        bars[same] = signal.bar(where & same)
    return bars
