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
from routes import CHATS, ROUTES, Said, events, served_model

from margingate.core.choice_seeds import choice_seed
from margingate.harness.client import Answer, Client, Prompt

EXAMPLES = Path(__file__).parents[1] / "examples"
FAULTS = {"gate_fault_rows": [2, 3, 7]}
SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")


@pytest.fixture(scope="module")
def client(start) -> Client:
    """`sglang serve`, without a radix cache, and verifying every row, some later than others."""
    args = ("--gate-debug", "--gate-policy", "always", "--disable-radix-cache")
    server = start(*args, "--gate-inject-faults", "--gate-max-delay", "8", command=SERVE)
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
        ("openai_client", ["--tokens", "12"], "alone, in a batch, streamed: the same"),
        ("frontend_program", ["--tokens", "8"], "'because': 'deterministic is false'"),
        ("evaluation", ["--questions", "5", "--tokens", "16"], "\nidentical"),
        (
            "trainer",
            ["--steps", "1", "--group", "2", "--tokens", "6", "--layers", "1"],
            "\nthe first weights again: 8 of 8 samples as at first\neach sample has",
        ),
    ],
)
def test_an_example_runs_as_it_stands(client, name, options, said):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--base-url", client.base_url, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
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
def test_a_pause_changes_no_answer(client, model, prompts, alone, mode):
    def post(path: str, **body: str) -> None:
        requests.post(f"{client.base_url}/{path}", json=body).raise_for_status()

    before = client.gate_state()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):  # on a fast machine all answers may come before the pause does
            made = client.gate_state()["steps"]
            answers = pool.submit(client.together, prompts)
            while client.gate_state()["steps"] < made + 40 and not answers.done():
                pass
            post("pause_generation", mode=mode)
            if client.gate_state()["open"] == len(prompts):
                break
            post("continue_generation")
            assert_same(alone, answers.result())
        time.sleep(1)
        assert not answers.done(), "nothing was paused"
        try:
            if mode == "retract":  # requests that wait hold no columns, so the flush succeeds
                update = {"model_path": str(model)}
                url = f"{client.base_url}/update_weights_from_disk"
                updated = requests.post(url, json=update, timeout=120)
        finally:
            post("continue_generation")
        assert_same(alone, found := answers.result())
    if mode == "retract":
        assert updated.status_code == 200 and updated.json()["success"]
        said = [answer.meta["gate"] for answer in found]
        assert all(gate["fingerprint"] is None for gate in said), "served across the change"
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


# Characters of several tokens, and of several code points.
SAYINGS = (
    "今日は😀",
    "नमस्ते दुनिया",
    "مرحبا بالعالم",
    "שלום, Привет",
    "👩‍👩‍👧‍👦 🇩🇪",
    "e\u0301a\u0308 n\u0303 ok",
    "한국어 สวัสดี",
)
Asked = tuple[str, str, int, dict[str, Any]]  # route, prompt, tokens at most, parameters


def assert_streams_say_the_same(client: Client, asked: list[Asked], **streamed: Any) -> list[Said]:
    """Asks all at once, each whole and streamed; returns what was said whole.

    Args:
        streamed: parameters of the streams alone.
    """

    def ask(question: Asked, stream: bool) -> Said:
        path, prompt, tokens, own = question
        more = {**own, **streamed} if stream else own
        return ROUTES[path].ask(client.base_url, prompt, tokens, stream, **more)

    with ThreadPoolExecutor(24) as pool:
        both = [[pool.submit(ask, each, stream) for stream in (False, True)] for each in asked]
        answers = [(whole.result(), said.result()) for whole, said in both]
    for question, (whole, said) in zip(asked, answers, strict=True):
        assert (said.text, said.end) == (whole.text, whole.end), question
        for record in (whole.gate, said.gate):
            assert record["gated"] and record["fingerprint"] == whole.gate["fingerprint"]
            assert record["prompt"] == whole.gate["prompt"]
    return [whole for whole, _ in answers]


@pytest.mark.parametrize("interval", [1, 3])
def test_constrained_texts_of_many_scripts_are_said_once(client, interval):
    """Whole, cut within a character, and ended by a stop string; flips within characters."""
    asked: list[Asked] = []
    paths = [path for path, route in ROUTES.items() if route.regex]
    for path in paths if interval == 1 else ["/generate"]:
        for saying in SAYINGS:
            asked.append((path, "Say it: ", 64, {"regex": saying}))
            asked.append((path, "Say it: ", 5, {"regex": saying}))
            asked.append((path, "Say it: ", 64, {"regex": saying + "STOP", "stop": ["STOP"]}))
    more = {} if interval == 1 else {"stream_interval": interval}
    answers = assert_streams_say_the_same(client, asked, custom_params=FAULTS, **more)
    for (*_, tokens, own), said in zip(asked, answers, strict=True):
        if tokens > 5:
            assert (said.text, said.end) == (own["regex"].removesuffix("STOP"), "stop")
        else:
            assert said.end == "length"
    assert_clean(client)


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_stream_says_what_the_answer_says_on_every_route(client, fingerprint, tokens):
    prompts = [f"{saying} " * 6 for saying in SAYINGS[::2]]
    asked = [(path, prompt, tokens, {}) for prompt in prompts for path in ROUTES]
    answers = assert_streams_say_the_same(client, asked)
    assert {said.gate["fingerprint"] for said in answers} == {fingerprint}
    chats = [said.text for (path, *_), said in zip(asked, answers, strict=True) if path in CHATS]
    for start in range(0, len(chats), len(CHATS)):
        assert len(set(chats[start : start + len(CHATS)])) == 1, "one prompt, one template"
    assert tokens == 1 or any(not said.text.isascii() for said in answers)


@pytest.mark.parametrize("path", ROUTES)
def test_the_switch_on_every_route(client, path):
    route = ROUTES[path]
    for stream in (False, True):
        said = route.ask(client.base_url, "Rivers:", 4, stream, deterministic=False)
        assert said.gate["because"] == "deterministic is false"
        reply = route.post(client.base_url, "Rivers:", 4, stream, deterministic="no")
        assert reply.status_code == 400 or (stream and path == "/generate"), "SGLang's own"
        assert "custom_params.deterministic is 'no': give true or false." in reply.text


def test_openai_and_ollama_clients_reach_record_and_switch(client, fingerprint):
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"temperature": 0, "max_output_tokens": 10}
    asked |= {"model": served_model(client.base_url), "input": "Name two rivers."}
    whole = api.responses.create(**asked, metadata={"mine": "1"})
    assert json.loads(whole.metadata["gate"])["fingerprint"] == fingerprint
    assert whole.metadata["mine"] == "1"
    *_, end = api.responses.create(**asked, stream=True)
    assert end.response.output_text == whole.output_text
    assert json.loads(end.response.metadata["gate"])["steps"] == 8
    said = api.responses.create(**asked, extra_body={"deterministic": False})
    assert json.loads(said.metadata["gate"])["gated"] is False
    options = {"temperature": 0, "num_predict": 4, "deterministic": False}
    body = {"model": "m", "prompt": "Rivers:", "stream": False, "options": options}
    reply = requests.post(f"{client.base_url}/api/generate", json=body, timeout=300)
    assert reply.json()["gate"]["because"] == "deterministic is false"


EIGHT = {"max_new_tokens": 8}
DRAWN = {"temperature": 0.8, "max_tokens": 8, "seed": 4711}
Choices = list[tuple[str, int]]  # text and seed of each choice


def choices_of(client: Client, path: str, stream: bool, **more: Any) -> Choices:
    """On one of OpenAI's two routes, by index."""
    body = {"model": "m", "stream": stream, **DRAWN, **more}
    if path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    reply = requests.post(client.base_url + path, json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    texts: dict[int, str] = {}
    seeds: dict[int, int] = {}
    for part in events(reply) if stream else [reply.json()]:
        records = iter((part.get("metadata") or {}).get("gate", ()))
        for choice in part["choices"]:
            said = choice.get("delta") or choice.get("message") or choice
            index, text = choice["index"], said.get("content") or said.get("text") or ""
            texts[index] = texts.get(index, "") + text
            if choice["finish_reason"]:
                seeds[index] = next(records)["seed"]
    return [(texts[i], seeds[i]) for i in range(len(texts))]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_choices_with_a_seed_are_single_requests_with_theirs(client, prompts, path):
    said = [f"{saying} " * 4 for saying in SAYINGS[:2]]
    alone = [choices_of(client, path, stream=False, prompt=text, n=4) for text in said]
    with ThreadPoolExecutor(24) as pool:
        streamed = [pool.submit(choices_of, client, path, True, prompt=t, n=4) for t in said]
        others = pool.submit(client.together, prompts[:3])
        again = [pool.submit(choices_of, client, path, False, prompt=t, n=4) for t in said]
        assert [each.result() for each in (*streamed, *again)] == alone * 2
        singles = [
            pool.submit(choices_of, client, path, i % 2 == 0, prompt=text, seed=seed)
            for text, found in zip(said, alone, strict=True)
            for i, (_, seed) in enumerate(found)
        ]
        assert [each.result() for each in singles] == [[one] for found in alone for one in found]
        others.result()
    for found in alone:
        assert [seed for _, seed in found] == [choice_seed(DRAWN["seed"], i) for i in range(4)]
        assert len({text for text, _ in found}) > 2  # of few tokens; two may be alike on some CPU
    if path == "/v1/completions":
        assert choices_of(client, path, False, prompt=said, n=4) == list(chain(*alone))


def test_choices_of_a_list_of_prompts_with_a_seed_each(client, prompts):
    """/generate: in one request, streamed, in a batch of its own, and each choice alone."""
    chosen = [list(prompt.input_ids) for prompt in prompts[:2]]
    own = [{"temperature": 0.8, "max_new_tokens": 8, "sampling_seed": s, "n": 3} for s in (5, 6)]

    def ask(stream: bool = False, **body: Any) -> list[Any]:
        body |= {"stream": stream, "return_logprob": True}
        reply = requests.post(f"{client.base_url}/generate", json=body, timeout=300)
        parts = events(reply) if stream else reply.json()
        last = {part.get("index", i): part for i, part in enumerate(parts)}
        return [drawn(last[i]) for i in range(len(last))]

    def drawn(part: dict[str, Any]) -> Any:
        meta = part["meta_info"]
        return part["output_ids"], meta["output_token_logprobs"], meta["gate"]["seed"]

    found = ask(input_ids=chosen, sampling_params=own)
    assert [seed for *_, seed in found] == [choice_seed(s, i) for s in (5, 6) for i in range(3)]
    assert len({tuple(ids) for ids, *_ in found}) == 6
    assert ask(stream=True, input_ids=chosen, sampling_params=own) == found
    assert ask(stream=True, input_ids=chosen[0], sampling_params=own[0]) == found[:3]
    for i, (*_, seed) in enumerate(found):
        params = {**own[0], "sampling_seed": seed, "n": 1}
        assert ask(input_ids=[chosen[i // 3]], sampling_params=params) == [found[i]]
    assert_clean(client)


def test_scored_prompts_in_one_list_are_those_of_single_requests(client, prompts):
    """As lm-evaluation-harness sends them with a batch size; SGLang refuses `max_tokens` 0."""
    url = f"{client.base_url}/v1/completions"
    ids = [list(prompt.input_ids[-20 - i :]) for i, prompt in enumerate(prompts[:4])]
    body = {"model": "m", "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}

    def ask(asked: Any, tokens: int = 1) -> Any:
        return requests.post(url, json={**body, "prompt": asked, "max_tokens": tokens}, timeout=300)

    single = [ask(each).json()["choices"][0]["logprobs"] for each in ids]
    assert [len(found["token_logprobs"]) for found in single] == [21, 22, 23, 24]
    listed = ask(ids).json()
    assert [choice["logprobs"] for choice in listed["choices"]] == single
    assert {record["scores"] for record in listed["metadata"]["gate"]} == {"as_prefilled"}
    assert ask(ids[0], tokens=0).status_code == 400


def test_token_ids_of_a_chat_go_in_and_out(client):
    """Whole and streamed with flips: they are those of /generate, and the next turn takes them."""
    url = f"{client.base_url}/v1/chat/completions"
    messages = [{"role": "user", "content": "Name two rivers."}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 8}
    ids: list[int] | None = None
    for _ in range(2):
        asked = body if ids is None else {**body, "input_ids": ids}
        whole = requests.post(url, json={**asked, "return_token_ids": True}, timeout=300)
        (choice,) = whole.json()["choices"]
        assert ids is None or choice["prompt_token_ids"] == ids
        prompt, said = choice["prompt_token_ids"], choice["response_token_ids"]
        [answer] = client.alone([Prompt("chat", tuple(prompt))], sampling_params=EIGHT)
        assert list(answer.tokens) == said and len(said) == 8
        beside = dict.fromkeys(("return_input_ids_in_sglext", "return_output_ids_in_sglext"), True)
        more = {**beside, "stream": True, "custom_params": FAULTS}
        streamed = events(requests.post(url, json={**asked, **more}, timeout=300))
        (found,) = [part["sglext"] for part in streamed if part.get("sglext")]
        assert (found["input_ids"], found["output_ids"]) == (prompt, [said])
        ids = [*prompt, *said, *prompt]
