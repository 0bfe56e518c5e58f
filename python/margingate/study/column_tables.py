"""A study's tables of K/V columns, whole sequences and operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from margingate.study.row_counts import classes_of_steps, short_name, spans
from margingate.study.tables import Table, percent

LAYERS = ("first layer", "middle layer", "last layer")
NEAR = 8  # columns before and after a flip


def more_tables(record: Mapping[str, Any]) -> list[Table]:
    """Those of the parts that the study was asked for."""
    tables = []
    if record["columns"]:
        tables.append(_columns(record["columns"]))
    if record["sequences"]:
        tables += [_sequences(record["sequences"]), _repaired(record["sequences"])]
    if record["probe"] and record["probe"].get("operators"):
        tables.append(_operators(record["probe"]))
    return tables


def near_flips(answers: Sequence[Mapping[str, Any]]) -> dict[int, list[list[tuple[float, float]]]]:
    """By offset from a flip's own column, then by layer: [max abs, relative L2] of each column."""
    found: dict[int, list[list[tuple[float, float]]]] = {}
    for answer in answers:
        for row in answer["flips"]:
            for offset in range(-NEAR, NEAR + 1):
                at = row - 2 + offset  # the column of row 2 is the first
                if row >= 2 and 0 <= at < len(answer["rows"][0]):
                    layers = found.setdefault(offset, [[] for _ in answer["rows"]])
                    for values, rows in zip(layers, answer["rows"], strict=True):
                        values.append(tuple(rows[at]))
    return dict(sorted(found.items()))


def _columns(answers: Sequence[Mapping[str, Any]]) -> Table:
    near = near_flips(answers)
    count = len(answers[0]["rows"])
    parts = {
        "prompts, whole": [[answer["prompt"][i] for answer in answers] for i in range(count)],
        f"{NEAR} columns before a flip": _picked(near, range(-NEAR, 0), count),
        "the flip's own column": _picked(near, (0,), count),
        f"{NEAR} columns after": _picked(near, range(1, NEAR + 1), count),
        "all decoded columns": [
            [v for one in answers for v in one["rows"][i]] for i in range(count)
        ],
    }
    rows = [(name, str(len(layers[0])), *_cells(layers)) for name, layers in parts.items()]
    return Table(
        "K/V columns, batched against alone, without repair",
        f"{len(answers)} answers with flips, forced along the answer alone. Relative L2 distance "
        "of keys and values together: median / largest; then the largest absolute difference.",
        ("columns", "number", *LAYERS[:count], "largest difference"),
        rows,
    )


def _picked(
    near: Mapping[int, list[list[Any]]], offsets: Iterable[int], count: int
) -> list[list[Any]]:
    """What is known at these offsets, for each of `count` layers."""
    chosen = [near[offset] for offset in offsets if offset in near]
    return [[value for part in chosen for value in part[i]] for i in range(count)]


def _cells(layers: Sequence[Sequence[Sequence[float]]]) -> Iterator[str]:
    for values in layers:
        relative = [one[1] for one in values]
        yield f"{np.median(relative):.2g} / {max(relative):.2g}" if relative else "-"
    yield f"{max((one[0] for values in layers for one in values), default=0):.3g}"


def _sequences(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in results:
        counters = one["counters"]
        gated = bool(one["options"])
        rate = percent(counters["flagged"] / max(counters["steps"], 1)) if gated else "-"
        counts = [str(counters[name]) if gated else "-" for name in ("flips", "missed")]
        same = [f"{n} of {one['prompts']}" for n in one["identical"].values()]
        rows.append((one["case"], *same, rate, *counts))
    return Table(
        "Whole answers that are the same as alone",
        f"Free answers on the stock fast path, in batches of {_batch(results[0])} in two orders, "
        "against the same prompts alone on the same server. A number is the threshold.",
        ("case", "batched", "shuffled", "rows flagged", "flips repaired", "missed"),
        rows,
    )


def _batch(result: Mapping[str, Any]) -> int:
    return int(min(result["batch_size"], result["prompts"]))


def _repaired(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in results:
        drift = one["drift"]
        cells = [f"{q[0]:.2g} / {q[2]:.2g}" if q else "-" for q in drift["relative_l2"]]
        same = f"{drift['same_bits']:,} of {drift['columns']:,}"
        rows.append((one["case"], same, *cells))
    return Table(
        "K/V columns of whole answers, with and without repair",
        "Decoded columns up to where the tokens part, batched against alone on the same server: "
        "how many have the same bits in all three layers, and the relative L2 distance, median / "
        "largest.",
        ("case", "same bits", *LAYERS[: len(results[0]["drift"]["relative_l2"])]),
        rows,
    )


def _operators(probe: Mapping[str, Any]) -> Table:
    rows = []
    for operator in probe["operators"]:
        shape = " x ".join(map(str, operator["shape"]))
        rows.append(
            (short_name(operator["name"]), operator["kind"], shape, spans(operator["classes"]))
        )
    steps = (probe.get("steps") or {}).get("measured", [])
    if steps:
        whole = spans(classes_of_steps(steps))
        rows.append(("decode step, as a gated server runs it", "model", "", whole))
    return Table(
        "The cause: row counts that give a row the same bits",
        "margingate's probe of each operator; `|` separates classes of row counts. An operator "
        "with one class cannot flip a token.",
        ("operator", "kind", "shape", "row counts with the same bits"),
        rows,
    )
