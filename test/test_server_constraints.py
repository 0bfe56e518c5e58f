"""Gated requests with a grammar, a bias or penalties: the same answers, and flips repaired."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import openai
import pytest
import requests
from checks import assert_clean, assert_gate_worked, assert_same, forced, needs_the_whole_model

from margingate.harness.client import Answer, Client
from margingate.harness.servers import retracting, slow_bfloat16

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
FORMS = ({"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}, {"logit_bias": {"260": 4}}, {})
PENALTIES = (
    {"frequency_penalty": 0.6, "presence_penalty": 0.4},
    {"repetition_penalty": 1.25},
    {"min_new_tokens": 40, "repetition_penalty": 1.05},
    {},
)


@pytest.fixture(scope="module")
def client(start) -> Client:
    """Passes wait and are merged beside overlap, and requests are retracted every few steps."""
    args = ("--gate-debug", "--gate-inject-faults", "--gate-max-delay", "3", "--gate-overlap", "on")
    return Client(start(*args, env=retracting(9)).base_url, TOKENS)


@pytest.fixture(scope="module", params=(FORMS, PENALTIES), ids=("forms", "penalties"))
def kinds(request) -> tuple[dict, ...]:
    """What the prompts are asked with in turn, the last ones with nothing."""
    kinds: tuple[dict, ...] = request.param
    return kinds


@pytest.fixture(scope="module")
def params(prompts, kinds) -> dict[str, dict]:
    return {prompt.name: kinds[i % len(kinds)] for i, prompt in enumerate(prompts)}


@pytest.fixture(scope="module")
def alone(client, prompts, params) -> list[Answer]:
    asked = [(prompt, {**params[prompt.name]}) for prompt in prompts]
    return [client.alone([prompt], sampling_params=own)[0] for prompt, own in asked]


def assert_in_form(answers: list[Answer]) -> None:
    for i, answer in enumerate(answers):
        ended = answer.meta["finish_reason"]["type"] == "stop"
        if i % len(FORMS) == 0:
            assert not ended or set(json.loads(answer.text)) == set(SCHEMA["properties"])
        if i % len(FORMS) == 1:
            assert not ended or re.fullmatch(REGEX, answer.text), answer.text
    assert sum(answer.meta["finish_reason"]["type"] == "stop" for answer in answers) >= 2


def assert_penalised(answers: list[Answer], plain: list[Answer]) -> None:
    def most(some: list[Answer]) -> int:
        """How often the commonest token of each came, in all."""
        return sum(max(Counter(answer.tokens).values()) for answer in some)

    changed = 0
    for i, (answer, without) in enumerate(zip(answers, plain, strict=True)):
        if i % len(PENALTIES) < 2:
            changed += answer.tokens != without.tokens
        elif i % len(PENALTIES) == 2:
            assert len(answer.tokens) >= 40
        else:
            assert answer.tokens == without.tokens
    assert changed >= len(answers) // len(PENALTIES), "no penalty told"
    if not slow_bfloat16():  # a part of the model repeats its nonsense all the same
        assert most(answers[:2]) <= most(plain[:2])  # as often, where the text repeats nothing


def test_answers_are_as_asked_and_those_alone(client, prompts, params, kinds, alone):
    if kinds is FORMS:
        assert_in_form(alone)
    else:
        assert_penalised(alone, client.alone(prompts))
    for seed in range(2):
        before = client.gate_state()
        order = random.Random(seed).sample(prompts, len(prompts))
        assert_same(alone, client.together(order, params=params))
        assert_gate_worked(before, client.gate_state(), batch=4)
    assert client.gate_state()["retractions"] > 0
    assert_clean(client)


def test_flips_are_repaired_under_the_mask_and_counted_anew(client, prompts, params, alone):
    before = client.gate_state()
    faults = {name: {**own, **forced([1, 3, 8, 9, 17])} for name, own in params.items()}
    answers = client.together(prompts, params=faults)
    assert_same(alone, answers)
    after = client.gate_state()
    assert after["flips"] - before["flips"] >= 2 * len(prompts)
    assert after["missed"] == before["missed"]
    assert sum(answer.meta["gate"]["flips"] for answer in answers[:2]) > 2, "constrained ones too"
    assert_clean(client)


def test_log_probs_of_a_verified_row_are_those_alone(client, prompts, params):
    """Row 2 is: nothing before it can be rolled back, for the first token is canonical.

    With sparse, rows that are neither flagged nor verified keep the last bits of the batch, which
    some CPUs hide; test_server_invariant.py asks for all rows.
    """
    ask = {"return_logprob": True, "top_logprobs_num": 2}
    own = {name: {**each, "max_new_tokens": 6} for name, each in params.items()}
    for each in own.values():
        each["min_new_tokens"] = min(each.get("min_new_tokens", 0), 4)
    plain = [client.alone([p], sampling_params=own[p.name], **ask)[0] for p in prompts]
    faults = {name: {**each, **forced([2])} for name, each in own.items()}
    one = [client.alone([p], sampling_params=faults[p.name], **ask)[0] for p in prompts]
    many = client.together(prompts, params=faults, **ask)
    assert_same(plain, one)
    assert_same(plain, many)
    for clean, left, right in zip(plain, one, many, strict=True):
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert left.meta[name][1] == right.meta[name][1]
        lists = (clean.meta["output_token_logprobs"], right.meta["output_token_logprobs"])
        for (wanted, *_), (found, *_) in zip(*lists, strict=True):
            assert found == pytest.approx(wanted, abs=0.25), "of another token, or another mask"
    assert sum(answer.meta["gate"]["flips"] for answer in many) >= len(prompts) // 2


def test_all_of_them_at_once_are_the_same(client, prompts):
    own = {
        prompts[0].name: {"regex": r"[a-z ]{20,60}\.", "repetition_penalty": 1.2},
        prompts[1].name: {"temperature": 0.9, "sampling_seed": 7, "frequency_penalty": 0.5},
        prompts[2].name: {"logit_bias": {"260": 3.0}, "presence_penalty": 1.0},
    }
    some = prompts[:3]
    reference = [client.alone([each], sampling_params=own[each.name])[0] for each in some]
    faults = {name: {**each, **forced([2, 7])} for name, each in own.items()}
    assert_same(reference, client.together(some, params=faults))
    assert_clean(client)


def test_seeded_draws_with_a_grammar_are_the_same(client, prompts):
    own = {"json_schema": json.dumps(SCHEMA), "temperature": 0.8, "sampling_seed": 5}
    some = prompts[:4]
    reference = client.alone(some, sampling_params=own)
    assert all(answer.meta["gate"]["gated"] for answer in reference)
    assert_same(reference, client.together(some, sampling_params=own))


def test_the_openai_client_has_json_mode_and_penalties(client):
    """Streamed and at once; the schema goes where OpenAI's clients put it."""
    needs_the_whole_model()
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
    del asked["response_format"]
    plain = api.chat.completions.create(**asked)
    less = [api.chat.completions.create(**asked, frequency_penalty=1.5) for _ in range(2)]
    texts = [reply.choices[0].message.content for reply in (plain, *less)]
    assert texts[0] != texts[1] == texts[2]
    assert less[0].metadata["gate"][0]["gated"]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_grammar_that_its_backend_gives_up_on_ends_its_request_alone(client, ignore_eos):
    """Here llguidance does when its first mask is computed: nothing of it can be copied then.

    Ungated, end tokens follow each other where they are ignored; no pass could verify those.
    """
    ends = []
    for own in ({"deterministic": False}, {}, {}, forced([1]), forced([2])):
        params = {"temperature": 0, "max_new_tokens": 4, "ebnf": "root ::= root", **own}
        body = {"text": "case: ", "sampling_params": params | {"ignore_eos": ignore_eos}}
        reply = requests.post(f"{client.base_url}/generate", json=body, timeout=300).json()
        ends.append((reply["text"], reply["meta_info"]["finish_reason"]["type"]))
    assert ends[1:] == [("", "abort" if ignore_eos else "stop")] * 4
    assert ignore_eos or ends[0] == ends[1]
    assert_clean(client)
