"""Requests that sample: by which seed they are gated, and what a temperature does to others."""

import pytest
from request_stand_in import CONFIG, OPT_OUT, classify, refused, request

from margingate.runtime.request.sampling_params import Draw


def test_sampling_with_a_seed_is_gated():
    gate = classify(request(top_k=1 << 30, temperature=0.5, top_p=0.9, sampling_seed=7))
    assert gate.gated and gate.draw == Draw(7, 0.5, 1 << 30, 0.9, 0.0)
    assert gate.draw.filters and not Draw(7, 0.5, 1 << 30, 1.0, 0.0).filters
    assert classify(request(sampling_seed=7)).draw is None, "greedy: the seed decides nothing"
    assert classify(request(sampling_seed=-7)).gated


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_no_tensor_holds_is_refused(seed):
    text = refused(request(top_k=5, sampling_seed=seed))
    assert text == f"sampling_seed is {seed}: give a whole number from 0 to {(1 << 63) - 1}."


@pytest.mark.parametrize("seed", ["a", [1], 1.5, True])
def test_a_seed_that_is_no_whole_number_is_answered(seed):
    text = refused(request(temperature=0.9, top_k=50, sampling_seed=seed))
    assert text.startswith(f"sampling_seed is {seed!r}: give a whole number")


def test_a_choice_without_a_seed_of_its_own_is_refused():
    text = refused(request(top_k=5, sampling_seed=3, n=2))
    assert text.startswith("n is 2 with sampling_seed 3, and this choice has no seed of its own")
    assert classify(request(n=2)).gated
    assert not classify(request(top_k=5, sampling_seed=3, n=2, max_new_tokens=0)).refusal


def test_the_record_has_the_seed_of_what_was_drawn():
    drawn = classify(request(top_k=1 << 30, temperature=0.5, sampling_seed=7)).summary(CONFIG)
    assert drawn["seed"] == 7
    assert "seed" not in classify(request(sampling_seed=7)).summary(CONFIG)


@pytest.mark.parametrize("seed", [None, 7, -1])
def test_a_score_is_gated_and_draws_nothing(seed):
    req = request(max_new_tokens=0, top_k=1 << 30, temperature=0.5, top_p=0.5, sampling_seed=seed)
    gate = classify(req)
    assert gate.gated and gate.draw is None
    params = req.sampling_params
    assert (params.top_k, params.temperature, params.top_p, params.min_p) == (1, 1.0, 1.0, 0.0)
    opted_out = request(OPT_OUT, max_new_tokens=0, top_k=9, temperature=0.5)
    assert not classify(opted_out).gated and opted_out.sampling_params.temperature == 0.5


@pytest.mark.parametrize("custom", [None, OPT_OUT])
def test_the_greedy_choice_at_a_temperature_has_log_probs_of_none(custom):
    """SGLang divides by it in a batch that also samples, and in no other."""
    req = request(custom, top_k=1, temperature=0.7, top_p=0.9)
    assert classify(req).gated is (custom is None)
    assert req.sampling_params.temperature == (0.7 if custom else 1.0)
