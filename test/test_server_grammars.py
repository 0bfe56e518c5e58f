"""Gated requests with a grammar or a bias: the same answers, and flips repaired under the mask."""

from __future__ import annotations

import json
import random
import re

import openai
import pytest
from checks import assert_clean, assert_gate_worked, assert_same, forced

from margingate.client import Answer, Client, Prompt

TOKENS = 48
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
REGEX = r"(yes|no|maybe), because [a-z ]{5,30}\."
KINDS = ({"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}, {"logit_bias": {"260": 4.0}}, {})


@pytest.fixture(scope="module")
def client(start) -> Client:
    """Passes wait and ride beside overlap, and requests are retracted every few steps."""
    args = ("--gate-debug", "--gate-inject-faults", "--gate-max-delay", "3", "--gate-overlap", "on")
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "9"}
    return Client(start(*args, env=retract).base_url, TOKENS)


@pytest.fixture(scope="module")
def params(prompts) -> dict[str, dict]:
    """Half of the prompts with a grammar, a quarter with a bias, a quarter with nothing."""
    return {prompt.name: KINDS[i % len(KINDS)] for i, prompt in enumerate(prompts)}


@pytest.fixture(scope="module")
def alone(client, prompts, params) -> list[Answer]:
    asked = [(prompt, {**params[prompt.name]}) for prompt in prompts]
    return [client.alone([prompt], sampling_params=own)[0] for prompt, own in asked]


def assert_in_form(answers: list[Answer], prompts: list[Prompt]) -> None:
    for i, answer in enumerate(answers):
        ended = answer.meta["finish_reason"]["type"] == "stop"
        if i % len(KINDS) == 0:
            assert not ended or set(json.loads(answer.text)) == set(SCHEMA["properties"])
        if i % len(KINDS) == 1:
            assert not ended or re.fullmatch(REGEX, answer.text), answer.text
    assert sum(answer.meta["finish_reason"]["type"] == "stop" for answer in answers) >= 2


def test_answers_keep_their_form_and_are_those_alone(client, prompts, params, alone):
    assert_in_form(alone, prompts)
    for seed in range(2):
        before = client.gate_state()
        order = random.Random(seed).sample(prompts, len(prompts))
        assert_same(alone, client.together(order, params=params))
        assert_gate_worked(before, client.gate_state(), batch=4)
    assert client.gate_state()["retractions"] > 0
    assert_clean(client)


def test_flips_are_repaired_under_the_mask(client, prompts, params, alone):
    before = client.gate_state()
    faults = {name: {**own, **forced([1, 3, 8, 9, 17])} for name, own in params.items()}
    answers = client.together(prompts, params=faults)
    assert_same(alone, answers)
    after = client.gate_state()
    assert after["flips"] - before["flips"] >= 2 * len(prompts)
    assert after["missed"] == before["missed"]
    assert sum(answer.meta["gate"]["flips"] for answer in answers[:2]) > 2, "constrained ones too"
    assert_clean(client)


def test_log_probs_of_constrained_rows_are_those_alone(client, prompts, params):
    def values(answer: Answer) -> list:
        return [answer.meta["output_token_logprobs"], answer.meta["output_top_logprobs"]]

    some, ask = prompts[:3], {"return_logprob": True, "top_logprobs_num": 2}
    own = {prompt.name: {**params[prompt.name], "max_new_tokens": 12} for prompt in some}
    plain = [client.alone([p], sampling_params=own[p.name], **ask)[0] for p in some]
    faults = {name: {**each, **forced([2, 6])} for name, each in own.items()}
    mended = client.together(some, params=faults, **ask)
    assert_same(plain, mended)
    assert [values(answer) for answer in plain] == [values(answer) for answer in mended]


def test_seeded_draws_with_a_grammar_are_the_same(client, prompts):
    own = {"json_schema": json.dumps(SCHEMA), "temperature": 0.8, "sampling_seed": 5}
    some = prompts[:4]
    reference = client.alone(some, sampling_params=own)
    assert all(answer.meta["gate"]["gated"] for answer in reference)
    assert_same(reference, client.together(some, sampling_params=own))


def test_json_mode_of_the_openai_client(client, prompts):
    """Streamed and at once; the schema goes where OpenAI's clients put it."""
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    asked = {
        "model": "default",
        "messages": [{"role": "user", "content": "Describe a box of apples."}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "response_format": form,
    }
    once = api.chat.completions.create(**asked)
    assert set(json.loads(once.choices[0].message.content)) == set(SCHEMA["properties"])
    parts = api.chat.completions.create(**asked, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == once.choices[0].message.content
    assert once.metadata["gate"][0]["gated"]
