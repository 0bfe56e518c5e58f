"""Choosing a threshold, the journal that makes calibration resumable, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from margingate.cli import main as cli
from margingate.cli.calibrate import meaning
from margingate.confidence import miss_bound, steps_needed
from margingate.config import GateError, load_threshold
from margingate.errors import CliError
from margingate.harness.client import Prompt
from margingate.study.calibration_file import Target, make_record
from margingate.study.journal import Journal
from margingate.study.session import tokenized
from margingate.study.steps_of_walk import Walk, distinct, flips, moved
from margingate.study.threshold import (
    TooFewStepsError,
    Trials,
    choose_threshold,
    flagged_share,
    widest_gap,
)
from margingate.study.walk import groups


def test_the_bound_is_clopper_and_pearsons():
    assert miss_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))  # the closed form at 0
    assert miss_bound(3, 1000, 0.95) == pytest.approx(0.0077356, rel=1e-3)
    assert miss_bound(5, 5, 0.95) == 1.0


@given(st.floats(1e-5, 0.5), st.floats(0.5, 0.999))
def test_steps_needed_is_where_the_bound_reaches_the_target(target, confidence):
    steps = steps_needed(target, confidence)
    assert miss_bound(0, steps, confidence) <= target * (1 + 1e-9)
    assert steps == 1 or miss_bound(0, steps - 1, confidence) > target * (1 - 1e-9)


def test_a_bound_is_the_share_that_moves_times_what_is_missed_of_it():
    """By hand, of 1,000 steps 100 moved to 60 distinct outcomes; each factor at 97.5 %."""
    trials = Trials(1000, 100, 60)
    assert trials.bound(2, 0.95) == miss_bound(100, 1000, 0.975) * miss_bound(2, 60, 0.975)
    assert Trials(1000, 1000, 60).bound(2, 0.95) == miss_bound(2, 60, 0.975), "all move"
    assert Trials(1000, 0, 0).bound(0, 0.95) == miss_bound(0, 1000, 0.975), "none moves, none flips"


@given(st.integers(1, 10**6), st.data())
def test_more_repeats_of_the_same_numbers_prove_no_more(steps, data):
    moving = data.draw(st.integers(1, steps))
    once = data.draw(st.integers(1, moving))
    missed = data.draw(st.integers(0, min(once, 5)))
    assert Trials(steps, moving, once).bound(missed, 0.95) >= (
        Trials(steps, moving, moving).bound(missed, 0.95)
    )


@given(st.floats(1e-5, 0.3), st.integers(100, 10**6), st.data())
def test_the_steps_that_are_needed_reach_the_target(target, steps, data):
    moving = data.draw(st.integers(0, steps))
    needed = Trials(steps, moving, 0).needed(target, 0.95)
    assert Trials(steps, moving, needed).bound(0, 0.95) <= target * (1 + 1e-6)


MARGINS = st.lists(st.floats(0, 4) | st.just(math.nan), max_size=20)


@given(MARGINS, st.integers(60, 200))
def test_the_threshold_is_the_smallest_that_holds(flipped, steps):
    trials = Trials(steps, steps, steps)
    choice = choose_threshold(trials, flipped, 0.1, 0.95)
    missed = sum(margin >= choice.threshold for margin in flipped)
    assert choice.missed == missed and trials.bound(missed, 0.95) <= 0.1
    below = choice.threshold - 1 / 64
    if below >= 0:
        fewer = sum(margin >= below for margin in flipped)
        assert trials.bound(fewer, 0.95) > 0.1


def test_headroom_is_counted_in_what_is_missed():
    trials = Trials(40, 40, 40)
    plain = choose_threshold(trials, [0.25, 1.0], 0.2, 0.95)
    assert (plain.threshold, plain.missed) == (0.0, 2)
    more = choose_threshold(trials, [0.25, 1.0], 0.2, 0.95, headroom=0.5)
    assert (more.threshold, more.missed) == (0.5, 1)
    assert more.miss_bound < plain.miss_bound


@pytest.mark.parametrize(
    ("best", "dtype", "step"),
    [
        (20.0, "torch.bfloat16", 0.125),  # 8 bits of it: 16 to 32 in steps of 1/8
        (32.0, "torch.bfloat16", 0.25),
        (-20.0, "torch.bfloat16", 0.125),
        (20.0, "torch.float16", 2.0**-6),
        (20.0, "torch.float32", 2.0**-19),
        (0.0, "torch.bfloat16", 2.0**-107),
    ],
)
def test_a_rounded_margin_may_have_been_a_step_wider(best, dtype, step):
    assert widest_gap(0.375, best, dtype) == 0.375 + step


def test_a_step_at_the_threshold_is_not_flagged_and_one_without_a_margin_is():
    assert flagged_share([0.25, 0.5, 1.0, math.nan], 0.5) == 0.5


def test_too_few_steps_say_how_many_are_needed():
    with pytest.raises(TooFewStepsError) as caught:
        choose_threshold(Trials(1000, 1000, 100), [], 1e-3, 0.95)
    assert (caught.value.distinct, caught.value.needed) == (100, steps_needed(1e-3, 0.975))


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
    assert distinct(batched) == distinct(batched + again)
    assert [(step.prompt, step.row) for step in distinct(batched)] == [
        *(("a", row) for row in (2, 3)),
        *(("b", row) for row in (2, 3)),
    ]
    other = replace(again[0], margins=(2.0, 0.25, 2.75))
    assert len(distinct([*batched, other])) == 5
    finer = [replace(walk, tops=(9.0, 9.0, top)) for walk, top in zip(batched[:1] * 2, (8.0, 7.0))]
    assert len(distinct(finer)) == 3, "another best logit is another outcome"


def test_a_step_with_the_numbers_it_has_alone_did_not_move():
    alone = Walk(1, "a", (5, 6, 7), (2.0, 1.0, 3.0), exact_margins=(2.01, 1.01, 3.01))
    same = replace(alone, batch_size=8)
    other = replace(alone, batch_size=4, exact_margins=(2.01, 1.01, 3.02))
    assert moved([alone], [same]) == []
    assert [step.row for step in moved([alone], [same, other, other])] == [3, 3]
    rounded = [replace(walk, exact_margins=(), tops=(9.0, 8.0, 7.0)) for walk in (alone, same)]
    assert len(moved(rounded[:1], rounded[1:])) == 2, "rounded logits may hide a difference"


@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_hold_every_prompt_once(size):
    prompts = [Prompt(str(i), (i,)) for i in range(7)]
    found = list(groups(prompts, size))
    assert sorted(p.name for group in found for p in group) == [p.name for p in prompts]
    assert all(len(group) <= size for group in found)


def target(miss_rate: float = 0.9) -> Target:
    return Target(miss_rate, confidence=0.95, headroom=0.0)


def test_the_record_is_what_the_gate_reads(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", {})
    journal.add(WALKS)
    record = make_record(target(), [8], journal, {"device": "d"}, {"config_sha256": "c"})
    assert (record["steps"], record["flips"], record["prompts"]) == (4, 1, 2)
    said = meaning(record, tmp_path)
    assert "1 of 4 decode steps flip in batches of 8. 4 of the steps have other numbers" in said
    assert "4 of these are distinct, 1 of the flips" in said
    path = tmp_path / "c.json"
    path.write_text(json.dumps(record))
    assert load_threshold(str(path), {"config_sha256": "c"}) == record["threshold"]
    assert load_threshold(str(path), {"device": "d"}, part="machine") == record["threshold"]
    with pytest.raises(GateError, match="made for device 'd', but the server has 'e'"):
        load_threshold(str(path), {"device": "e"}, part="machine")
    with pytest.raises(
        CliError,
        match=r"4 distinct steps with other numbers than alone cannot show a miss rate of 0\.01, "
        r"which takes \d+ where 4 of 4 have such",
    ):
        make_record(target(0.01), [8], journal, {}, {})


def test_the_threshold_is_a_rounding_step_above_the_flips_that_it_is_to_catch(tmp_path):
    """The best logit is 20, so BF16 margins come in steps of 1/8."""
    numbers = {"tops": (20.0,) * 3, "exact_tokens": (5, 6, 7), "exact_margins": (2.0, 1.0, 3.0)}
    alone = Walk(1, "", (5, 6, 7), (2.0, 1.0, 3.0), **numbers)
    moving = replace(alone, batch_size=8, exact_margins=(2.0, 1.1, 3.1))
    walks = [replace(walk, name=str(i)) for i in range(200) for walk in (alone, moving)]
    walks[1] = replace(walks[1], tokens=(5, 9, 7), margins=(2.0, 0.25, 3.0))
    journal = Journal(tmp_path / "j.jsonl", {})
    journal.add(walks)
    for rate, dtype, threshold in (
        (0.5, "torch.bfloat16", 0.0),  # so much may be missed
        (0.01, "torch.bfloat16", 0.390625),
        (0.01, "torch.float32", 0.265625),
    ):
        record = make_record(target(rate), [8], journal, {"lm_head": dtype}, {})
        assert record["threshold"] == threshold
    assert (record["moved_steps"], record["distinct_steps"], record["missed"]) == (400, 400, 0)
    assert record["miss_rate_bound"] == miss_bound(0, 400, 0.975)


def test_the_bound_counts_a_step_that_several_batches_give_the_same_bits_once(tmp_path):
    """Half of the batches add nothing: neither to the bound nor to the steps that are needed."""
    one, both = Journal(tmp_path / "one.jsonl", {}), Journal(tmp_path / "both.jsonl", {})
    one.add(WALKS)
    both.add([*WALKS, *(replace(walk, batch_size=4) for walk in WALKS if walk.batch_size == 8)])
    small = make_record(target(), [8], one, {}, {})
    large = make_record(target(), [4, 8], both, {}, {})
    assert (large["steps"], large["flips"]) == (8, 2)
    for name in ("distinct_steps", "distinct_flips", "missed", "miss_rate_bound", "threshold"):
        assert large[name] == small[name], name
    assert large["miss_rate_bound"] == miss_bound(large["missed"], 4, 0.975)
    with pytest.raises(CliError, match=r"4 distinct steps with other .* rate of 0\.5, which"):
        make_record(target(0.5), [4, 8], both, {}, {})


def test_files_of_before_still_load(tmp_path):
    path = tmp_path / "c.json"
    made_for = {"model": {"config_sha256": "c"}, "machine": {"device": "d"}}
    counts = {"steps": 4, "distinct_steps": 4, "flips": 1, "missed": 0, "miss_rate_bound": 0.5}
    path.write_text(json.dumps({"schema": 1, **made_for, "threshold": 0.5, **counts}))
    assert load_threshold(str(path), {"config_sha256": "c"}) == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "/nowhere/c.json"], "--out /nowhere/c.json cannot be written"),
        (["--out", "/tmp"], "--out /tmp is a folder: name a file in it."),
        (["--model-path", "Qwen/Qwen2.5-7B"], "--model-path Qwen/Qwen2.5-7B is not there: give a"),
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


def test_a_tokenizer_that_does_not_load_is_one_whole_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CliError) as caught:
        tokenized({"one": [("a", "b")]}, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"the tokenizer in {tmp_path} cannot be used (") and "\n" not in said
    assert said.endswith("a folder that has the tokenizer's files, and a chat template.")
