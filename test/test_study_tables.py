"""What is computed of a study: steps, signals, thresholds, columns, tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from study_world import MACHINE

from margingate.harness.answers import common_prefix, identical
from margingate.harness.client import Answer
from margingate.study.column_tables import near_flips
from margingate.study.measure import drift
from margingate.study.report import recall_curve
from margingate.study.row_counts import spans
from margingate.study.steps import Signal, bars_by_size, signals, steps_of
from margingate.study.tables import calibrated_table, first_threshold, make_tables, to_markdown

NAN = float("nan")


def walk(size: int, name: str, tokens: list[int], margins: list[float], **more: Any) -> Any:
    count = len(tokens)
    exact = {
        "rows": [size] * count,
        "tops": [8.0] * count,
        "exact_tokens": tokens,
        "exact_margins": margins,
    }
    return {"batch_size": size, "name": name, "tokens": tokens, "margins": margins} | exact | more


SMALL = {
    "name": "m",
    "model": {},
    "machine": MACHINE,
    "tokens": 4,
    "batch_sizes": [2, 4],
    "server_args": [],
    "sets": {"x": ["a"], "y": ["b"]},
    "walks": [
        walk(1, "a", [1, 2, 3, 4], [1, 1, 1, 1]),
        walk(2, "a", [1, 9, 3, 4], [1, 0.25, 2, 3], exact_tokens=[1, 2, 3, 4]),
        walk(4, "a", [9, 2, 3, 4], [1, 1, NAN, 3]),
        walk(1, "b", [5, 6], [1, 1]),
        walk(2, "b", [5, 7], [1, 0.5]),
        walk(4, "b", [5, 6], [1, 0.125]),
    ],
    "columns": [],
    "sequences": [],
    "probe": None,
}


def test_steps_leave_the_prefill_out():
    steps = steps_of(SMALL)
    assert steps.rows.tolist() == [2, 3, 4, 2, 3, 4, 2, 2]
    assert steps.sets.tolist() == list("xxxxxxyy")
    assert steps.flips.tolist() == [True, *[False] * 5, True, False]
    assert steps.prefill == {"x": (1, 2), "y": (0, 2)}
    assert steps.ulps[0] == 0.25 / 2**-4, "BF16 has 7 bits: 1/16 apart from 8 on"
    assert steps.gaps[0] == 0.25 + 2**-4
    assert steps.signed[0] == 0.0, "exact products choose another token there"
    assert steps.exact_flips.tolist() == [*[False] * 6, True, False]
    assert steps.moved.tolist() == [True, True, True, False, True, True, True, True]
    assert steps.distinct == 7, "row 4 of a has the same numbers in both batches"


def test_a_server_without_exact_products_leaves_the_plain_margin():
    walks = [one | {"exact_tokens": [], "exact_margins": []} for one in SMALL["walks"]]
    steps = steps_of(SMALL | {"walks": walks})
    assert [signal.name for signal in signals(steps)] == ["margin"]
    assert len(make_tables(SMALL | {"walks": walks})) == 7


def test_a_signal_flags_up_to_its_bar_and_what_has_no_number():
    steps = steps_of(SMALL)
    margin = signals(steps)[0]
    assert margin.bar(steps.sets == "x") == 0.25 and margin.bar(steps.sets == "y") == 0.5
    assert margin.bar(steps.rows == 4) == float("-inf")
    assert margin.flagged(0.25).tolist() == [True, *[False] * 3, True, False, False, True]
    assert bars_by_size(margin, steps, steps.rows > 0).tolist() == [0.5] * 3 + [-np.inf] * 3 + [
        0.5,
        -np.inf,
    ]


def test_the_recall_curve_rises_from_nothing_to_everything():
    signal = Signal("s", np.array([1.0, 2.0, 3.0, NAN]), np.array([False, True, True, False]))
    assert recall_curve(signal) == ([0.0, 0.75, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0])


def cells(title: str, record: Any = SMALL) -> dict[str, tuple[str, ...]]:
    (table,) = [one for one in make_tables(record) if one.title.startswith(title)]
    assert all(len(row) == len(table.columns) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


def test_tables_of_a_small_record():
    rates = cells("Flips by data set")
    assert rates["x"][:3] == ("6", "1", "16.67%") and rates["x"][-1] == "1 of 2"
    assert rates["all"][:3] == ("8", "2", "25.00%") and rates["all"][-1] == "1 of 4"
    assert cells("Flips by requests in the step")["3 to 4"][:2] == ("4", "0")
    assert set(cells("Flips by row")) == {"2 to 4", "all"}
    assert cells("Margins at flips")["y"] == ("1", "0.5", "0.5", "0.5", "0.5")
    assert cells("Trigger rate")["0.515625 (all flips)"][:2] == ("50.00%", "2 of 2")
    assert cells("Trigger rate")["0.5"][:2] == ("37.50%", "1 of 2"), "below, not at"
    transfer = cells("Transfer: chosen on x")
    assert transfer["margin"][:5] == ("0.25", "2", "1", "1", "9.7e-01")
    assert transfer["margin, times 2"][:4] == ("0.5", "2", "1", "0")
    assert transfer["margin, and a rounding step"][:4] == ("0.3125", "2", "1", "1")
    assert transfer["float32 lm_head that also chooses"][0] == "none"
    assert first_threshold(SMALL) == 0.265625


def test_a_calibrated_threshold_is_tested_by_data_set():
    calibration = {"threshold": 0.5, "steps": 9, "target_miss_rate": 0.1, "trigger_rate": 0.2}
    rows = {row[0]: row[1:] for row in calibrated_table(SMALL, calibration).rows}
    assert rows["x"][:3] == ("6", "1", "0") and rows["y"][:3] == ("2", "1", "1")
    assert rows["all"][4] == "37.50%", "below the threshold, or without a margin"


def test_nothing_that_flips_makes_tables_too():
    walks = [one | {"tokens": [1] * len(one["tokens"])} for one in SMALL["walks"]]
    still = SMALL | {"walks": [one | {"exact_tokens": one["tokens"]} for one in walks]}
    assert first_threshold(still) == 0.5
    assert cells("Transfer", still)["margin"][0] == "none"
    assert all(to_markdown(table) for table in make_tables(still))


def test_columns_are_counted_from_the_flips_own():
    rows = [[[i, i / 10] for i in range(5)]] * 2  # columns of rows 2 to 6, two layers
    near = near_flips([{"flips": [3], "rows": rows}])
    assert sorted(near) == [-1, 0, 1, 2, 3] and near[0] == [[(1, 0.1)], [(1, 0.1)]]
    assert near_flips([{"flips": [1], "rows": rows}]) == {}, "the prefill's token has no column"


def test_whole_answers_compare_up_to_where_they_part():
    assert common_prefix((1, 2, 3), (1, 9, 3)) == 1 and common_prefix((1, 2), (1, 2, 3)) == 2
    rows = [[[0.0, 0.0], [0.2, 0.02]]] * 3
    one = {"a": Answer("a", (1, 2, 3), "", {"gate": {"columns": {"rows": rows}}})}
    other = {"a": Answer("a", (1, 2, 4), "", {"gate": {"columns": {"rows": rows}}})}
    found = drift(one, other, {"a", "not there"})
    assert (found["columns"], found["same_bits"]) == (2, 1)
    assert found["relative_l2"] == [[0.0, 0.02, 0.02]] * 3
    assert identical(one.values(), other.values()) == 0
    assert identical(one.values(), one.values()) == 1


def test_row_counts_are_written_as_spans():
    assert spans([[1, 0], [2, 1], [3, 1], [8, 1]]) == "1 | 2 to 8"
    assert spans([[n, n] for n in range(9)]) == "9 classes"
