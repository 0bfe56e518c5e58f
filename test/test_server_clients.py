"""Other ways in: `sglang serve`, completions, the frontend language; and pauses."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import openai
import pytest
import requests
from checks import assert_clean, assert_gate_worked, assert_same
from conftest import TOKENS

from margingate.client import Answer, Client

SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")


@pytest.fixture(scope="module")
def client(start) -> Client:
    """`sglang serve`, without a radix cache, and verifying every row."""
    args = ("--gate-debug", "--gate-policy", "always", "--disable-radix-cache")
    server = start(*args, command=SERVE)
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts, canonical) -> list[Answer]:
    return canonical(client, prompts)


def test_sglang_serve_verifying_always_without_a_radix_cache(client, prompts, alone):
    """`always` gives the text of `margin`, which `alone` comes from in a whole run."""
    before = client.gate_state()
    answers = client.together(prompts)
    assert_same(alone, answers)
    assert_gate_worked(before, client.gate_state(), batch=6)
    assert client.gate_state()["trigger_rate"] > 0.9
    assert all(answer.meta["cached_tokens"] == 0 for answer in answers)
    assert_clean(client)


def test_completions(client, prompts, alone):
    """/v1/completions, one request after the other, at once, and as one list of prompts."""
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")

    def complete(ids: list) -> list[str]:
        reply = api.completions.create(model="m", prompt=ids, temperature=0, max_tokens=TOKENS)
        return [choice.text for choice in reply.choices]

    ids = [list(prompt.input_ids) for prompt in prompts[:6]]
    texts = [answer.text for answer in alone[:6]]
    assert complete(ids[0]) == texts[:1]
    with ThreadPoolExecutor(len(ids)) as pool:
        assert list(chain.from_iterable(pool.map(complete, ids))) == texts
    assert complete(ids) == texts


def test_the_frontend_language(client):
    import sglang

    @sglang.function
    def two_turns(s, topic):
        s += sglang.user(f"Name a fact about {topic}.")
        s += sglang.assistant(sglang.gen("first", max_tokens=12, temperature=0))
        s += sglang.user("And another one?")
        s += sglang.assistant(sglang.gen("second", max_tokens=12, temperature=0))

    backend = sglang.RuntimeEndpoint(client.base_url)
    topics = [{"topic": topic} for topic in ("rivers", "bread", "ants", "glass")]
    apart = [two_turns.run(**topic, backend=backend) for topic in topics]
    batch = two_turns.run_batch(topics, backend=backend, num_threads=4)
    for name in ("first", "second"):
        assert [state[name] for state in apart] == [state[name] for state in batch]
        assert all(state[name] for state in apart)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_answer(client, prompts, alone, mode):
    def post(path: str, **body: str) -> None:
        requests.post(f"{client.base_url}/{path}", json=body).raise_for_status()

    before = client.gate_state()
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(client.together, prompts)
        while client.gate_state()["steps"] < before["steps"] + 40:
            time.sleep(0.2)
        post("pause_generation", mode=mode)
        time.sleep(1)
        assert not answers.done(), "nothing was paused"
        post("continue_generation")
        assert_same(alone, answers.result())
    after = client.gate_state()
    assert (after["retractions"] > before["retractions"]) is (mode == "retract")
    assert_clean(client)
