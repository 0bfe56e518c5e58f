"""`sglang.Engine(deterministic_gate=True)` in a user's program: examples/engine.py; two engines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from margingate.core.choice_seeds import choice_seed
from margingate.harness.servers import CPU_ENV
from margingate.harness.tiny_models import tiny_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "engine.py"
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


def run(script: Path, *args: str | Path) -> str:
    """What a program prints that ends with 0."""
    done = subprocess.run(
        [sys.executable, script, *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **CPU_ENV},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_the_engine_alone_and_in_a_batch(model):
    """On the stock path, so that the gate has work; the example ends with 1 if answers differ."""
    printed = run(EXAMPLE, "--model-path", model, "--fast-path", "stock")
    lines = printed.splitlines()
    assert len([line for line in lines if line.startswith("same ")]) == 5
    counts = dict(re.findall(r"^(\w+): (\d+)$", printed, re.MULTILINE))
    assert int(counts["steps"]) > 100
    assert int(counts["flagged"]) > 0 and int(counts["verified"]) > 0
    assert re.search(r"^fingerprints: [0-9a-f]{16}$", printed, re.MULTILINE)
    seeds = [choice_seed(7, i) for i in range(3)]
    assert f"choices: {' '.join(f'same with seed {seed};' for seed in seeds)}" in lines
    said = "opted out: {'gated': False, 'because': 'deterministic is false', 'prompt'"
    assert said in printed


def test_an_engine_without_the_gate_behind_one_that_was_refused(tmp_path: Path):
    """Its first answer raised GateError, and 129 choices were too many for it."""
    script = tmp_path / "behind.py"
    script.write_text(BEHIND)
    printed = run(script, tiny_model("qwen3", tmp_path / "model"))
    assert "refused: --deterministic-gate does not work with --enable-lora" in printed
    assert "answers: 129" in printed
