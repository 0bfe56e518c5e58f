"""Two data-parallel replicas on the host: whichever answers, the answers are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import assert_clean, assert_metrics, changed, forced

from margingate.cli.main import main
from margingate.harness.client import Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.tiny_models import tiny_model

TOKENS, COUNT = 8, 16
ASK = {"return_logprob": True, "top_logprobs_num": 2}


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Path:
    """Experts in float32: other rows in company, and a start of seconds."""
    return tiny_model("mixtral", run_folder)


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[Prompt]:
    return chat_prompts(read_prompts(PROMPTS)[:COUNT], model)


def test_replicas_answer_alike(start, prompts, tmp_path, capsys):
    args = ("--dp-size", "2", "--gate-debug", "--gate-inject-faults", "--enable-metrics")
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    server = start("--dtype", "float32", *args, stock_path=False, env=env)
    client = Client(server.base_url, TOKENS)
    by_replica = [client.alone(prompts, routed_dp_rank=replica, **ASK) for replica in range(2)]
    assert [{a.meta["dp_rank"] for a in answers} for answers in by_replica] == [{0}, {1}]
    assert changed(*by_replica) == [], "alone, by the other replica"
    together = client.together(prompts, **ASK)
    assert changed(by_replica[0], together) == [], "in batches, by either replica"
    assert {answer.meta["dp_rank"] for answer in together} == {0, 1}
    flipped = client.together(prompts, sampling_params=forced([1, 5]), **ASK)
    assert changed(by_replica[0], flipped) == [], "with flips"

    states = client.gate_states()
    assert [state["replica"] for state in states] == [0, 1]
    assert len({state["fingerprint"] for state in states}) == 1
    assert {a.meta["gate"]["fingerprint"] for a in together} == {states[0]["fingerprint"]}
    # What was measured by the clock is the first one's.
    assert states[0]["probe"]["operators"] == states[1]["probe"]["operators"]
    summed = client.gate_state()
    assert summed["fingerprint"] == states[0]["fingerprint"] and summed["integrity"] == "ok"
    assert summed["flips"] == sum(state["flips"] for state in states) >= 2 * COUNT
    assert min(state["flips"] for state in states) > 0 and summed["missed"] == 0
    assert summed["steps"] >= 4 * COUNT * TOKENS
    assert_metrics(client)

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    asked = ["check", "--base-url", server.base_url, "--tokens", "4", "--prompts", str(file)]
    assert main(asked) == 0
    assert states[0]["fingerprint"] in capsys.readouterr().out
    assert_clean(client)
    cold = client.together(prompts[:2], **ASK)
    assert [answer.meta["cached_tokens"] for answer in cold] == [0, 0], "the flush reached both"
    assert server.healthy()
