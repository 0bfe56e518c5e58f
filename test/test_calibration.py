"""Choosing a threshold, the journal that makes calibration resumable, and what it refuses."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from margingate.calibration import (
    TooFewStepsError,
    choose_threshold,
    miss_bound,
    steps_needed,
)
from margingate.cli import main as cli
from margingate.cli.calibrate import make_record, meaning, tokenized
from margingate.cli.calibrate_measure import Journal, Walk, distinct, flips, groups
from margingate.cli.errors import CliError
from margingate.client import Prompt
from margingate.config import GateError, load_threshold


def test_the_bound_is_clopper_and_pearsons():
    assert miss_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))  # the closed form at 0
    assert miss_bound(3, 1000, 0.95) == pytest.approx(0.0077356, rel=1e-3)
    assert miss_bound(5, 5, 0.95) == 1.0


@given(st.floats(1e-5, 0.5), st.floats(0.5, 0.999))
def test_steps_needed_is_where_the_bound_reaches_the_target(target, confidence):
    steps = steps_needed(target, confidence)
    assert miss_bound(0, steps, confidence) <= target * (1 + 1e-9)
    assert steps == 1 or miss_bound(0, steps - 1, confidence) > target * (1 - 1e-9)


MARGINS = st.lists(st.floats(0, 4) | st.just(math.nan), min_size=40, max_size=200)


@given(MARGINS, st.data())
def test_the_threshold_is_the_smallest_that_holds(margins, data):
    picked = data.draw(st.lists(st.integers(0, len(margins) - 1), unique=True, max_size=20))
    flipped = [margins[i] for i in picked]
    choice = choose_threshold(margins, flipped, 0.1, 0.95)
    missed = sum(margin >= choice.threshold for margin in flipped)
    assert choice.missed == missed and miss_bound(missed, len(margins), 0.95) <= 0.1
    assert choice.trigger_rate == sum(not m >= choice.threshold for m in margins) / len(margins)
    below = choice.threshold - 1 / 64
    if below >= 0:
        fewer = sum(margin >= below for margin in flipped)
        assert miss_bound(fewer, len(margins), 0.95) > 0.1


def test_headroom_is_counted_in_what_is_missed():
    margins = [i / 8 for i in range(40)]
    plain = choose_threshold(margins, [0.25, 1.0], 0.2, 0.95)
    assert (plain.threshold, plain.missed, plain.trigger_rate) == (0.0, 2, 0.0)
    more = choose_threshold(margins, [0.25, 1.0], 0.2, 0.95, headroom=0.5)
    assert (more.threshold, more.missed, more.trigger_rate) == (0.5, 1, 0.1)
    assert more.miss_bound < plain.miss_bound


def test_too_few_steps_say_how_many_are_needed():
    with pytest.raises(TooFewStepsError) as caught:
        choose_threshold([1.0] * 100, [], 1e-3, 0.95)
    assert (caught.value.steps, caught.value.needed) == (100, 2995)


WALKS = [
    Walk(1, "a", (5, 6, 7), (2.0, 1.0, 3.0)),
    Walk(8, "a", (5, 9, 7), (2.0, 0.25, 3.0)),
    Walk(1, "b", (4, 8, 8), (1.5, 0.5, 2.0)),
    Walk(8, "b", (3, 8, 8), (0.0, 0.5, 2.0)),  # its prefill chose another token: no decode step
]


def test_flips_are_the_steps_that_choose_another_token():
    walks = {(walk.batch_size, walk.name): walk for walk in WALKS}
    assert flips(walks) == [{"prompt": "a", "row": 2, "batch_size": 8, "margin": 0.25}]


def test_a_journal_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, {"model": "m"}).add(WALKS[:2])
    path.write_text(path.read_text() + '[8, "b", [4')  # the machine went down here
    again = Journal(path, {"model": "m"})
    assert list(again.walks.values()) == WALKS[:2]


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, {"model": "m"})
    with pytest.raises(CliError, match="begun with another model"):
        Journal(path, {"model": "n"})


def test_a_step_with_the_same_numbers_in_two_batches_is_one_trial():
    batched = [walk for walk in WALKS if walk.batch_size == 8]
    again = [replace(walk, batch_size=4) for walk in batched]
    assert distinct(batched) == distinct(batched + again) == 4
    other = replace(again[0], margins=(2.0, 0.25, 2.75))
    assert distinct([*batched, other]) == 5


@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_hold_every_prompt_once(size):
    prompts = [Prompt(str(i), (i,)) for i in range(7)]
    found = list(groups(prompts, size))
    assert sorted(p.name for group in found for p in group) == [p.name for p in prompts]
    assert all(len(group) <= size for group in found)


def options(**changed) -> argparse.Namespace:
    chosen = {"batch_sizes": [8], "target_miss_rate": 0.9, "confidence": 0.95}
    chosen |= {"headroom": 0.0, **changed}
    return argparse.Namespace(**chosen)


def test_the_record_is_what_the_gate_reads(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", {})
    journal.add(WALKS)
    record = make_record(options(), journal, {"device": "d"}, {"config_sha256": "c"})
    assert (record["steps"], record["flips"], record["prompts"]) == (4, 1, 2)
    assert "1 of 4 decode steps (4 of them distinct) flip in batches of 8" in meaning(
        record, tmp_path
    )
    path = tmp_path / "c.json"
    path.write_text(json.dumps(record))
    assert load_threshold(str(path), {"config_sha256": "c"}) == record["threshold"]
    assert load_threshold(str(path), {"device": "d"}, part="machine") == record["threshold"]
    with pytest.raises(GateError, match="made for device 'd', but the server has 'e'"):
        load_threshold(str(path), {"device": "e"}, part="machine")
    with pytest.raises(
        CliError, match=r"4 steps cannot show a miss rate of 0\.01, which takes 299"
    ):
        make_record(options(target_miss_rate=0.01), journal, {}, {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens is 0"),
        (["--per-file", "0"], "--per-file is 0"),
        (["--batch-sizes", "1"], "--batch-sizes has 1"),
        (["--target-miss-rate", "0"], "--target-miss-rate is 0.0"),
        (["--confidence", "1"], "--confidence is 1.0"),
        (["--headroom", "-1"], "--headroom is -1.0"),
        (["--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_starts(arguments, said, capsys):
    assert cli.main(["calibrate", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"margingate: {said}")
        (["--out", "/nowhere/c.json"], "--out /nowhere/c.json cannot be written"),
        (["--out", "/tmp"], "--out /tmp is a folder: name a file in it."),
        (["--model-path", "Qwen/Qwen2.5-7B"], "--model-path Qwen/Qwen2.5-7B is not there: give a"),


def test_a_tokenizer_that_does_not_load_is_one_whole_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CliError) as caught:
        tokenized({"one": [("a", "b")]}, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"the tokenizer in {tmp_path} cannot be used (") and "\n" not in said
    assert said.endswith("a folder that has the tokenizer's files, and a chat template.")
