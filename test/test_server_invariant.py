"""The default fast path: decode steps are canonical themselves, so nothing has to be verified."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from checks import assert_clean, assert_same, forced
from conftest import TOKENS
from test_server_constraints import FORMS, PENALTIES

from benchmark.robustness import trainer_rounds
from margingate.cli.main import main
from margingate.harness.client import Answer, Client, Prompt
from margingate.harness.servers import Server, slow_bfloat16


@pytest.fixture(scope="module")
def server(start) -> Server:
    options = ("--gate-debug", "--gate-inject-faults", "--gate-audit-rate", "1")
    return start(*options, stock_path=False)


@pytest.fixture(scope="module")
def client(server) -> Client:
    return Client(server.base_url, TOKENS)


@pytest.fixture(scope="module")
def alone(client, prompts, canonical) -> list[Answer]:
    """Those of the stock fast path with verification, where that was tested before.

    With several classes of row counts a prefill of this path has the bits of another one: then
    the server's own.
    """
    operators = client.gate_state()["probe"]["operators"]
    linear = [dict(o["classes"]) for o in operators if len(o["shape"]) == 2]
    shared = all(len(set(classes.values())) == 1 for classes in linear)
    return canonical(client, prompts) if shared else client.alone(prompts)


def test_every_step_is_canonical_and_every_answer_the_same(client, prompts, alone):
    before = client.gate_state()
    for seed in range(2):
        client.flush()
        order = random.Random(seed).sample(prompts, len(prompts))
        assert_same(alone, client.together(order))
    after = client.gate_state()
    assert after["largest_batch"] >= 6
    assert after["canonical_steps"] > before["canonical_steps"]
    assert after["flagged"] == after["verified"] == after["flips"] == 0
    assert set(after["reasons"]) == {"canonical"}
    assert_clean(client)


def test_a_fault_in_a_canonical_step_is_still_repaired(client, prompts, alone):
    answers = client.together(prompts, sampling_params=forced([1, 5, 6, 22]))
    assert_same(alone, answers)
    assert all(answer.meta["gate"]["flips"] >= 3 for answer in answers)
    assert_clean(client)


def test_audits_find_all_answers_right_but_those_with_hidden_faults(client, prompts, alone):
    before = audited(client)
    assert_same(alone, client.together(prompts))
    after = audited(client)
    assert after["audited"] - before["audited"] == len(prompts)
    assert after["mismatches"] == 0 and after["dropped"] == before["dropped"]
    assert after["bit_mismatches"] == 0 and not any(after["bit_mismatches_by_kind"].values())
    tokens, most = sum(len(one.tokens) for one in alone), after["columns"] - before["columns"]
    assert after["margins"] - before["margins"] == tokens <= most + len(prompts)
    assert after["bits"] - before["bits"] > tokens * 32 + most * 1024
    assert after["mismatch_bound"] == pytest.approx(1 - 0.05 ** (1 / after["audited"]))
    wrong = client.together(prompts[:2], sampling_params=forced([-5]))
    for one, other in zip(wrong, alone):
        assert one.tokens[:4] == other.tokens[:4] and one.tokens[4] != other.tokens[4]
        assert one.meta["gate"]["flips"] == 0
    found = audited(client)
    assert (found["audited"], found["mismatches"]) == (after["audited"] + 2, 2)
    assert found["tokens"] - after["tokens"] == 2 * 5, "a replay goes on behind a mismatch"
    assert_clean(client)


def audited(client: Client) -> dict[str, Any]:
    """What audits have found once none waits.

    Asks ever more seldom, for asking interrupts a replay, and on a busy machine one takes seconds.
    """
    pause_s = 2.0
    while (found := client.gate_state()["audit"])["waiting"]:
        assert pause_s < 60, found
        time.sleep(pause_s)
        pause_s *= 1.5
    return dict(found)


def test_logprobs_of_greedy_and_seeded_rows_alone_and_mixed(client, prompts, alone):
    """In a batch that samples, SGLang computes all its log-probs in another way, and in any batch
    it ranks the tokens of all for the request that wants the most: there are equals in bfloat16.
    """
    own = {"temperature": 0.8, "top_p": 0.95, "sampling_seed": 11, "max_new_tokens": 16}
    asked = [(prompts[0], 10, {}), (prompts[1], 50, {}), (prompts[2], 2, own), (prompts[3], 5, own)]

    def ask(prompt: Prompt, k: int, params: dict[str, Any]) -> Answer:
        body = {"return_logprob": True, "top_logprobs_num": k, "sampling_params": params}
        return client.alone([prompt], **body)[0]

    one = [ask(*each) for each in asked]
    before = client.gate_state()
    with ThreadPoolExecutor(len(asked)) as pool:
        many = list(pool.map(lambda each: ask(*each), asked))
    assert client.gate_state()["verified"] == before["verified"]
    assert_same(one, many)
    assert_same(alone, many[:2])
    drawn = [a.tokens != b.tokens[:16] for a, b in zip(many[2:], alone[2:4])]
    assert all(drawn) or slow_bfloat16(), "a part of the model is sure of its nonsense"
    for (_, k, _), left, right in zip(asked, one, many):
        assert {len(top) for top in left.meta["output_top_logprobs"]} == {k}
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert left.meta[name] == right.meta[name]


@pytest.mark.parametrize("kinds", [FORMS, PENALTIES], ids=["forms", "penalties"])
def test_logprobs_of_constrained_rows_are_those_alone(client, prompts, kinds):
    """Of all rows, which are canonical or mended here, on any CPU."""
    some, ask = prompts[: len(kinds)], {"return_logprob": True, "top_logprobs_num": 2}
    own = {p.name: {**each, "max_new_tokens": 12} for p, each in zip(some, kinds)}
    for each in own.values():
        each["min_new_tokens"] = min(each.get("min_new_tokens", 0), 8)
    plain = [client.alone([p], sampling_params=own[p.name], **ask)[0] for p in some]
    faults = {name: {**each, **forced([2, 6])} for name, each in own.items()}
    mended = client.together(some, params=faults, **ask)
    assert_same(plain, mended)
    assert sum(answer.meta["gate"]["flips"] for answer in mended) >= len(some)
    for left, right in zip(plain, mended, strict=True):
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert left.meta[name] == right.meta[name]


def test_the_probe_names_every_operator(client, tmp_path, capsys):
    assert main(["probe", "--base-url", client.base_url, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "probe.json").read_text())
    names = {row["name"].rsplit(".", 1)[-1] for row in report["operators"]}
    assert names >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head", "norm"}
    assert names >= {"attention decode", "attention extend"}
    measured = report["steps"]["measured"]
    assert len(measured) >= 8 and all(same for _, same in measured)
    assert all(name in said for name in names) and (tmp_path / "probe.png").exists()


def test_margingate_check_passes(client, capsys, tmp_path):
    texts = ("Name three rivers.", "What is 17 times 3?", "Write a short poem.", "Who was Ada?")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    url = f"{client.base_url}/v1"
    assert main(["check", "--base-url", url, "--tokens", "16", "--prompts", str(file)]) == 0
    assert "Every answer was the same alone and in a batch." in capsys.readouterr().out


def test_a_trainers_rounds(server, client, model, prompts):
    """The weights are replaced five times under load; what must hold is said in the script."""
    some = [Prompt(f"{i}", prompts[i % 8].input_ids[-24 - i // 8 :]) for i in range(16)]
    trainer = trainer_rounds.Trainer(Client(client.base_url, 8), model)
    found = trainer_rounds.run(trainer, some, 5, server.pid)
    assert found["wrong"] == []
    assert found["crossed"] >= 16 and found["repeated"] == 2
    assert found["megabytes"][-1] <= found["megabytes"][1] + 48, found["megabytes"]
    assert_clean(client)
