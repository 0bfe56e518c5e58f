"""Kernels of the batch-invariant matmul compiled side by side: who compiles what, and failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from margingate.runtime import invariant_matmul as matmul

COUNTS = [*range(1, 17), *range(24, 257, 8)]


class OnCuda:
    is_cuda, dtype, shape, device = True, torch.bfloat16, (64, 32), torch.device("cuda", 1)


@pytest.mark.parametrize("processes", [1, 3, 12])
@pytest.mark.parametrize("weights", [1, 2, 5])
def test_every_count_of_every_weight_is_some_processes(processes: int, weights: int) -> None:
    shapes = [(64 * (i + 1), 32) for i in range(weights)]
    made = [type("W", (OnCuda,), {"shape": shape})() for shape in shapes]
    needs = [(weight, COUNTS[: len(COUNTS) - i]) for i, weight in enumerate(made)]
    jobs = matmul._jobs(needs, processes)
    assert len(jobs) <= max(processes, weights)
    met = {shape: [] for shape in shapes}
    for device, outputs, inputs, counts in jobs:
        assert device == "1"
        met[int(outputs), int(inputs)] += map(int, counts.split(","))
    assert list(met.values()) == [counts for _, counts in needs], "neighbours together, none twice"


@pytest.fixture
def started(monkeypatch):
    """Jobs, of which each second one fails."""
    jobs: list[list[str]] = []

    def popen(command, **options):
        jobs.append(command[3:])
        assert command[:3] == [sys.executable, "-m", "margingate.runtime.invariant_matmul"]
        return real([sys.executable, "-c", f"raise SystemExit({len(jobs) % 2})"], **options)

    real = subprocess.Popen
    monkeypatch.setattr(matmul.subprocess, "Popen", popen)
    monkeypatch.setattr(matmul, "_processes", lambda: 4)
    monkeypatch.setattr(matmul, "is_deep_gemm", lambda weight: weight.is_cuda)
    return jobs


def test_a_process_that_fails_costs_only_time(started, monkeypatch, caplog):
    monkeypatch.setattr(matmul, "_compiles", lambda _: True)
    with caplog.at_level("INFO"):
        matmul.compile_ahead([(OnCuda(), COUNTS)])
    assert len(started) == 4 and "kernels in 2 of 4 processes" in caplog.text


def test_nothing_is_started_where_nothing_is_missing(started, monkeypatch):
    monkeypatch.setattr(matmul, "_compiles", lambda _: False)
    matmul.compile_ahead([(OnCuda(), COUNTS)])
    matmul.compile_ahead([(torch.zeros(4, 4), COUNTS)])
    assert started == []


def test_one_kernel_that_is_missing_is_enough_to_know(started, monkeypatch):
    """To find out takes as long as to compile one."""
    asked = []

    def compiles(weight):
        asked.append(weight)
        return len(asked) == 2

    monkeypatch.setattr(matmul, "_compiles", compiles)
    weights = [OnCuda() for _ in range(4)]
    matmul.compile_ahead([(weight, [1, 16]) for weight in weights])
    assert asked == weights[:2] and len(started) == 3


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(matmul, "PATIENCE_S", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert matmul._status(process) != 0 and process.poll() is not None


def test_on_a_cpu_it_is_not_deep_gemm():
    assert not matmul.is_deep_gemm(torch.zeros(64, 32, dtype=torch.bfloat16))
