"""A study of a mixture of experts: what the margin of its routers adds, from made-up steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from margingate.harness.client import Answer
from margingate.runtime.observe import study
from margingate.study import measure, router_tables, walk
from margingate.study.router_tables import Bars, best_of_both, choose, router_threshold
from margingate.study.steps import signals, steps_of
from margingate.study.steps_of_walk import Walk
from margingate.study.tables import make_tables

NAN, INF = math.nan, math.inf


def one_walk(size: int, name: str, steps: Sequence[tuple[float, float, bool]]) -> dict[str, Any]:
    """Of steps as (margin, router margin, flips), behind a first token of the prefill's."""
    flips = [False, *(flip for *_, flip in steps)]
    return {
        "batch_size": size,
        "name": name,
        "tokens": [1 + flip * (size > 1) for flip in flips],
        "margins": [9.0, *(margin for margin, *_ in steps)],
        "rows": [size] * len(flips),
        "tops": [],
        "exact_tokens": [],
        "exact_margins": [],
        "routers": [0.0, *(router for _, router, _ in steps)],
    }


def record_of(**sets: Sequence[tuple[float, float, bool]]) -> dict[str, Any]:
    """A study with one prompt a data set, alone and in a batch of two."""
    walks = [one_walk(size, name, steps) for name, steps in sets.items() for size in (1, 2)]
    machine = {"dtype": "torch.bfloat16"}
    return {"sets": {name: [name] for name in sets}, "walks": walks, "machine": machine}


# Of 20 steps the ten lowest margins hold three flips, and the ten nearest routers two others.
MIXED = [(0.1 * i, 5.0, i in (1, 2, 3)) for i in range(10)]
MIXED += [(4.0 + i, 0.1 * i, i in (1, 2)) for i in range(10)]
RECORD = record_of(x=MIXED)


def everywhere(steps: Any) -> np.ndarray:
    return np.full(len(steps), True)


def test_the_margins_of_routers_are_those_of_decode_steps():
    steps = steps_of(RECORD)
    assert steps.routers.tolist() == [router for _, router, _ in MIXED], "without the prefill's"
    assert len(steps) == 20 and steps.flips.sum() == 5
    assert [signal.name for signal in signals(steps)] == ["margin", "margin of the routers"]


def without_routers() -> dict[str, Any]:
    walks = [one | {"routers": []} for one in RECORD["walks"]]
    del walks[0]["routers"], walks[1]["routers"]  # as in studies from before
    return RECORD | {"walks": walks}


def test_a_dense_model_has_none_and_no_table():
    steps = steps_of(without_routers())
    assert len(steps.routers) == 0 and [signal.name for signal in signals(steps)] == ["margin"]
    assert router_tables.router_tables(without_routers()) == []
    assert router_threshold(without_routers(), 0.5) is None


def test_bars_flag_what_is_at_or_below_either_and_what_is_no_number():
    steps = steps_of(record_of(x=[(1.0, 5.0, False), (2.0, 0.5, False), (NAN, 5.0, False)]))
    assert Bars(1.0, -INF).flagged(steps).tolist() == [True, False, True]
    assert Bars(-INF, 0.5).flagged(steps).tolist() == [False, True, True]
    assert Bars(0.99, 0.49).flagged(steps).tolist() == [False, False, True]
    steps = steps_of(record_of(x=[(1.0, NAN, False)]))
    assert Bars(-INF, -INF).flagged(steps).tolist() == [True]


@pytest.mark.parametrize(
    ("split", "bars", "caught"),
    [
        (1.0, Bars(pytest.approx(0.7), -INF), 3),
        (0.0, Bars(-INF, pytest.approx(0.7)), 2),
        (0.5, Bars(pytest.approx(0.3), pytest.approx(0.3)), 5),
    ],
)
def test_a_rate_is_shared_between_the_two(split, bars, caught):
    steps = steps_of(RECORD)
    found = choose(steps, everywhere(steps), 0.4, split)
    assert found == bars
    flagged = found.flagged(steps)
    assert flagged.sum() == 8 and (flagged & steps.flips).sum() == caught


def test_what_one_margin_has_flagged_the_other_need_not():
    """A step that both flag is counted once, so that the second bar reaches further."""
    steps = steps_of(record_of(x=[(float(i), float(i), False) for i in range(10)]))
    assert choose(steps, everywhere(steps), 0.6, 0.5) == Bars(2.0, 5.0)


def test_ties_stay_within_the_rate_and_missing_numbers_take_of_it():
    ties = [(1.0, 9.0, False)] * 3 + [(2.0, 9.0, False)] * 3 + [(3.0, 9.0, False)] * 4
    steps = steps_of(record_of(x=ties))
    assert choose(steps, everywhere(steps), 0.5, 1.0).margin == 1.0, "at 2 it would be 6 of 10"
    assert choose(steps, everywhere(steps), 0.2, 1.0).margin == -INF
    unknown = [(NAN, 9.0, False)] * 4 + [(5.0, float(i), False) for i in range(6)]
    steps = steps_of(record_of(x=unknown))
    assert choose(steps, everywhere(steps), 0.6, 0.0) == Bars(-INF, 1.0)
    assert choose(steps, everywhere(steps), 0.2, 0.0).router == -INF
    unseen = [(5.0, NAN, False)] * 4 + [(5.0, float(i), False) for i in range(6)]
    steps = steps_of(record_of(x=unseen))
    assert choose(steps, everywhere(steps), 0.6, 0.0) == Bars(-INF, 1.0)


def test_the_best_split_is_never_behind_the_margin_alone():
    draw = np.random.default_rng(0)
    for _ in range(20):
        found = [(draw.exponential(), draw.exponential(), draw.random() < 0.1) for _ in range(80)]
        steps = steps_of(record_of(x=found))
        for rate in router_tables.RATES:
            alone = choose(steps, everywhere(steps), rate, 1.0).flagged(steps) & steps.flips
            both = best_of_both(steps, everywhere(steps), rate).flagged(steps)
            assert (both & steps.flips).sum() >= alone.sum()
            assert both.sum() <= rate * len(steps)


def table(start: str, record: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    [found] = [one for one in router_tables.router_tables(record) if one.title.startswith(start)]
    assert all(len(row) == len(found.columns) for row in found.rows)
    return {row[0]: row[1:] for row in found.rows}


def test_flips_caught_at_the_same_rate():
    rows = table("Flips caught at the same trigger rate", RECORD)
    assert rows["40.00%"][:3] == ("3 of 5 (40.00%)", "2 of 5 (40.00%)", "5 of 5 (40.00%)")
    assert rows["1.00%"][:3] == ("0 of 5 (0.000%)",) * 3


def test_bars_of_the_first_data_set_are_tested_on_the_others():
    other = [(0.05, 9.0, True), (9.0, 0.05, True), (9.0, 9.0, True), (9.0, 9.0, False)]
    record = record_of(x=MIXED, y=other)
    rows = table("Flips caught at the same trigger rate, chosen on x", record)
    assert rows["40.00%"][:3] == ("1 of 3 (25.00%)", "1 of 3 (25.00%)", "2 of 3 (50.00%)")
    assert len(router_tables.router_tables(record)) == 3
    assert len(router_tables.router_tables(RECORD)) == 2


def test_flips_by_how_near_the_routers_were():
    steps = [(9.0, float(i), i < 10) for i in range(100)]
    steps += [(0.25, 1000.0 + i, i == 0) for i in range(100)]
    rows = table("Flips by the routers' margin", record_of(x=steps))
    assert rows["0.000% to 1.00%"][:4] == ("1", "2", "2", "100.00%")
    assert rows["1.00% to 5.00%"][1:3] == ("8", "8")
    assert rows["5.00% to 20.00%"][:4] == ("39", "30", "0", "0.000%")
    assert rows["50.00% to 100.00%"][2] == "1"
    assert rows["all"][1:3] == ("200", "11")
    assert rows["1.00% to 5.00%"][-2:] == ("9", "0"), "the threshold catches all of the first set"


def test_what_a_threshold_of_logits_does_not_flag_is_counted():
    calm = [(0.25, 5.0, True), (3.0, 5.0, False)]
    rows = table("Flips by the routers' margin", record_of(x=calm, y=[(7.0, 0.1, True)] * 3))
    assert rows["all"][-1] == "3" and rows["all"][2] == "4"


def test_a_servers_router_threshold_flags_what_its_other_one_misses():
    steps = [(0.25, 9.0, True), (2.0, 0.3, True), (3.0, 0.1, True), (3.0, NAN, True)]
    record = record_of(x=[*steps, (3.0, 0.7, False)], y=[(3.0, 5.0, True)])
    assert router_threshold(record, 0.5) == 20 / 64, "the next multiple above 0.3"
    assert router_threshold(record, 2.5) == 7 / 64
    assert router_threshold(record, 4.0) == 1 / 64, "nothing is missed"
    cases = measure.cases([0.5, 4.0], lambda threshold: router_threshold(record, threshold))
    for name, router in (("span 0.5", "0.3125"), ("column 4", "0.015625")):
        assert cases[name][cases[name].index("--gate-router-threshold") + 1] == router
    assert "--gate-router-threshold" not in cases["exact"]
    dense = measure.cases([0.5], lambda threshold: None)
    assert "--gate-router-threshold" not in dense["span 0.5"]


def test_the_other_tables_take_the_routers_for_one_more_signal():
    record = record_of(x=MIXED, y=MIXED)
    [found] = [one for one in make_tables(record) if one.title.startswith("Signals")]
    assert [row[0] for row in found.rows] == ["margin", "margin of the routers"]


# -- from the server's records to the steps


def walked(*choices: tuple[Any, ...]) -> Walk:
    answer = Answer("a", (1,), "", {"gate": {"choices": choices}})
    return walk._walk(8, answer)


def test_a_walk_has_the_margins_that_the_server_reported():
    found = walked((5, 1.0, 8, 0.25), (6, 2.0, 7, None))
    assert found.routers[0] == 0.25 and math.isnan(found.routers[1])
    assert (found.tokens, found.rows, found.tops) == ((5, 6), (8, 7), ())
    assert walked((5, 1.0, 8, None), (6, 2.0, 7, None)).routers == ()
    finer = walked((5, 1.0, 8, 0.25, 9.0, 4, 1.01))
    assert (finer.tops, finer.exact_tokens, finer.exact_margins) == ((9.0,), (4,), (1.01,))
    assert finer.routers == (0.25,)


@pytest.mark.parametrize(("router", "known"), [(0.25, 0.25), (INF, None)])
def test_a_forced_row_is_noted_with_both_margins(monkeypatch, router, known):
    monkeypatch.setattr(study, "_exact", cast(Callable[..., Any], lambda *_: None))
    gate = SimpleNamespace(choices=[], forced=())
    req = SimpleNamespace(gate=gate, output_ids=[])
    output = SimpleNamespace(next_token_logits=torch.zeros(2, 3))
    result = SimpleNamespace(logits_output=output, next_token_ids=torch.tensor([4, 5]))
    study.force(None, req, result, 1, (0.5, router))
    assert gate.choices == [(5, 0.5, 2, known)]
