"""Gated requests with penalties: the same answers, under overlap, retractions and forced flips."""

from __future__ import annotations

import random
from collections import Counter

import openai
import pytest
from checks import assert_clean, assert_gate_worked, assert_same, forced

from margingate.client import Answer, Client, Prompt

TOKENS = 64
KINDS = (
    {"frequency_penalty": 0.6, "presence_penalty": 0.4},
    {"repetition_penalty": 1.25},
    {"min_new_tokens": 40, "repetition_penalty": 1.05},
    {},
)


@pytest.fixture(scope="module")
def client(start) -> Client:
    """Passes wait and ride beside overlap, and requests are retracted every few steps."""
    args = ("--gate-debug", "--gate-inject-faults", "--gate-max-delay", "3", "--gate-overlap", "on")
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "9"}
    return Client(start(*args, env=retract).base_url, TOKENS)


@pytest.fixture(scope="module")
def params(prompts) -> dict[str, dict]:
    return {prompt.name: KINDS[i % len(KINDS)] for i, prompt in enumerate(prompts)}


@pytest.fixture(scope="module")
def alone(client, prompts, params) -> list[Answer]:
    return [client.alone([each], sampling_params=params[each.name])[0] for each in prompts]


def test_answers_are_those_alone(client, prompts, params, alone):
    for seed in range(2):
        before = client.gate_state()
        order = random.Random(seed).sample(prompts, len(prompts))
        assert_same(alone, client.together(order, params=params))
        assert_gate_worked(before, client.gate_state(), batch=4)
    assert client.gate_state()["retractions"] > 0
    assert_clean(client)


def test_penalties_do_what_they_are_for(client, prompts, alone):
    plain = client.alone(prompts)
    for i, (without, answer) in enumerate(zip(plain, alone, strict=True)):
        if i % len(KINDS) == 2:
            assert len(answer.tokens) >= 40
        elif i % len(KINDS) == 3:
            assert answer.tokens == without.tokens
    assert _most(alone[:2]) < _most(plain[:2])
    assert sum(a.tokens != b.tokens for a, b in zip(plain, alone, strict=True)) >= len(prompts) // 4


def _most(answers: list[Answer]) -> int:
    """How often the commonest token of each came, in all."""
    return sum(max(Counter(answer.tokens).values()) for answer in answers)


def test_flips_are_repaired_and_counted_anew(client, prompts, params, alone):
    before = client.gate_state()
    faults = {name: {**own, **forced([1, 3, 8, 9, 17])} for name, own in params.items()}
    answers = client.together(prompts, params=faults)
    assert_same(alone, answers)
    after = client.gate_state()
    assert after["flips"] - before["flips"] >= 2 * len(prompts)
    assert after["missed"] == before["missed"]
    assert_clean(client)


def test_log_probs_are_those_alone(client, prompts, params):
    some, ask = prompts[:3], {"return_logprob": True, "top_logprobs_num": 2}
    own = {prompt.name: {**params[prompt.name], "max_new_tokens": 12} for prompt in some}
    plain = [client.alone([p], sampling_params=own[p.name], **ask)[0] for p in some]
    faults = {name: {**each, **forced([2, 6])} for name, each in own.items()}
    for one, other in zip(plain, client.together(some, params=faults, **ask), strict=True):
        assert one.tokens == other.tokens
        assert one.meta["output_token_logprobs"] == other.meta["output_token_logprobs"]
        assert one.meta["output_top_logprobs"] == other.meta["output_top_logprobs"]


def test_beside_a_grammar_and_a_seed(client, prompts):
    own = {
        prompts[0].name: {"regex": r"[a-z ]{20,60}\.", "repetition_penalty": 1.2},
        prompts[1].name: {"temperature": 0.9, "sampling_seed": 7, "frequency_penalty": 0.5},
        prompts[2].name: {"logit_bias": {"260": 3.0}, "presence_penalty": 1.0},
    }
    some: list[Prompt] = prompts[:3]
    alone = [client.alone([p], sampling_params=own[p.name])[0] for p in some]
    faults = {name: {**each, **forced([2, 7])} for name, each in own.items()}
    assert_same(alone, client.together(some, params=faults))
    assert_clean(client)


def test_openai_client(client):
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")

    def ask(penalty: float) -> tuple[str, dict]:
        reply = api.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "List words that rhyme with day."}],
            temperature=0,
            max_tokens=48,
            frequency_penalty=penalty,
        )
        (gate,) = reply.model_extra["metadata"]["gate"]
        return reply.choices[0].message.content or "", gate

    (plain, _), (penalised, gate), (again, _) = ask(0), ask(1.5), ask(1.5)
    assert gate["gated"] and penalised == again != plain
