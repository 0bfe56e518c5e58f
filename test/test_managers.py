"""A process may have servers with and without the gate, one behind the other."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.config import GateConfig
from margingate.harness.servers import CPU_ENV
from margingate.harness.tiny_models import tiny_model
from margingate.runtime.client.managers import around_gated, before_gated
from margingate.runtime.compat.arguments.server_args import ATTRIBUTE
from margingate.runtime.hooks.launcher_table import TOKENIZER_HOOKS
from margingate.runtime.hooks.registry import AROUND, Hook

MANAGERS = [hook for hook in TOKENIZER_HOOKS if ".TokenizerManager." in hook.target]
BEHIND = """
import sglang

def main(model):
    options = {"model_path": model, "device": "cpu", "dtype": "float32"}
    options |= {"mem_fraction_static": 0.3, "max_total_tokens": 4096}
    try:
        sglang.Engine(**options, deterministic_gate=True, enable_lora=True)
    except Exception as error:
        print("refused:", error)
    engine = sglang.Engine(**options)
    params = {"temperature": 0, "max_new_tokens": 1, "n": 129}
    print("answers:", len(engine.generate("One", params)))
    engine.shutdown()

if __name__ == "__main__":
    import sys
    main(sys.argv[1])
"""


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


def test_an_engine_without_the_gate_behind_one_that_was_refused(tmp_path: Path):
    """Its first answer raised GateError, and 129 choices were too many for it."""
    script = tmp_path / "behind.py"
    script.write_text(BEHIND)
    done = subprocess.run(
        [sys.executable, script, tiny_model("qwen3", tmp_path / "model")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **CPU_ENV},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "refused: --deterministic-gate does not work with --enable-lora" in done.stdout
    assert "answers: 129" in done.stdout
