"""`n` above 1 with a seed: the seeds of the choices, and how each choice gets its own."""

from __future__ import annotations

import asyncio
import copy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from margingate.core.choice_seeds import choice_seed
from margingate.runtime.client import choices
from margingate.runtime.client.parameter_types import MOST_COPIES
from margingate.runtime.request.sampling_params import LARGEST_SEED

SEEDS = st.integers(0, LARGEST_SEED)

# Of SplitMix64 with seed 1234567, as its authors' C program prints them.
SPLITMIX = (
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
)


def test_choices_have_the_numbers_of_splitmix64_whatever_the_version():
    assert [choice_seed(1234567, i) for i in range(1, 6)] == [x >> 1 for x in SPLITMIX]
    assert [choice_seed(seed, 1) for seed in (0, 1, LARGEST_SEED)] == [
        8147104208329303767,
        5225608189600411232,
        1527823816519176019,
    ]


@given(SEEDS)
def test_no_two_choices_of_a_request_have_one_seed(seed):
    found = [choice_seed(seed, i) for i in range(MOST_COPIES)]
    assert found[0] == seed
    assert len(set(found)) == MOST_COPIES
    assert all(0 <= each <= LARGEST_SEED for each in found)


@given(SEEDS, SEEDS, st.integers(1, MOST_COPIES - 1))
def test_choices_of_another_seed_are_others(one, other, choice):
    assert (choice_seed(one, choice) == choice_seed(other, choice)) is (one == other)


async def nothing(*_args: Any) -> None:
    """In place of SGLang's function."""


def sent(n: int, prompts: int = 1, **params: Any) -> list[SamplingParams]:
    """What SGLang's manager sends for `prompts` prompts, warm-ups first, as it copies them."""
    manager = SimpleNamespace(rid_to_state={})
    made = []
    for _ in range(prompts):
        obj = GenerateReqInput(text="a", sampling_params={"n": n, **params})
        asyncio.run(choices.tokenize_one_request(nothing, manager, obj))
        made.append((obj, SimpleNamespace(sampling_params=SamplingParams(n=n, **params))))

    def send(obj: GenerateReqInput, tokenized: Any, **changed: Any) -> SamplingParams:
        obj, tokenized = copy.copy(obj), copy.copy(tokenized)
        tokenized.rid = obj.regenerate_rid()
        if changed:
            tokenized.sampling_params = copy.copy(tokenized.sampling_params)
            tokenized.sampling_params.max_new_tokens = 0
        manager.rid_to_state[tokenized.rid] = SimpleNamespace(obj=obj)
        asyncio.run(choices.send_one_request(nothing, manager, tokenized))
        return tokenized.sampling_params

    warm = [send(*each, max_new_tokens=0) for each in made] if n > 1 else []
    assert all(each.sampling_seed == params.get("sampling_seed") for each in warm)
    return [send(*each) for each in made for _ in range(n)]


def test_each_choice_of_each_prompt_is_a_request_with_its_own_seed():
    found = sent(4, prompts=2, sampling_seed=7, temperature=0.8)
    assert [each.sampling_seed for each in found] == [choice_seed(7, i) for i in range(4)] * 2
    assert {(each.n, each.temperature) for each in found} == {(1, 0.8)}


@pytest.mark.parametrize("seed", [None, -1, LARGEST_SEED + 1, True])
def test_what_the_scheduler_refuses_or_draws_without_a_seed_stays_as_it_is(seed):
    assert {(each.n, each.sampling_seed) for each in sent(2, sampling_seed=seed)} == {(2, seed)}


def test_one_choice_stays_as_it_is():
    assert [(each.n, each.sampling_seed) for each in sent(1, sampling_seed=7)] == [(1, 7)]
