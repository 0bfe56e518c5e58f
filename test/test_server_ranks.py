"""Two tensor-parallel ranks, on the host: they flip, roll back, retract and release alike."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from checks import assert_clean, assert_gate_worked, assert_same, forced

from margingate.harness.client import Client, Prompt
from margingate.harness.servers import retracting

TOKENS, LONG = 24, {"ignore_eos": True}
# The host has no NCCL to be used, and a core for each rank.
ENVIRONMENT = {
    "SGLANG_NCCL_SO_PATH": "/nowhere",
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    **retracting(20),
}


@pytest.fixture(scope="module")
def divisible(model, tmp_path_factory) -> Path:
    """A small model with a number of heads that two ranks can share; dummy weights need no file."""
    folder = tmp_path_factory.mktemp("model") / "divisible"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    file.write_text(json.dumps({**config, **sizes, "num_hidden_layers": 6}))
    return folder


@pytest.fixture(scope="module")
def made_up() -> list[Prompt]:
    draw = random.Random(11).randrange
    return [Prompt(f"p{i}", tuple(draw(10, 30000) for _ in range(20 + i))) for i in range(8)]


def test_ranks_verify_and_repair_alike(start, divisible, made_up):
    server = start(
        *("--tp-size", "2", "--load-format", "dummy", "--model-path", str(divisible)),
        *("--gate-debug", "--gate-inject-faults", "--gate-guarantee", "exact"),
        *("--gate-overlap", "on", "--gate-max-delay", "4"),
        env=ENVIRONMENT,
    )
    client = Client(server.base_url, TOKENS)
    alone = client.alone(made_up, sampling_params=LONG)
    before = client.gate_state()
    answers = client.together(made_up, sampling_params=forced([2, 9, 15]) | LONG)
    assert_same(alone, answers)
    after = client.gate_state()
    assert_gate_worked(before, after, batch=4)
    assert after["flips"] - before["flips"] >= 2 * len(made_up)
    assert after["retractions"] > before["retractions"]
    assert after["merged_passes"] > before["merged_passes"]
    assert after["missed"] == 0 and server.healthy()
    assert_clean(client)
