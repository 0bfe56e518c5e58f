"""What the server tests assert again and again."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from margingate.harness.client import Answer, Client, Prompt
from margingate.harness.servers import slow_bfloat16


def needs_the_whole_model() -> None:
    """Skips where the `model` fixture serves a part of it, which makes no sense."""
    if slow_bfloat16():
        pytest.skip("needs all layers of the model, of which a CPU without AVX-512 serves a sixth")


def forced(rows: list[int]) -> dict[str, Any]:
    """Sampling parameters that corrupt what the fast path emits at these rows."""
    return {"custom_params": {"gate_fault_rows": rows}}


def assert_same(reference: Sequence[Answer], answers: Sequence[Answer]) -> None:
    """Token id by token id, and the text with them; names the first that differs."""
    wanted = {answer.name: answer for answer in reference}
    assert len(answers) > 0
    for answer in answers:
        other = wanted[answer.name]
        assert answer.tokens == other.tokens, f"{answer.name}: {answer.tokens} != {other.tokens}"
        assert answer.text == other.text, answer.name


def readings(answer: Answer) -> tuple[object, ...]:
    """What is compared of an answer that has log-probs: tokens, text, these, and experts."""
    logprobs = answer.meta["output_token_logprobs"], answer.meta["output_top_logprobs"]
    assert len(logprobs[0]) == len(answer.tokens) > 0
    return (answer.tokens, answer.text, *logprobs, answer.meta.get("routed_experts"))


def changed(reference: Sequence[Answer], answers: Sequence[Answer]) -> list[str]:
    """The names of answers whose tokens, text, log-probs or experts are not the reference's, which
    may have others too.
    """
    wanted = {answer.name: readings(answer) for answer in reference}
    assert len(answers) > 0
    return [answer.name for answer in answers if readings(answer) != wanted[answer.name]]


def changed_of_all(reference: Sequence[Answer], answers: Sequence[Answer]) -> list[str]:
    """As `changed`, where each answer of the reference has to be there, once."""
    assert sorted(answer.name for answer in reference) == sorted(answer.name for answer in answers)
    return changed(reference, answers)


def changed_in_company(
    client: Client, prompts: Sequence[Prompt], alone: Sequence[Answer], **ask: Any
) -> list[str]:
    """Answers of a stock server that differ in a batch; of none, if ten batches changed none.

    Batches form by arrival: on a busy machine short answers may go one after the other.
    """
    for _ in range(10):
        client.flush()
        if found := changed_of_all(alone, client.together(prompts, **ask)):
            return found
    return []


def experts_of_tokens(answer: Answer, chosen: int) -> list[bytes]:
    """The experts of each token, int32 after int32; `chosen`: of all layers together."""
    data, row = base64.b64decode(answer.meta["routed_experts"]), 4 * chosen
    assert len(data) % row == 0
    return [data[start : start + row] for start in range(0, len(data), row)]


def assert_gate_worked(before: dict[str, Any], after: dict[str, Any], batch: int) -> None:
    """Between two readings of the counters, a batch formed, rows were flagged and verified."""
    assert after["largest_batch"] >= batch, f"no batch of {batch} formed: {after['largest_batch']}"
    for name in ("steps", "flagged", "verified", "passes"):
        assert after[name] > before[name], f"{name} did not rise from {before[name]}"


def assert_clean(client: Client, wait_s: float = 20) -> None:
    """Nothing is open, slots and tree and ledger agree, and SGLang's own flush succeeds."""
    deadline = time.monotonic() + wait_s
    while (state := client.gate_state())["open"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert state["open"] == state["held"] == 0, state
    assert state["integrity"] == "ok", state["integrity"]
    client.flush()
    assert client.gate_state()["integrity"] == "ok"


def gate_metrics(client: Client) -> dict[str, float]:
    """/metrics of the gate: by name after `sglang:gate_`, and by `name{own label's value}`.

    A histogram's buckets are summed up into one number that means nothing.
    """
    reply = requests.get(f"{client.base_url}/metrics", timeout=60)
    reply.raise_for_status()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample, labels, value, *_ in family.samples:
            name = sample.removeprefix("sglang:gate_")
            own = [labels[label] for label in ("reason", "due", "mode") if label in labels]
            for key in (name, *(f"{name}{{{each}}}" for each in own)):
                found[key] = found.get(key, 0) + value
    return found


def assert_metrics(client: Client, wait_s: float = 60) -> dict[str, float]:
    """An idle server's /metrics come to say what its /server_info says; returns gate_metrics."""
    deadline = time.monotonic() + wait_s
    while True:
        wanted, found = told(client.gate_state()), gate_metrics(client)
        if wanted.items() <= found.items() or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["steps_total{prefill}"] > 0 and found["steps_total{decode}"] > 0
    return found


def told(state: dict[str, Any]) -> dict[str, float]:
    """What the metrics of an idle server say, by its /server_info."""
    names = ("verified", "replayed", "flips", "missed", "rolled_back", "repaired", "retractions")
    suffixes = ("_rows", "_rows", "", "", "_tokens", "_columns", "")
    wanted = {f"{n}{suffix}_total": state[n] for n, suffix in zip(names, suffixes)}
    wanted |= {f"rows_total{{{reason}}}": n for reason, n in state["reasons"].items()}
    wanted |= {f"passes_total{{{due}}}": n for due, n in state["passes_by_reason"].items()}
    wanted |= {"rows_total": state["steps"], "flagged_rows_total": state["flagged"]}
    wanted |= {"passes_total": state["passes"], "pass_seconds_count": state["passes"]}
    wanted |= {"canonical_steps_total": state["canonical_steps"]}
    return wanted | {"open_reqs": 0, "held_reqs": 0}
