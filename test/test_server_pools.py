"""A small gpt-oss with SGLang's two K/V pools: the answers are those of one pool, bit for bit.

The pool of layers with a window has a tenth of the other's room, far less than the requests at once
would fill. Windows are of 16 tokens, so that every answer leaves them behind.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from checks import assert_clean, changed, forced

from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.servers import Server
from margingate.harness.tiny_models import tiny_model

TOKENS, MANY = 64, 290  # of an answer, and of a long one
WINDOW = 16
DELAY = 220  # steps that a flagged row waits, if nothing else is to be verified
ROOM, SHARE = 4096, 0.1  # tokens of the whole pool, and what that of windows has of them
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2}
ROWS = 64  # of a verify pass: so many wait at most
OPTIONS = (
    "--dtype",
    "float32",
    "--gate-rows",
    str(ROWS),
    "--max-total-tokens",
    str(ROOM),
    "--gate-max-delay",
    str(DELAY),
)


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Path:
    return tiny_model("gpt_oss", run_folder)


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    """16 prompts, four of each data set; their text comes to more than the windows' pool holds."""
    pairs = [pair for i, pair in enumerate(read_prompts(PROMPTS)) if i % 6 < 4]
    found = chat_prompts(pairs, model)
    assert sum(len(prompt.input_ids) + TOKENS for prompt in found) > 2 * SHARE * ROOM
    return found


@pytest.fixture(scope="module")
def long(prompts: list[Prompt]) -> Prompt:
    """One whose answer and prompt do not fit into the windows' pool."""
    repeated = tuple(prompts[0].input_ids) * 4
    return Prompt("long", repeated[: int(SHARE * ROOM) + 50])


@pytest.fixture(scope="module")
def one_pool(start, prompts: list[Prompt], long: Prompt) -> list[Answer]:
    """Each answer alone, by a server that was not asked for two."""
    server: Server = start(*OPTIONS, stock_path=False)
    said = "serves one K/V pool, because no --swa-full-tokens-ratio asks for two: it has room for"
    assert said in server.log.read_text()
    client = Client(server.base_url, TOKENS)
    answers = client.alone(prompts, **LOGPROBS)
    return answers + client.alone([long], sampling_params={"max_new_tokens": MANY}, **LOGPROBS)


@pytest.fixture(scope="module")
def client(start, one_pool: list[Answer]) -> Client:
    """Of a server with two pools; it looks whether both are whole after each step."""
    options = ("--gate-debug", "--gate-inject-faults", "--swa-full-tokens-ratio", str(SHARE))
    server: Server = start(*OPTIONS, *options, stock_path=False)
    assert "serves two K/V pools: 4096 tokens" in server.log.read_text()
    return Client(server.base_url, TOKENS)


def test_alone_and_cached(client: Client, prompts, one_pool):
    client.flush()
    assert changed(one_pool, client.alone(prompts, **LOGPROBS)) == []
    again = client.alone(prompts, **LOGPROBS)
    assert changed(one_pool, again) == []
    assert any(answer.meta["cached_tokens"] > 0 for answer in again)
    assert_clean(client)


def test_batched_and_shuffled(client: Client, prompts, one_pool):
    for seed in range(2):
        order = random.Random(seed).sample(prompts, len(prompts))
        assert changed(one_pool, client.together(order, **LOGPROBS)) == []
    assert client.gate_state()["largest_batch"] >= 4
    assert_clean(client)


def test_an_answer_that_the_pool_of_windows_could_not_hold(client: Client, long, one_pool):
    """And flips around the edge of a window, that wait while several windows of rows follow."""
    params = {"max_new_tokens": MANY}
    assert len(long.input_ids) + MANY > SHARE * ROOM
    assert changed(one_pool, client.alone([long], sampling_params=params, **LOGPROBS)) == []
    for row in (2, WINDOW - 1, *(WINDOW + behind for behind in (0, 1, 2, WINDOW, 200))):
        (answer,) = client.alone([long], sampling_params=params | forced([row]), **LOGPROBS)
        assert changed(one_pool, [answer]) == [], row
        gate = answer.meta["gate"]
        assert gate["flips"] == 1 and gate["rolled_back"] >= ROWS - 4, (row, gate)
    assert_clean(client)


@pytest.mark.parametrize("rows", [[1, WINDOW, WINDOW + 1, 40], [63, 64], [20, 21, 22, 36, 37, 38]])
def test_forced_flips(client: Client, prompts, one_pool, rows: list[int]):
    answers = client.together(prompts, sampling_params=forced(rows), **LOGPROBS)
    assert changed(one_pool, answers) == []
    assert_flipped(answers)
    assert_clean(client)


def assert_flipped(answers: list[Answer]) -> None:
    """A flip takes back what faults behind it made, and a retraction what was not verified."""
    found = [(each.meta["num_retractions"], each.meta["gate"]["flips"]) for each in answers]
    stayed = [flips for retractions, flips in found if not retractions]
    assert stayed and min(stayed) > 0, found


def test_paused_retracted_and_given_weights(client: Client, model: Path, prompts, one_pool):
    """Answers are as ever when running requests lose both pools' columns, and when some end."""
    found: list[Answer] = []
    for mode in ("retract", "in_place"):
        answers = during(client, prompts, lambda mode=mode: pause(client, mode, model))
        found += answers
        assert changed(one_pool, answers) == [], mode
    assert sum(answer.meta["num_retractions"] for answer in found) > 0
    assert_clean(client)


def test_aborted(client: Client, prompts, one_pool):
    """All at once, some while their prompts are computed; nothing of either pool is lost."""

    def abort() -> None:
        requests.post(
            f"{client.base_url}/abort_request", json={"abort_all": True}
        ).raise_for_status()

    during(client, prompts, abort)
    assert_clean(client)
    assert changed(one_pool, client.together(prompts, **LOGPROBS)) == []
    assert_clean(client)


def during(client: Client, prompts: list[Prompt], act: Any) -> list[Answer]:
    """The answers to all prompts at once; `act` runs while some are decoded.

    Asks again where all came before it could, as when this process was stopped meanwhile.
    """
    with ThreadPoolExecutor(1) as pool:
        for _ in range(10):
            before = client.gate_state()["steps"]
            asking = pool.submit(client.together, prompts, **LOGPROBS)
            while client.gate_state()["steps"] < before + 200 and not asking.done():
                pass
            if not asking.done():
                act()
                return asking.result()
    raise AssertionError("always too late")


def pause(client: Client, mode: str, model: Path) -> None:
    """A pause of that kind, and the same weights once more before it ends."""
    for path, body in (
        ("pause_generation", {"mode": mode}),
        ("update_weights_from_disk", {"model_path": str(model), "flush_cache": False}),
        ("continue_generation", {}),
    ):
        reply = requests.post(f"{client.base_url}/{path}", json=body, timeout=60)
        assert reply.status_code == 200, (path, reply.text)
