"""The gated server, all defaults: the same tokens whatever else is in the batch."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import requests
import zmq
from checks import (
    assert_clean,
    assert_gate_worked,
    assert_same,
    forced,
    needs_the_whole_model,
)
from conftest import TOKENS

from margingate import api
from margingate.events import AnyRecord, End, Flag, Subscriber, Verdict
from margingate.harness.client import Answer, Client, Prompt, chat_prompts
from margingate.harness.servers import Server, free_port, slow_bfloat16


@pytest.fixture(scope="module")
def endpoint(ports) -> str:
    return f"tcp://127.0.0.1:{free_port(ports)}"


@pytest.fixture(scope="module")
def server(start, endpoint) -> Server:
    return start("--gate-debug", "--gate-inject-faults", "--gate-events-endpoint", endpoint)


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts, canonical) -> list[Answer]:
    client.flush()
    return canonical(client, prompts)


def test_batched_and_shuffled(client, prompts, alone):
    for seed in range(3):
        client.flush()
        before = client.gate_state()
        order = random.Random(seed).sample(prompts, len(prompts))
        assert_same(alone, client.together(order))
        assert_gate_worked(before, client.gate_state(), batch=6)
    assert_clean(client)


def test_random_arrival_with_prefixes_of_others_cached(client, prompts, alone):
    delays = [random.Random(7).uniform(0, 4) for _ in prompts]
    assert_same(alone, client.together(prompts, delays_s=delays))  # cold
    answers = client.together(prompts, delays_s=delays[::-1])  # every full chunk is cached
    assert_same(alone, answers)
    long = [a for a in answers if a.meta["prompt_tokens"] > 64]
    assert long and all(answer.meta["cached_tokens"] % 64 == 0 for answer in answers)
    assert all(answer.meta["cached_tokens"] > 0 for answer in long)


def test_what_meta_info_says(client, prompts):
    answers = client.together(prompts)
    gates = [answer.meta["gate"] for answer in answers]
    assert all(gate["gated"] and gate["steps"] >= len(a.tokens) for gate, a in zip(gates, answers))
    assert sum(gate["flagged"] for gate in gates) > 0
    assert sum(gate["verified"] for gate in gates) > sum(gate["flagged"] for gate in gates)
    opted_out = client.alone(
        prompts[:1], sampling_params={"custom_params": {"deterministic": False}}
    )
    said = opted_out[0].meta["gate"]
    assert (said["gated"], said["because"]) == (False, "deterministic is false")
    assert len(said["prompt"]) == 16
    state = {*client.gate_state(), "fingerprint_because"}  # the last one only where there is none
    assert state == {entry.name for entry in (*api.SERVER, *api.COUNTS)}


def stream(client: Client, prompt: Prompt, **params) -> tuple[list[str], dict]:
    """The texts of a stream's chunks, and its last chunk."""
    body = {
        "input_ids": prompt.input_ids,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, **params},
    }
    chunks = []
    with requests.post(f"{client.base_url}/generate", json=body, stream=True) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                chunks.append(json.loads(line[6:]))
    return [chunk["text"] for chunk in chunks], chunks[-1]


def assert_streams_to(client: Client, prompt: Prompt, answer: Answer, **params) -> dict:
    """A stream only ever grows, and ends with the answer."""
    for _ in range(5):  # SGLang joins the chunks that wait while its web server is stopped
        texts, last = stream(client, prompt, **params)
        assert all(later.startswith(text) for text, later in zip(texts, texts[1:]))
        assert texts[-1] == answer.text
        assert tuple(last["output_ids"]) == answer.tokens
        if len(texts) > 2:
            break
    assert len(texts) > 2
    return last["meta_info"]["gate"]


@pytest.mark.parametrize("place", ["first", "second", "several", "last", "end"])
def test_forced_flip(client, model, prompts, alone, place):
    [prompt], [clean] = prompts[:1], alone[:1]
    if place == "end":
        needs_the_whole_model()
        [prompt] = chat_prompts([("short", "What is the capital of France?")], model)
        [clean] = client.alone([prompt])
    assert clean.meta["finish_reason"]["type"] == ("stop" if place == "end" else "length")
    length = len(clean.tokens)
    rows = {"first": [1], "second": [2], "several": [3, 4, 9, 20]}.get(place, [length])
    answer = client.alone([prompt], sampling_params=forced(rows))[0]
    assert_same([clean], [answer])
    assert answer.meta["finish_reason"] == clean.meta["finish_reason"]
    assert answer.meta["gate"]["flips"] >= len(rows)
    gate = assert_streams_to(client, prompt, clean, **forced(rows))
    assert gate["flips"] >= len(rows)


def test_forced_flip_inside_a_multi_byte_character(client, model):
    from transformers import AutoTokenizer

    needs_the_whole_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    smileys = tokenizer("😀" * 12)["input_ids"]  # the model goes on with them
    prompt = Prompt("smileys", tuple(smileys))
    [answer] = client.alone([prompt])
    inside = [
        row
        for row in range(1, len(answer.tokens))
        if tokenizer.decode(answer.tokens[:row]).endswith("\ufffd")
    ]
    assert len(inside) >= 2, f"no multi-byte character in {answer.text!r}"
    rows = [inside[0], inside[-1] + 1]
    gate = assert_streams_to(client, prompt, answer, **forced(rows))
    assert gate["flips"] >= 2


def test_forced_flips_in_a_batch_with_shared_prefixes(client, prompts, alone):
    twice = [p for p in prompts[:6] for _ in range(2)]
    answers = client.together(twice, sampling_params=forced([2, 5, 6, 17]))
    assert_same(alone, answers)
    assert sum(answer.meta["gate"]["flips"] for answer in answers) >= 2 * len(twice)
    assert_clean(client)


def until_the_end(subscriber: Subscriber, rid: str) -> list[AnyRecord]:
    """The records of one request, up to and with its end; none of the messages may be lost."""
    records: list[AnyRecord] = []
    while not (records and isinstance(records[-1], End)):
        received = subscriber.receive(20)
        assert received and not received.lost
        records += [r for r in received.message.records if getattr(r, "rid", None) == rid]
    return records


def test_forced_flips_are_events(client, endpoint, prompts, alone):
    with Subscriber(endpoint) as subscriber:
        assert subscriber.receive(10), "a server sends its sums to whoever subscribes"
        [answer] = client.alone(prompts[:1], sampling_params=forced([3, 9]), rid="watched")
        *records, end = until_the_end(subscriber, "watched")
    injected = [r.row for r in records if isinstance(r, Flag) and r.reason == "injected"]
    flips = [r for r in records if isinstance(r, Verdict) and r.outcome == "flip"]
    assert injected == [3, 9] and {3, 9} <= {flip.row for flip in flips}
    for flip in flips:
        assert flip.verified == answer.tokens[flip.row - 1] == alone[0].tokens[flip.row - 1]
        assert flip.token != flip.verified and flip.repaired and flip.rolled_back >= 1
    assert end.finish == "length" and end.tokens == len(answer.tokens)
    gate = answer.meta["gate"]
    assert all(gate[name] == count for name, count in end.counts.items() if name != "settle_s")
    assert gate["flips"] == len(flips)


def test_a_subscriber_that_never_reads_changes_nothing(client, endpoint, prompts, alone):
    with zmq.Context() as context, context.socket(zmq.SUB) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.SUBSCRIBE, b"")
        lazy.connect(endpoint)
        assert lazy.poll(10_000), "it is subscribed"
        before = client.gate_state()
        assert_same(alone, client.together(prompts))
        assert_gate_worked(before, client.gate_state(), batch=6)


def memory_mib(server: Server) -> float:
    """Of all processes of the server, together."""
    launcher = psutil.Process(server.pid)
    found = [launcher, *launcher.children(recursive=True)]
    return sum(process.memory_info().rss for process in found) / 2**20


def test_a_subscriber_to_many_topics_takes_no_memory(server, client, endpoint, prompts, alone):
    """libzmq kept 51 MB for 60,000 topics; such a subscriber is disconnected, again and again."""
    assert_same(alone, client.together(prompts))  # what such a batch takes, it has taken
    before, told = memory_mib(server), "topics are subscribed to at"
    with zmq.Context() as context, context.socket(zmq.SUB) as greedy:
        greedy.setsockopt(zmq.LINGER, 0)
        for topic in range(60_000):
            greedy.setsockopt(zmq.SUBSCRIBE, b"topic-%06d" % topic + b"x" * 200)
        greedy.connect(endpoint)
        deadline = time.monotonic() + 60
        while told not in server.log.read_text(errors="replace"):
            assert time.monotonic() < deadline, "its topics did not come"
            time.sleep(0.05)
        assert_same(alone, client.together(prompts))
    assert memory_mib(server) - before < 25
    with Subscriber(endpoint) as subscriber:
        deadline = time.monotonic() + 60
        while not (heard := subscriber.receive(2)) and time.monotonic() < deadline:
            client.alone(prompts[:1])
    assert heard, "others are told again"


def test_a_polled_server_info_does_not_check_every_slot_each_time(client, prompts, alone):
    """It would on the scheduler's thread; an answer is what it was beside 200 of them."""
    most = 0
    with ThreadPoolExecutor(1) as pool:
        for _ in range(5):  # were one of the two stopped for seconds, few polls would meet answers
            answers = pool.submit(client.together, prompts)
            polls = 0
            while not answers.done():
                assert client.gate_state()["integrity"] == "ok"
                polls += 1
            assert_same(alone, answers.result())
            most = max(most, polls)
            if most > 5:
                break
    assert most > 5


def test_stop_string_and_n(client, prompts, alone):
    word = alone[0].text.split()[3]
    stopped = client.alone(prompts[:1], sampling_params={"stop": [word]})[0]
    assert stopped.meta["finish_reason"]["matched"] == word
    row = len(stopped.tokens)
    again = client.alone(prompts[:1], sampling_params={"stop": [word], **forced([row])})[0]
    assert (again.text, again.tokens) == (stopped.text, stopped.tokens)
    assert_streams_to(client, prompts[0], stopped, stop=[word], **forced([row]))
    body = {
        "input_ids": prompts[1].input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "n": 3},
    }
    replies = requests.post(f"{client.base_url}/generate", json=body).json()
    assert [tuple(r["output_ids"]) for r in replies] == [alone[1].tokens] * 3


def test_logprobs_hot_and_cold(client):
    """SGLang's radix-cache check, with ids that are in this model's vocabulary."""
    ids = [int(i) for i in np.random.default_rng(3).integers(300, 49000, 64 + 9)]
    [first] = client.alone([Prompt("ids", tuple(ids))])
    longer = Prompt("longer", (*ids, *first.tokens))
    ask = {"return_logprob": True, "top_logprobs_num": 3}
    hot, cold = [], []
    for readings, flush in ((hot, False), (cold, True)):
        if flush:
            client.flush()
        answer = client.alone([longer], sampling_params={"max_new_tokens": 8}, **ask)[0]
        readings += [answer.tokens, answer.meta["output_token_logprobs"]]
        readings += [answer.meta["output_top_logprobs"]]
        assert (answer.meta["cached_tokens"] > 0) is not flush
    assert hot == cold


def test_one_request_of_a_batch_wants_log_probs_of_given_tokens(client, prompts, alone):
    """SGLang's scheduler ends there."""
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(client.together, prompts[1:5])
        ask = {"return_logprob": True, "token_ids_logprob": [5, 260]}
        [asked] = pool.submit(client.alone, prompts[:1], **ask).result()
    assert_same(alone, [asked, *others.result()])
    found = asked.meta["output_token_ids_logprobs"]
    assert [[entry[1] for entry in row] for row in found] == [[5, 260]] * TOKENS
    assert all(entry[0] < 0 for row in found for entry in row)


ASK_SCORES = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5, 260]}


def scores_of(answer: Answer) -> list[Any]:
    kinds = ("token", "top", "token_ids")
    return [answer.meta[f"{side}_{k}_logprobs"] for side in ("input", "output") for k in kinds]


def test_logprobs_of_a_prompt_alone_and_together(client, prompts, alone):
    """They come from a forward, not from the cache: SGLang computes a prompt anew from there."""
    ask = {"return_logprob": True, "logprob_start_len": 2}
    first = client.alone(prompts[:3], **ask)
    again = client.together(prompts[:3], **ask)
    assert_same(alone, [*first, *again])
    for prompt, one, other in zip(prompts, first, again, strict=False):
        found = one.meta["input_token_logprobs"]
        assert [entry[1] for entry in found] == list(prompt.input_ids[2:])
        assert found == other.meta["input_token_logprobs"]
        assert one.meta["gate"]["scores"] == client.gate_state()["scores"] == "as_prefilled"
    assert all("scores" not in answer.meta["gate"] for answer in alone)


def test_scores_cold_in_company_and_cached(client, prompts, alone):
    """Of two to three chunks of the grid: nothing is generated, whatever the temperature."""
    ids = [token for prompt in prompts for token in prompt.input_ids]
    long = [Prompt(f"long {i}", tuple(ids[i : i + 580 + i])) for i in (0, 7, 90)]
    drawn = {"temperature": 0.6, "max_new_tokens": 0}
    ask = {**ASK_SCORES, "logprob_start_len": 300, "sampling_params": drawn}
    cold = []
    for prompt in long:
        client.flush()
        cold += client.alone([prompt], **ask)
    client.flush()
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(client.together, prompts[:5])
        company = pool.submit(client.together, long, **ask).result()
        assert_same(alone, others.result())
    cached = client.alone(long, **ask)
    assert all(answer.meta["cached_tokens"] == 256 for answer in cached)
    for prompt, *found in zip(long, cold, company, cached, strict=True):
        assert [entry[1] for entry in found[0].meta["input_token_logprobs"]] == [
            *prompt.input_ids[300:]
        ]
        for answer in found:
            assert scores_of(answer) == scores_of(found[0])
            record = answer.meta["gate"]
            assert (record["gated"], record["scores"], answer.tokens) == (True, "as_prefilled", ())
    assert_clean(client)


def test_scores_of_openai_routes_are_those_of_generate(client, prompts):
    ids = list(prompts[0].input_ids)
    [scored] = client.alone(
        prompts[:1], **ASK_SCORES, logprob_start_len=0, sampling_params={"max_new_tokens": 1}
    )
    asked = {"model": "m", "prompt": ids, "echo": True, "logprobs": 2, "max_tokens": 1}
    reply = requests.post(f"{client.base_url}/v1/completions", json={**asked, "temperature": 0})
    assert reply.json()["metadata"]["gate"][0]["scores"] == "as_prefilled"
    found = reply.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert found[: len(ids)] == [entry[0] for entry in scored.meta["input_token_logprobs"]]
    body = {"model": "m", "query": ids, "items": [[260], [270]], "label_token_ids": [5, 260]}
    one, other = (requests.post(f"{client.base_url}/v1/score", json=body) for _ in range(2))
    alike, unlike = (
        requests.post(f"{client.base_url}/v1/score", json={**body, "deterministic": said})
        for said in (True, False)
    )
    assert alike.status_code == 200 and unlike.status_code == 400
    assert "deterministic is false, but requests of this route" in unlike.text
    [label] = client.alone(
        [Prompt("item", (*ids, 260))], **ASK_SCORES, sampling_params={"max_new_tokens": 0}
    )
    expected = [np.exp(entry[0]) for entry in label.meta["output_token_ids_logprobs"][0]]
    assert one.json()["scores"] == other.json()["scores"]
    np.testing.assert_allclose(one.json()["scores"][0], expected, rtol=1e-6)


def test_logprobs_after_forced_flips(client, prompts, alone):
    [clean] = client.alone(prompts[2:3], return_logprob=True)
    [mended] = client.alone(prompts[2:3], return_logprob=True, sampling_params=forced([1, 4, 9]))
    assert_same(alone, [clean, mended])
    clean_ids = [entry[1] for entry in clean.meta["output_token_logprobs"]]
    mended_ids = [entry[1] for entry in mended.meta["output_token_logprobs"]]
    assert clean_ids == mended_ids == list(clean.tokens)
    assert all(entry[0] <= 0 for entry in mended.meta["output_token_logprobs"])


@pytest.mark.parametrize("mode", ["single", "prefix"])
def test_sglangs_own_determinism_test(client, mode):
    port = client.base_url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "sglang.test.test_deterministic", "--port", port]
    command += ["--test-mode", mode, "--n-trials", "5", "--max-new-tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    # It draws the prefix of each sample at random: one of the four may come out with no sample.
    counted = re.findall(r"otal samples: (\d+), Unique samples: (\d+)", done.stdout)
    unique = {unique for samples, unique in counted if samples != "0"}
    assert unique == {"1"}, done.stdout[-2000:]


def conversation(client: Client, tokenizer, opening: str, flush: bool) -> list[dict]:
    """Three turns; returns what came back for each."""
    messages, replies = [], []
    for text in (opening, "Say that again in one sentence.", "Now give an example."):
        messages.append({"role": "user", "content": text})
        if flush:
            client.flush()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = Prompt(text, tuple(tokenizer(ids, add_special_tokens=False)["input_ids"]))
        [answer] = client.alone([prompt], sampling_params={"max_new_tokens": 8})
        messages.append({"role": "assistant", "content": answer.text})
        replies.append({"tokens": answer.tokens, "cached": answer.meta["cached_tokens"]})
    return replies


TOPICS = (
    *("rivers", "prime numbers", "the moon", "bread", "music", "ants", "the Roman army", "glass"),
    *("tides", "chess", "volcanoes", "the alphabet", "bicycles", "salt", "kites", "the kidneys"),
)


def test_chats_of_three_turns_hot_cold_alone_and_batched(client, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    topics = TOPICS[::2] if slow_bfloat16() else TOPICS
    openings = [f"Explain in a few words what you know about {topic}." for topic in topics]
    cold = [conversation(client, tokenizer, text, flush=True) for text in openings]
    hot = [conversation(client, tokenizer, text, flush=False) for text in openings]
    before = client.gate_state()
    with ThreadPoolExecutor(len(openings)) as pool:
        batched = list(pool.map(lambda t: conversation(client, tokenizer, t, False), openings))
    assert_gate_worked(before, client.gate_state(), batch=6)
    for other in (hot, batched):
        for wanted, found in zip(cold, other):
            assert [turn["tokens"] for turn in wanted] == [turn["tokens"] for turn in found]
    assert all(turn["cached"] == 0 for turns in cold for turn in turns)
    assert all(turns[2]["cached"] > 0 for turns in hot)


SAMPLINGS = (
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.05},
)


def test_sampling_with_a_seed_alone_batched_and_after_flips(client, prompts, alone):
    """Beside greedy requests, and with log-probs, which must not see what they are batched with."""
    own = {
        prompt.name: {"sampling_seed": 1000 + i, "max_new_tokens": 16, **SAMPLINGS[i % 3]}
        for i, prompt in enumerate(prompts[:6])
    }
    ask = {"return_logprob": True, "top_logprobs_num": 2}
    seeded = [
        client.alone([prompt], sampling_params=own[prompt.name], **ask)[0] for prompt in prompts[:6]
    ]
    assert all(answer.meta["gate"]["gated"] for answer in seeded)
    assert sum(a.tokens != b.tokens[:16] for a, b in zip(seeded, alone)) >= 3, "greedy answers"
    before = client.gate_state()
    own |= {prompt.name: {} for prompt in prompts[6:]}
    mixed = client.together(prompts, params=own, **ask)
    assert_same([*seeded, *alone[6:]], mixed)
    assert_gate_worked(before, client.gate_state(), batch=6)
    flipped = client.together(
        prompts[:6], params={name: {**p, **forced([1, 3, 4, 16])} for name, p in own.items()}
    )
    assert_same(seeded, flipped)
    assert sum(answer.meta["gate"]["flips"] for answer in flipped) >= 12
    other = client.alone(prompts[:1], sampling_params={**own[prompts[0].name], "sampling_seed": 1})
    assert other[0].tokens != seeded[0].tokens
    assert_clean(client)


def test_openai_client(client, prompts):
    api = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none")
    ask = {
        "model": "default",
        "messages": [{"role": "user", "content": "Name three rivers."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = api.chat.completions.create(**ask).choices[0].message.content
    for _ in range(5):  # as in assert_streams_to
        streamed = api.chat.completions.create(**ask, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        if len(pieces) > 3:
            break
    ungated = api.chat.completions.create(
        **ask, extra_body={"custom_params": {"deterministic": False}}
    )
    assert "".join(pieces) == whole and len(pieces) > 3
    assert ungated.choices[0].message.content


BAD_REQUESTS = [
    ({"input_ids": [1, 2, 49152]}, "49152"),
    ({"input_ids": [1, -5]}, "-5"),
    ({"sampling_params": {"custom_params": {"deterministic": "yes"}}}, "deterministic"),
    ({"sampling_params": {"custom_params": {"gate_fault_rows": ["a"]}}}, "gate_fault_rows"),
    ({"sampling_params": {"frequency_penalty": 2.5}}, "frequency_penalty"),
    ({"sampling_params": {"temperature": 0.7, "sampling_seed": -1}}, "sampling_seed is -1"),
    ({"sampling_params": {"temperature": 0.7, "sampling_seed": 1 << 63}}, "sampling_seed is"),
    ({"sampling_params": {"temperature": 0.7, "sampling_seed": -5, "n": 2}}, "sampling_seed is -5"),
    ({"sampling_params": {"custom_params": [1]}}, "custom_params is [1]"),
    ({"sampling_params": {"custom_params": "x", "deterministic": True}}, "custom_params is"),
    ({"sampling_params": {"temperature": 0.7, "sampling_seed": "a"}}, "expected i64"),
    ({"sampling_params": {"min_new_tokens": -2}}, "min_new_tokens"),
    ({"return_hidden_states": True}, "hidden states"),
    ({"sampling_params": {"regex": "(a"}}, "regex"),
    ({"sampling_params": {"logit_bias": {"49152": 1.0}}}, "logit_bias"),
    ({"sampling_params": {"logit_bias": [1]}}, "expected a map"),
    ({"sampling_params": {"max_new_tokens": 1.5}}, "expected i64"),
    ({"sampling_params": {"temperature": 0.7, "top_k": 1 << 40}}, "top_k is"),
]


@pytest.mark.parametrize(("change", "named"), BAD_REQUESTS)
def test_bad_request_is_a_400_and_the_server_goes_on(client, prompts, alone, change, named):
    body = {"input_ids": [1, 2, 3], **change}
    body["sampling_params"] = {"temperature": 0, **change.get("sampling_params", {})}
    reply = requests.post(f"{client.base_url}/generate", json=body)
    assert reply.status_code == 400 and named in reply.text
    [answer] = client.alone(prompts[4:5], sampling_params={"max_new_tokens": 4})
    assert answer.tokens == alone[4].tokens[:4]
    assert_clean(client)


def test_abort_and_disconnect_leak_nothing(client, prompts, alone):
    # More than are made while this process opens streams, or is stopped for seconds.
    params = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
    body = {"stream": True, "sampling_params": params}
    open_streams: list[Iterator[bytes]] = []
    for i, prompt in enumerate(prompts[:6]):
        ask = {**body, "input_ids": prompt.input_ids, "rid": f"gone-{i}"}
        response = requests.post(f"{client.base_url}/generate", json=ask, stream=True)
        lines = response.iter_lines()
        next(lines)
        if i % 2:
            response.close()  # the client vanishes
        else:
            open_streams.append(lines)
    for i in (0, 2, 4):
        requests.post(f"{client.base_url}/abort_request", json={"rid": f"gone-{i}"})
    for lines in open_streams:
        text = b"".join(lines)
        assert b'"abort"' in text
    assert_same(alone, client.together(prompts[6:]))
    assert_clean(client)
