"""Simulated verdicts on a server with dummy weights: the work is real, and the same twice."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from checks import assert_clean, assert_metrics, assert_same

from margingate.harness.client import Answer, Client, Prompt

RATE, FLIPS, TOKENS = 0.25, 0.2, 64
PARAMS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def penalising(model, tmp_path_factory) -> Path:
    """The model with a penalty among its sampling defaults; dummy weights need no file."""
    folder = tmp_path_factory.mktemp("model") / "penalising"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.05}))
    return folder


@pytest.fixture(scope="module")
def client(start, penalising) -> Client:
    rates = ("--gate-simulate-trigger-rate", str(RATE), "--gate-simulate-flip-rate", str(FLIPS))
    more = ("--gate-max-delay", "3", "--gate-debug", "--enable-metrics")
    server = start("--load-format", "dummy", *rates, *more, "--model-path", str(penalising))
    said = server.log.read_text(errors="replace")
    assert "VERDICTS ARE SIMULATED" in said
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def made_up() -> list[Prompt]:
    draw = random.Random(7).randrange
    return [Prompt(f"p{i}", tuple(draw(10, 30000) for _ in range(20 + i))) for i in range(8)]


def difference(before: Any, after: Any) -> Any:
    """What has been added to numbers, in records within records too."""
    if isinstance(after, dict):
        return {name: difference(before.get(name, 0), each) for name, each in after.items()}
    return after - before if isinstance(after, int | float) else after


def gates(answers: list[Answer], name: str) -> list[Any]:
    return [answer.meta["gate"][name] for answer in answers]


def test_flags_and_flips_are_near_their_rates_and_the_same_in_two_runs(client, made_up):
    before = client.gate_state()  # the start asks for a few tokens itself
    one = client.together(made_up, sampling_params=PARAMS)
    client.flush()
    shuffled = random.Random(1).sample(made_up, len(made_up))
    assert_same(one, client.together(shuffled, sampling_params=PARAMS))
    state = difference(before, client.gate_state())
    assert set(state["reasons"]) == {"canonical", "simulated"}
    assert state["reasons"]["canonical"] == 2 * len(made_up), "each prompt's first token"
    assert state["flagged"] / state["reasons"]["simulated"] == pytest.approx(RATE, abs=0.05)
    assert state["flips"] / state["flagged"] == pytest.approx(FLIPS, abs=0.08)
    assert state["rolled_back"] >= state["flips"] > 0 == state["missed"]
    assert all(answer.meta["completion_tokens"] == TOKENS for answer in one)
    assert all(gates(one, "simulated")) and set(gates(one, "fingerprint")) == {None}
    assert 0 < state["merged_passes"] <= state["passes"], "all, if a step is always there to carry"
    tally = state["tally"]
    assert 0 < tally["quiet_steps"] < tally["decode_steps"]
    assert state["verified"] <= tally["pass_rows"] <= state["passes"] * 16
    assert tally["waits"] > 0 and tally["waited_s"] > 0
    assert client.gate_state()["max_delay"] == 3
    assert_metrics(client)
    assert_clean(client)


def test_one_by_one_flags_the_same_rows(client, made_up):
    """Dummy weights are small: what is flagged, and what flips, does not hang on the batch."""
    together = client.together(made_up[:3], sampling_params=PARAMS)
    assert_same(together, client.alone(made_up[:3], sampling_params=PARAMS))


def test_ends_that_wait_come_beside_a_request_that_is_not_gated(client, made_up):
    """Its steps carry their passes, and nobody else's; it does not end before they do."""
    asked = {**PARAMS, "custom_params": {"deterministic": False}, "max_new_tokens": 400}
    short = {**PARAMS, "max_new_tokens": 6}
    before = client.gate_state()
    with ThreadPoolExecutor(1) as other:
        for _ in range(5):  # were this process stopped meanwhile, it could end before they come
            free = other.submit(client.alone, made_up[-1:], sampling_params=asked)
            answers = client.alone(made_up, sampling_params=short)
            beside = not free.done()
            free.result()
            if beside:
                break
    assert beside
    assert [answer.meta["completion_tokens"] for answer in free.result()] == [400]
    assert sum(gates(answers, "passes")) > 0, "some ends had to wait"
    assert difference(before, client.gate_state())["merged_passes"] > 0
    assert_clean(client)


def test_a_penalty_of_the_models_own_is_served(client):
    def chat(**more: Any) -> requests.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "Three rivers?"}], **more}
        body |= {"temperature": 0, "max_tokens": 2}
        return requests.post(f"{client.base_url}/v1/chat/completions", json=body)

    served = [chat(), chat(**{"repetition_penalty": 1}), chat(**{"deterministic": False})]
    gates = [reply.json()["metadata"]["gate"][0]["gated"] for reply in served]
    assert gates == [True, True, False]
    assert_clean(client)
