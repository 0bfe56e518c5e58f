"""The experts of each token, where verify passes share steps that overlap, and all rows are
verified: those of the forward whose columns stand.

`test_server_families.py` compares them on the default path, for each family.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from checks import assert_clean, experts_of_tokens, forced

from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.servers import retracting
from margingate.harness.tiny_models import tiny_model

TOKENS = 24  # of an answer
LAYERS, CHOSEN = 2, 2  # experts of a token in each layer
ASK = {"return_routed_experts": True}
# A pass waits for a step to carry it, which is in flight when the next is made.
ARGS = (
    *("--dtype", "bfloat16", "--enable-return-routed-experts", "--gate-guarantee", "exact"),
    *("--gate-max-delay", "2", "--gate-overlap", "on", "--gate-debug", "--gate-inject-faults"),
)


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Path:
    """In place of SmolLM2."""
    return tiny_model("mixtral", run_folder)


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    """8 prompts, two of each data set."""
    pairs = read_prompts(PROMPTS)
    return chat_prompts([pair for i, pair in enumerate(pairs) if i % 6 < 2], model)


@pytest.fixture(scope="module")
def client(start) -> Client:
    server = start(*ARGS, env=retracting(7))
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts) -> list[Answer]:
    client.flush()
    return client.alone(prompts, **ASK)


def experts(answer: Answer) -> list[bytes]:
    """Of each token."""
    return experts_of_tokens(answer, LAYERS * CHOSEN)


def changed(reference: Sequence[Answer], answers: Sequence[Answer]) -> list[str]:
    """The names of answers whose tokens or experts are not those of the reference."""
    wanted = {answer.name: (answer.tokens, experts(answer)) for answer in reference}
    return [each.name for each in answers if (each.tokens, experts(each)) != wanted[each.name]]


def test_a_row_for_each_token_but_the_last(prompts, alone):
    for prompt, answer in zip(prompts, alone, strict=True):
        rows = experts(answer)
        assert len(rows) == len(prompt.input_ids) + len(answer.tokens) - 1
        assert len(set(rows)) > 8, "tokens go to many experts"


def test_batched_shuffled_cached_and_retracted(client, prompts, alone):
    retractions = 0
    for seed in range(3):
        order = random.Random(seed).sample(prompts, len(prompts))
        answers = client.together(order, **ASK)
        assert changed(alone, answers) == []
        retractions += sum(answer.meta["num_retractions"] for answer in answers)
    assert retractions >= 2
    state = client.gate_state()
    assert state["merged_passes"] > 0 and state["overlap"]
    assert_clean(client)


def test_rolled_back(client, prompts, alone):
    answers = client.together(prompts, sampling_params=forced([1, 4, 5, 13, TOKENS]), **ASK)
    assert changed(alone, answers) == []
    assert all(answer.meta["gate"]["flips"] >= 3 for answer in answers)
    assert_clean(client)


def test_a_request_may_want_those_of_its_end_alone(client, prompts, alone):
    start = len(prompts[0].input_ids) - 3
    (answer,) = client.alone(prompts[:1], routed_experts_start_len=start, **ASK)
    assert experts(answer) == experts(alone[0])[start:]


def test_an_aborted_answer_has_those_of_its_settled_tokens(client, prompts, alone):
    """What was settled by then differs from run to run."""
    for _ in range(5):  # were this process stopped for seconds, all tokens could come before
        last = aborted_behind(client, prompts[0], TOKENS)
        if last["finish_reason"]["type"] == "abort":
            break
    assert last["finish_reason"]["type"] == "abort"
    rows = len(base64.b64decode(last["routed_experts"])) // (LAYERS * CHOSEN * 4)
    assert rows == len(prompts[0].input_ids) + last["completion_tokens"] - 1
    assert_clean(client)


def aborted_behind(client: Client, prompt: Prompt, count: int) -> dict[str, Any]:
    """What a stream's last chunk says, whose request is aborted behind so many chunks."""
    body = {"input_ids": prompt.input_ids, "rid": "aborted", "stream": True, **ASK}
    body |= {"sampling_params": {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}}
    url, chunks = f"{client.base_url}/generate", []
    with requests.post(url, json=body, stream=True, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith(b"data: {"):
                chunks.append(json.loads(line.removeprefix(b"data: ")))
                if len(chunks) == count:
                    requests.post(f"{client.base_url}/abort_request", json={"rid": "aborted"})
    said: dict[str, Any] = chunks[-1]["meta_info"]
    return said
