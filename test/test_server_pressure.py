"""Little memory, late verification, vanishing clients: same answers, and nothing leaks."""

from __future__ import annotations

import random

import pytest
import requests
from checks import assert_clean, assert_gate_worked, assert_metrics, assert_same, forced
from conftest import TOKENS

from margingate.harness.client import Client, Prompt
from margingate.harness.servers import retracting, slow_bfloat16

SPARED = pytest.mark.skipif(slow_bfloat16(), reason="two of three do where a start takes a minute")


@pytest.mark.parametrize(
    ("guarantee", "overlap", "delay"),
    [pytest.param("sparse", "off", "0", marks=SPARED), ("sparse", "on", "8"), ("exact", "on", "0")],
)
def test_retracted_requests_answer_as_if_they_had_never_been(
    start, prompts, canonical, guarantee, overlap, delay
):
    """SGLang's own switch retracts requests every few steps; alone there is nothing to retract."""
    server = start(
        "--gate-debug",
        "--gate-inject-faults",
        *("--gate-guarantee", guarantee, "--gate-overlap", overlap, "--gate-max-delay", delay),
        env=retracting(5),
    )
    client = Client(server.base_url, TOKENS)
    alone = canonical(client, prompts)
    before = client.gate_state()
    answers = client.together(prompts, sampling_params=forced([4, 11, 12, 23]))
    assert_same(alone, answers)
    assert sum(answer.meta["num_retractions"] for answer in answers) > 3
    assert client.gate_state()["retractions"] > before["retractions"]
    assert_gate_worked(before, client.gate_state(), batch=6)
    assert client.gate_state()["overlap"] is (overlap == "on")
    assert_clean(client)


@pytest.fixture(scope="module")
def late(start) -> Client:
    """Verification waits up to 8 steps, beside overlap, and memory holds about a dozen requests."""
    args = ("--gate-debug", "--gate-inject-faults", "--gate-max-delay", "8", "--gate-overlap", "on")
    server = start(*args, "--max-total-tokens", "2048", "--enable-metrics")
    return Client(server.base_url, TOKENS)


def test_deferred_verification_rolls_back_what_went_on(late, prompts, canonical):
    alone = canonical(late, prompts)
    for seed in range(2):
        before = late.gate_state()
        order = random.Random(seed).sample(prompts, len(prompts))
        answers = late.together(order, sampling_params=forced([2, 3, 10, 18, 22]))
        assert_same(alone, answers)
        after = late.gate_state()
        assert_gate_worked(before, after, batch=4)
        flips = after["flips"] - before["flips"]
        assert after["rolled_back"] - before["rolled_back"] > flips, "no decoded token was dropped"
        assert after["merged_passes"] > before["merged_passes"], "no decode step carried a pass"
    assert_clean(late)


def test_steps_that_carry_a_pass_sample_as_ever(late, prompts):
    """Rows without a seed are drawn from logits that SGLang scales in place."""
    greedy, sampled = prompts[:3], prompts[3:6]
    alone = late.alone(greedy)
    before = late.gate_state()
    params = {prompt.name: forced([2, 9, 15]) for prompt in greedy}
    params |= {prompt.name: {"temperature": 0.9} for prompt in sampled}
    answers = late.together([*greedy, *sampled], params=params)
    assert_same(alone, answers[:3])
    assert late.gate_state()["merged_passes"] > before["merged_passes"]
    assert {a.meta["gate"]["because"] for a in answers[3:]} == {"sampling has no seed"}


def test_rows_with_log_probs_are_verified_in_passes_of_their_own(late, prompts):
    alone = late.alone(prompts[:3])
    before = late.gate_state()
    params = forced([2, 9, 15])
    answers = late.together(prompts[:3], sampling_params=params, return_logprob=True)
    assert_same(alone, answers)
    after = late.gate_state()
    assert after["passes"] > before["passes"] and after["flips"] > before["flips"]
    assert after["merged_passes"] == before["merged_passes"]
    assert all(len(a.meta["output_token_logprobs"]) == len(a.tokens) for a in answers)


def test_deferred_ends_are_held_and_streams_never_retract(late, prompts):
    [answer] = late.alone(prompts[3:4])
    rows = [1, len(answer.tokens) - 2, len(answer.tokens)]
    again = late.together([prompts[3]] * 3, sampling_params=forced(rows))
    assert_same([answer], again)
    assert all(a.meta["finish_reason"] == answer.meta["finish_reason"] for a in again)
    assert all(a.meta["gate"]["drain_s"] > 0 for a in again)
    metrics = assert_metrics(late)
    assert metrics["drain_seconds_count"] >= 3 and metrics["settle_seconds_count"] >= 3
    assert metrics["flips_total"] > 0, "no flip was counted"


def test_aborts_while_rows_are_pending(late, prompts):
    for _ in range(5):  # were this process stopped for seconds, answers could end before
        ends = ends_of_aborted(late, prompts)
        if all(b'"abort"' in end for end in ends):
            break
    assert all(b'"abort"' in end for end in ends), ends
    assert_clean(late)


def ends_of_aborted(late: Client, prompts: list[Prompt]) -> list[bytes]:
    """What comes behind the first lines of three streams that are aborted; three more vanish."""
    body = {"stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 300}}
    responses = []
    for i, prompt in enumerate(prompts[:6]):
        params = {**body["sampling_params"], **forced(list(range(5, 300, 7)))}
        ask = {**body, "sampling_params": params, "input_ids": prompt.input_ids, "rid": f"late-{i}"}
        responses.append(requests.post(f"{late.base_url}/generate", json=ask, stream=True))
    streams = [response.iter_lines() for response in responses]
    for lines in streams:
        next(lines)
    for response in responses[::2]:
        response.close()
    for i in (1, 3, 5):
        requests.post(f"{late.base_url}/abort_request", json={"rid": f"late-{i}"})
    return [b"".join(lines) for lines in streams[1::2]]


def test_a_timeout_while_rows_are_pending(start, prompts):
    """No CPU makes so many tokens in that time; eight come in it, were the server stopped too."""
    server = start(
        "--gate-debug", "--gate-max-delay", "64", env={"SGLANG_REQ_RUNNING_TIMEOUT": "8"}
    )
    client = Client(server.base_url, 7000)
    body = {"input_ids": prompts[0].input_ids, "sampling_params": {**client.params}}
    body["sampling_params"]["ignore_eos"] = True
    reply = requests.post(f"{client.base_url}/generate", json=body)
    assert reply.status_code == 503 and "timeout" in reply.text
    short = Client(server.base_url, 8)
    assert len(short.alone([Prompt("again", prompts[0].input_ids)])[0].tokens) == 8
    assert_clean(short)
