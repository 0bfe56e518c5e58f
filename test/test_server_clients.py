"""Other ways in: `sglang serve`, OpenAI's routes, the frontend language; pauses and updates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from checks import assert_clean, assert_gate_worked, assert_same
from conftest import TOKENS

from margingate.harness.client import Answer, Client

EXAMPLES = Path(__file__).parents[1] / "examples"
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


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("openai_client", ["--tokens", "12"], "alone, in company, streamed: the same"),
        ("frontend_program", ["--tokens", "8"], "'because': 'deterministic is false'"),
        ("evaluation", ["--questions", "5", "--tokens", "16"], "\nidentical"),
    ],
)
def test_an_example_runs_as_it_stands(client, name, options, said):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--base-url", client.base_url, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert said in done.stdout, done.stdout


@pytest.fixture(scope="module")
def fingerprint(client) -> str:
    found: str = client.gate_state()["fingerprint"]
    assert len(found) == 16
    return found


def test_the_record_in_chat_completions(client, fingerprint):
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)

    def ask(**more) -> Any:
        messages = [{"role": "user", "content": "Name two rivers."}]
        options = {"model": "m", "temperature": 0, "max_tokens": 8, **more}
        return api.chat.completions.create(messages=messages, **options)

    whole = ask(n=2)
    records = whole.model_extra["metadata"]["gate"]
    assert whole.system_fingerprint == fingerprint
    assert [record["steps"] for record in records] == [8, 8]
    chunks = list(ask(stream=True, n=2, stream_options={"include_usage": True}))
    ends = [chunk for chunk in chunks if "metadata" in (chunk.model_extra or {})]
    assert [chunk.choices[0].finish_reason for chunk in ends] == ["length", "length"]
    for chunk in ends:
        assert chunk.system_fingerprint == fingerprint
        assert [record["steps"] for record in chunk.model_extra["metadata"]["gate"]] == [8]
    assert chunks[-1].usage.completion_tokens == 16
    for opted_out in ({"deterministic": False}, {"custom_params": {"deterministic": False}}):
        said = ask(extra_body=opted_out)
        assert said.model_extra["metadata"]["gate"][0]["because"] == "deterministic is false"
        assert said.system_fingerprint is None
    with pytest.raises(openai.BadRequestError, match="is 'no': give true or false"):
        ask(extra_body={"deterministic": "no"})


def test_the_record_in_completions(client, fingerprint):
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    options = {"model": "m", "prompt": "Rivers:", "temperature": 0, "max_tokens": 8}
    whole = api.completions.create(**options)
    *_, last = api.completions.create(**options, stream=True)
    for answer in (whole, last):
        (record,) = answer.model_extra["metadata"]["gate"]
        assert (record["gated"], record["steps"]) == (True, 8)
        assert answer.system_fingerprint == record["fingerprint"] == fingerprint
    said = api.completions.create(**options, extra_body={"deterministic": False})
    assert said.model_extra["metadata"]["gate"][0]["gated"] is False
    with pytest.raises(openai.BadRequestError, match="is 1: give true or false"):
        api.completions.create(**options, extra_body={"deterministic": 1})


def test_the_switch_as_a_sampling_parameter(client, prompts):
    (answer,) = client.alone(prompts[:1], sampling_params={"deterministic": False})
    said = answer.meta["gate"]
    assert (said["gated"], said["because"]) == (False, "deterministic is false")
    assert len(said["prompt"]) == 16
    with pytest.raises(RuntimeError, match=r"answered 400: .*is 'no': give true or false"):
        client.alone(prompts[:1], sampling_params={"deterministic": "no"})


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


def test_the_fingerprint_follows_the_weights(client, prompts, alone, model, fingerprint):
    """Read from disk again: it is gone until the next request, and then the same as before."""
    update = {"model_path": str(model), "weight_version": "again"}
    url = f"{client.base_url}/update_weights_from_disk"
    assert requests.post(url, json=update, timeout=120).json()["success"]
    state = client.gate_state()
    assert state["fingerprint"] is None
    assert state["fingerprint_because"].startswith("the weights were updated")
    answers = client.alone(prompts[:1])
    assert_same(alone, answers)
    assert answers[0].meta["gate"]["fingerprint"] == fingerprint
    assert client.gate_state()["fingerprint"] == fingerprint


def lines(reply: requests.Response) -> list[dict[str, Any]]:
    """The JSON objects of a stream: lines of their own, or data of events."""
    found = [line.removeprefix(b"data: ") for line in reply.content.splitlines()]
    return [json.loads(line) for line in found if line.startswith(b"{")]


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_stream_says_what_the_answer_says_on_every_route(client, tokens):
    """Ollama's and Anthropic's routes are held to chat completions, streamed and not."""
    chat = {"model": "m", "messages": [{"role": "user", "content": "Name two rivers."}]}
    greedy = {"temperature": 0, "max_tokens": tokens}
    ollama = {"options": {"temperature": 0, "num_predict": tokens, "seed": 7}}

    def ask(path: str, stream: bool, **body: Any) -> requests.Response:
        reply = requests.post(client.base_url + path, json={**body, "stream": stream}, timeout=300)
        assert reply.status_code == 200, reply.text
        return reply

    whole = ask("/v1/chat/completions", False, **chat, **greedy).json()
    want = whole["choices"][0]["message"]["content"]
    assert ask("/api/chat", False, **chat, **ollama).json()["message"]["content"] == want
    *_, end = said = lines(ask("/api/chat", True, **chat, **ollama))
    assert "".join(line["message"]["content"] for line in said) == want
    assert (end["done_reason"], end["gate"]["gated"]) == ("length", True)
    message = ask("/v1/messages", False, **chat, **greedy).json()
    assert message["content"][0]["text"] == want
    assert message["metadata"]["gate"]["fingerprint"] == whole["system_fingerprint"]
    events = lines(ask("/v1/messages", True, **chat, **greedy))
    deltas = [x["delta"]["text"] for x in events if x["type"] == "content_block_delta"]
    assert "".join(deltas) == want
    (end,) = [x for x in events if x["type"] == "message_delta"]
    assert end["metadata"]["gate"]["prompt"] == message["metadata"]["gate"]["prompt"]


def test_text_of_several_tokens_at_once_is_said_once(client):
    params = {"temperature": 0, "max_new_tokens": 24, "regex": "今日は😀", "stream_interval": 3}
    body = {"text": "Say it: ", "sampling_params": params, "stream": True}
    reply = requests.post(f"{client.base_url}/generate", json=body, timeout=300)
    assert lines(reply)[-1]["text"] == "今日は😀"
