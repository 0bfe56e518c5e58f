"""Images on a gated server: the same answers and log-probs alone, beside others and from the cache.

Small vision models in float32, whose towers give a patch other bits in a forward of more images.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from checks import assert_clean, changed, changed_in_company, forced, readings

from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.pictures import SIZES, picture_prompts
from margingate.harness.servers import retracting
from margingate.harness.tiny_models import VISION, tiny_model

TOKENS = 16  # of an answer
ASK = {"return_logprob": True, "top_logprobs_num": 2}
FLOAT = ("--dtype", "float32")


@pytest.fixture(scope="module", params=list(VISION))
def model(request: pytest.FixtureRequest, run_folder: Path) -> Path:
    """In place of SmolLM2: a small vision model, so a server of each, one after the other."""
    return tiny_model(request.param, run_folder)


@pytest.fixture(scope="module")
def pictures(model: Path) -> list[Prompt]:
    return picture_prompts(model)


@pytest.fixture(scope="module")
def texts(model: Path) -> list[Prompt]:
    """4 prompts without images."""
    return chat_prompts(read_prompts(PROMPTS)[::6], model)


@pytest.fixture(scope="module")
def client(start) -> Client:
    args = ("--gate-debug", "--gate-inject-faults")
    server = start(*FLOAT, *args, stock_path=False, env=retracting(5))
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def alone(client, pictures, texts) -> list[Answer]:
    """Each answer alone, nothing cached: no image was encoded before."""
    answers = []
    for prompt in (*pictures, *texts):
        client.flush()
        answers += client.alone([prompt], **ASK)
    return answers


def test_images_are_gated_and_reach_the_answer(client, pictures, alone):
    """Pictures of other sizes, in another order, or lying in place of upright, are others."""
    assert client.gate_state()["images"] == "canonical"
    assert all(answer.meta["gate"]["gated"] for answer in alone)
    of = {answer.name: answer for answer in alone}
    asked_alike = [f"{width}x{height}" for width, height in SIZES]
    for names in (asked_alike, ["two", "two swapped"], ["lying", "upright"]):
        assert len({str(readings(of[name])) for name in names}) == len(names), names
        assert len({of[name].meta["gate"]["prompt"] for name in names}) == len(names)


def test_batched_shuffled_cached_chunked_and_retracted(client, pictures, texts, alone):
    """Chunks of 64 tokens cut the larger pictures, and one request at a time is retracted."""
    prompts = [*pictures, *texts]
    assert changed(alone, client.alone(prompts, **ASK)) == [], "alone, in one order"
    assert changed(alone, client.alone(prompts, **ASK)) == [], "alone, with the prompts cached"
    retracted, cached = [], []
    for seed in range(2):
        order = random.Random(seed).sample(prompts, len(prompts))
        answers = client.together(order, **ASK)
        assert changed(alone, answers) == [], "batched, with the prompts cached"
        cached += [answer for answer in answers if answer.meta["cached_tokens"]]
        client.flush()
        cold = client.together(order, **ASK)
        assert changed(alone, cold) == [], "batched, nothing cached at first"
        retracted += [answer.meta["num_retractions"] for answer in (*answers, *cold)]
    assert {answer.name for answer in cached} & {prompt.name for prompt in pictures}
    assert client.gate_state()["largest_batch"] >= 6
    assert retracted.count(0) >= 4 and sum(retracted) >= 4, retracted
    assert_clean(client)


def test_forced_flips_are_repaired(client, pictures, alone):
    client.flush()
    answers = client.together(pictures, sampling_params=forced([1, 5, 6, 13]), **ASK)
    assert changed(alone, answers) == []
    assert all(answer.meta["gate"]["flips"] >= 2 for answer in answers)
    assert_clean(client)


def test_choices_and_chat(client, pictures, alone):
    """Two choices of one request, and OpenAI's route, which is asked twice."""
    picture = pictures[1]
    body = {"input_ids": picture.input_ids, "image_data": list(picture.images), **ASK}
    body["sampling_params"] = {**client.params, "n": 2}
    choices = requests.post(f"{client.base_url}/generate", json=body, timeout=120).json()
    answers = [
        Answer(picture.name, (*c["output_ids"],), c["text"], c["meta_info"]) for c in choices
    ]
    assert len(answers) == 2 and changed(alone, answers) == []
    url = {"type": "image_url", "image_url": {"url": picture.images[0]}}
    content = [url, {"type": "text", "text": "What is in this picture?"}]
    chat = {"model": "any", "messages": [{"role": "user", "content": content}]}
    chat |= {"temperature": 0, "max_tokens": TOKENS}
    said = [
        requests.post(f"{client.base_url}/v1/chat/completions", json=chat, timeout=120).json()
        for _ in range(2)
    ]
    assert said[0]["metadata"]["gate"][0]["gated"] and said[0]["usage"]["prompt_tokens"] > TOKENS
    assert said[0]["choices"][0]["message"] == said[1]["choices"][0]["message"]


def test_ungated_images_beside_gated_ones(client, pictures, alone):
    """They are encoded alone too: what they leave in the cache serves the gated."""
    client.flush()
    off = [replace(prompt, name=f"{prompt.name}, ungated") for prompt in pictures]
    params = {prompt.name: {"custom_params": {"deterministic": False}} for prompt in off}
    params |= {prompt.name: {} for prompt in pictures}
    answers = client.together([*off, *pictures], params=params, **ASK)
    assert changed(alone, answers[len(off) :]) == []
    assert not any(answer.meta["gate"]["gated"] for answer in answers[: len(off)])
    assert_clean(client)


def test_hashes_of_a_client_are_refused(client, pictures):
    """Under the name of another picture its embedding would serve those who send that one."""
    body = {"input_ids": pictures[0].input_ids, "image_data": list(pictures[0].images)}
    body |= {"mm_hashes": ["1"], "sampling_params": {"deterministic": False}}
    reply = requests.post(f"{client.base_url}/generate", json=body, timeout=60)
    assert reply.status_code == 400 and "mm_hashes" in reply.text


def test_the_stock_server_does_not_pass(start, pictures):
    """The control: what it answers alone it repeats, but not in a batch."""
    client = Client(start(*FLOAT, gate=False).base_url, TOKENS)
    alone = []
    for prompt in pictures:
        client.flush()
        alone += client.alone([prompt], **ASK)
    assert changed_in_company(client, pictures, alone, **ASK)
