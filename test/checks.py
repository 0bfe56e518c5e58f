"""What the server tests assert again and again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from margingate.client import Answer, Client


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
