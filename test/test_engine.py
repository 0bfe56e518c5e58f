"""`sglang.Engine(deterministic_gate=True)`, as a user's program has it: examples/engine.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from margingate.core.choice_seeds import choice_seed
from margingate.harness.servers import CPU_ENV

EXAMPLE = Path(__file__).parents[1] / "examples" / "engine.py"


def test_the_engine_alone_and_in_a_batch(model):
    """On the stock path, so that the gate has work; the example ends with 1 if answers differ."""
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--model-path", model, "--fast-path", "stock"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **CPU_ENV},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("same ")]) == 5
    counts = dict(re.findall(r"^(\w+): (\d+)$", done.stdout, re.MULTILINE))
    assert int(counts["steps"]) > 100
    assert int(counts["flagged"]) > 0 and int(counts["verified"]) > 0
    assert re.search(r"^fingerprints: [0-9a-f]{16}$", done.stdout, re.MULTILINE)
    seeds = [choice_seed(7, i) for i in range(3)]
    assert f"choices: {' '.join(f'same with seed {seed};' for seed in seeds)}" in lines
    said = "opted out: {'gated': False, 'because': 'deterministic is false', 'prompt'"
    assert said in done.stdout
