"""Controls: without the flag nothing changes, and the stock server fails what the gate passes."""

from __future__ import annotations

import json

import pytest
from checks import assert_clean, assert_gate_worked, assert_same
from conftest import TOKENS as GATED_TOKENS

from margingate.client import Client, identical

TOKENS = 32


@pytest.fixture(scope="module")
def stock(start, all_prompts):
    """The stock server's answers (flag absent), alone and batched, from one server."""
    server = start(gate=False)
    client = Client(server.base_url, TOKENS)
    alone = client.alone(all_prompts)
    client.flush()
    batched = client.together(all_prompts)
    info = client.get("/server_info")
    return alone, batched, info, server.log.read_text(errors="replace")


def test_the_stock_server_depends_on_the_batch(stock):
    alone, batched, _, _ = stock
    assert identical(alone, batched) < len(alone), "the control found no flip on this machine"


def test_without_the_flag_there_is_no_gate(stock):
    _, _, info, log = stock
    assert "margingate" not in info["internal_states"][0]
    assert "_margingate" not in json.dumps(info)
    applied = [line for line in log.splitlines() if "hook(s) to" in line and "margingate" in line]
    startup = ("ServerArgs", "Scheduler.__init__", "Engine._launch_subprocesses")
    assert all(any(name in line for name in startup) for line in applied)


def test_without_the_plugin_the_answers_are_the_same(start, stock, prompts):
    """SGLANG_PLUGINS keeps the gate out; the host platform is needed to start at all."""
    server = start(gate=False, env={"SGLANG_PLUGINS": "margingate_host"})
    bare = Client(server.base_url, TOKENS).alone(prompts)
    assert_same(stock[0], bare)


def test_observe_counts_and_changes_nothing(start, stock, prompts):
    client = Client(start("--gate-policy", "observe").base_url, TOKENS)
    assert_same(stock[0], client.alone(prompts))
    state = client.gate_state()
    assert state["steps"] > 0 and state["flagged"] > 0 and state["verified"] == 0
    assert sum(state["margins"]["steps"]) > 0


def test_always_gives_the_text_of_margin(start, prompts, canonical):
    """`exact` is held to the same answers in test_server_pressure.py."""
    client = Client(start("--gate-policy", "always").base_url, GATED_TOKENS)
    before = client.gate_state()
    assert_same(canonical(client, prompts), client.together(prompts))
    assert client.gate_state()["trigger_rate"] > 0.9
    assert_gate_worked(before, client.gate_state(), batch=8)
    assert_clean(client)
