"""Controls: without the flag nothing changes, and the stock server fails what the gate passes."""

from __future__ import annotations

import json

import pytest
import torch
from checks import assert_same

from margingate.cli.exit_status import CHANGED
from margingate.cli.main import main
from margingate.harness.client import Client

TOKENS = 32  # enough for flips on every machine seen so far


@pytest.fixture(scope="module")
def stock(start, prompts, tmp_path_factory):
    """What one stock server (flag absent) answers alone, and what `margingate check` says of it.

    The check is left out where a row has the same bits at any row count: it would find nothing.
    """
    server = start(gate=False)
    client = Client(server.base_url, TOKENS)
    alone = client.alone(prompts)
    info = client.get("/server_info")
    checked = None
    if not rows_are_independent():
        out = tmp_path_factory.mktemp("check") / "check.json"
        asked = ["check", "--base-url", server.base_url, "--out", str(out), "--tokens"]
        # Batches form by arrival, rarely with no flip: then again, with longer answers.
        found = any(main([*asked, str(n * TOKENS)]) == CHANGED for n in (1, 1, 2, 4))
        checked = found, json.loads(out.read_text())
    return alone, info, server.log.read_text(errors="replace"), checked


def rows_are_independent() -> bool:
    """Whether a row has the same bits at any number of rows, as where there is no AVX-512."""
    generator = torch.Generator().manual_seed(1)
    sizes = (576, 32)  # outputs of the model's down_proj, and rows
    weight, rows = (torch.randn(n, 1536, generator=generator).bfloat16() for n in sizes)
    multiply = torch.nn.functional.linear
    one = torch.cat([multiply(rows[i : i + 1], weight) for i in range(len(rows))])
    return all(torch.equal(multiply(rows[:n], weight), one[:n]) for n in range(2, len(rows) + 1))


def test_the_stock_server_depends_on_the_batch(stock):
    """The control for every test of sameness, by `margingate check`: 24 prompts."""
    if stock[-1] is None:
        pytest.skip("this CPU multiplies bfloat16 row by row: stock SGLang depends on no batch")
    found, result = stock[-1]
    assert found, "the control found no flip on this machine"
    assert result["prompts"] == 24 and result["changed"]["batched"]


def test_without_the_flag_there_is_no_gate(stock):
    _, info, log, _ = stock
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
