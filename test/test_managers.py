"""A process may have servers with and without the gate, one behind the other."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.config import GateConfig
from margingate.runtime.client.managers import around_gated, before_gated
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
from margingate.runtime.hooks.launcher_table import TOKENIZER_HOOKS
from margingate.runtime.hooks.registry import AROUND, Hook

MANAGERS = [hook for hook in TOKENIZER_HOOKS if ".TokenizerManager." in hook.target]


@pytest.mark.parametrize("hook", MANAGERS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_a_manager_of_a_server_without_the_gate_is_left_alone(hook: Hook):
    """It has nothing else that a hook could look at."""
    manager, args = SimpleNamespace(server_args=SimpleNamespace()), (object(), object())
    if hook.kind is not AROUND:
        assert hook.function(manager, *args) is None
        return
    asked: list[Any] = []
    answer = object()
    waits = inspect.iscoroutinefunction(hook.function)

    def original(*given: Any) -> Any:
        asked.append(given)
        return asyncio.sleep(0, answer) if waits else answer

    found = hook.function(original, manager, *args)
    assert (asyncio.run(found) if waits else found) is answer and asked == [(manager, *args)]


def test_one_of_a_gated_server_is_not():
    seen: list[Any] = []
    manager = SimpleNamespace(server_args=SimpleNamespace(**{ATTRIBUTE: GateConfig()}))
    before_gated(lambda *given: seen.append(given))(manager, 1)
    assert around_gated(lambda original, *given: (original, given))("it", manager, 2) == (
        "it",
        (manager, 2),
    )
    assert seen == [(manager, 1)]
