"""Kernels of the batch-invariant matmul compiled side by side: who compiles what, and failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from margingate.runtime.compat.compute import batch_invariant_matmul
from margingate.runtime.probe.measuring import compile_kernels

COUNTS = [*range(1, 17), *range(24, 257, 8)]


class OnCuda:
    is_cuda, dtype, shape, device = True, torch.bfloat16, (64, 32), torch.device("cuda", 1)


@pytest.mark.parametrize("processes", [1, 3, 12])
@pytest.mark.parametrize("weights", [1, 2, 5])
def test_every_count_of_every_weight_is_some_processes(processes: int, weights: int) -> None:
    shapes = [(64 * (i + 1), 32) for i in range(weights)]
    made = [type("W", (OnCuda,), {"shape": shape})() for shape in shapes]
    needs = [(weight, COUNTS[: len(COUNTS) - i]) for i, weight in enumerate(made)]
    dealt = compile_kernels._dealt(needs, processes)
    assert len(dealt) == processes
    lengths = [len(lines) for lines in dealt]
    assert max(lengths) - min(lengths) <= 1, "none has more to compile than the others"
    met = [tuple(map(int, line.split())) for lines in dealt for line in lines]
    expected = [(*weight.shape, count) for weight, counts in needs for count in counts]
    assert sorted(met) == sorted(expected), "none twice"
    assert [int(lines[0].split()[2]) for lines in dealt] == COUNTS[:processes], "in order"


class Started(list):
    """Processes that read their lines, and of which each second one fails."""

    def __call__(self, command, **options):
        assert command[:3] == [
            sys.executable,
            "-m",
            "margingate.runtime.probe.measuring.compile_kernels",
        ]
        assert command[3:] == ["1"]
        code = f"import sys; sys.stdin.read(); raise SystemExit({len(self) % 2})"
        self.append(real([sys.executable, "-c", code], **options))
        return self[-1]


real = subprocess.Popen


@pytest.fixture
def started(monkeypatch):
    made = Started()
    monkeypatch.setattr(compile_kernels.subprocess, "Popen", made)
    monkeypatch.setattr(compile_kernels, "_room_for", lambda: 4)
    monkeypatch.setattr(compile_kernels, "is_deep_gemm", lambda weight: weight.is_cuda)
    return made


def all_gone(processes):
    return all(process.poll() is not None and process.stdin.closed for process in processes)


def test_a_process_that_fails_costs_only_time(started, monkeypatch, caplog):
    monkeypatch.setattr(compile_kernels, "_compiles", lambda _: True)
    with caplog.at_level("INFO"):
        compile_kernels.compile_ahead([(OnCuda(), COUNTS)])
    assert len(started) == 4 and "kernels in 2 of 4 processes" in caplog.text
    assert all_gone(started)


def test_nothing_is_waited_for_where_nothing_is_missing(started, monkeypatch, caplog):
    monkeypatch.setattr(compile_kernels, "_compiles", lambda _: False)
    with caplog.at_level("INFO"):
        compile_kernels.compile_ahead([(OnCuda(), COUNTS)])
    assert "kernels in" not in caplog.text and all_gone(started)
    made = len(started)
    compile_kernels.compile_ahead([(torch.zeros(4, 4), COUNTS)])
    assert len(started) == made, "not for a layer that DeepGEMM does not run"


def test_processes_that_were_not_needed_are_gone(started):
    with pytest.raises(ZeroDivisionError), compile_kernels.Compilers([OnCuda()]):
        raise ZeroDivisionError
    assert len(started) == 4 and all_gone(started)


def test_one_kernel_that_is_missing_is_enough_to_know(started, monkeypatch):
    """To find out takes as long as to compile one."""
    asked = []

    def compiles(weight):
        asked.append(weight)
        return len(asked) == 2

    monkeypatch.setattr(compile_kernels, "_compiles", compiles)
    weights = [OnCuda() for _ in range(4)]
    compile_kernels.compile_ahead([(weight, [1, 16]) for weight in weights])
    assert asked == weights[:2]


def test_a_process_that_has_ended_is_no_error(monkeypatch, started, caplog):
    monkeypatch.setattr(compile_kernels, "_compiles", lambda _: True)
    with caplog.at_level("INFO"), compile_kernels.Compilers([OnCuda()]) as compilers:
        for process in started:
            process.kill()
            process.wait()
        compilers.compile([(OnCuda(), COUNTS * 2000)])
    assert "kernels in 0 of 4 processes" in caplog.text and all_gone(started)


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(compile_kernels, "PATIENCE_S", 0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert compile_kernels._status(process) != 0 and process.poll() is not None


class Switched:
    """DeepGEMM's switch between its own kernels and cuBLASLt's, from version 0.2 on."""

    switch = False

    @classmethod
    def get_deterministic_algorithms(cls):
        return cls.switch

    @classmethod
    def use_deterministic_algorithms(cls, wanted):
        cls.switch = wanted


def test_deep_gemms_own_kernels_are_asked_for_meanwhile():
    library = type("DeepGemm", (Switched,), {})
    with pytest.raises(ZeroDivisionError), batch_invariant_matmul.deterministic(library):
        assert library.switch
        raise ZeroDivisionError
    assert not library.switch
    library.switch = True
    with batch_invariant_matmul.deterministic(library):
        assert library.switch
    assert library.switch, "as it was"
    with batch_invariant_matmul.deterministic(object()):  # an older one has no other kernels
        pass


class Bf16OnCuda:
    """A weight on a GPU, as far as it is asked about."""

    is_cuda, dtype = True, torch.bfloat16

    def __init__(self, outputs, inputs, contiguous=True, **changes):
        self.shape, self.contiguous = (outputs, inputs), contiguous
        vars(self).update(changes)

    def element_size(self):
        return self.dtype.itemsize

    def is_contiguous(self):
        return self.contiguous


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (Bf16OnCuda(64, 32), True),
        (Bf16OnCuda(16, 8), True),
        (Bf16OnCuda(8, 32), False),
        (Bf16OnCuda(64, 36), False),
        (Bf16OnCuda(68, 32), False),
        (Bf16OnCuda(64, 32, contiguous=False), False),
        (Bf16OnCuda(64, 32, dtype=torch.float16), False),
        (Bf16OnCuda(64, 32, is_cuda=False), False),
    ],
)
def test_deep_gemm_runs_where_sglang_runs_it(monkeypatch, weight, expected):
    """Held to SGLang's own choice, on a CPU tensor of the same kind."""
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    monkeypatch.setattr(ops, "ENABLE_JIT_DEEPGEMM", True)
    monkeypatch.setattr(ops, "_ENABLE_MM_DEEPGEMM", True)
    assert batch_invariant_matmul.is_deep_gemm(weight) is expected
    if not weight.is_cuda:
        return
    ran = []
    monkeypatch.setattr(ops, "_matmul_persistent_deepgemm", lambda **_: ran.append("deep_gemm"))
    monkeypatch.setattr(ops, "_matmul_persistent_triton", lambda **_: ran.append("triton"))
    outputs, inputs = weight.shape
    made = torch.zeros(outputs, inputs, dtype=weight.dtype)
    if not weight.contiguous:
        made = torch.zeros(outputs, 2 * inputs, dtype=weight.dtype)[:, :inputs]
    x = torch.zeros(3, inputs, dtype=weight.dtype)
    batch_invariant_matmul.invariant_matmul(x, weight=made, bias=None)
    assert ran == ["deep_gemm" if expected else "triton"]


def test_the_script_compiles_what_its_lines_say(monkeypatch):
    met = []

    class DeepGemm(Switched):
        @staticmethod
        def bf16_gemm_nn(rows, weight, results):
            assert DeepGemm.switch, "else it is cuBLASLt, and nothing is compiled"
            met.append((tuple(weight.T.shape), len(rows)))
            assert results.shape == (len(rows), weight.shape[1]) and rows.stride(0) == 8

    zeros = torch.zeros
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGemm)
    monkeypatch.setattr(torch.cuda, "set_device", met.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: zeros(size, dtype=dtype))
    monkeypatch.setattr(sys, "stdin", ["64 32 1\n", "64 32 200\n", "48 4096 3\n"])
    compile_kernels.main(["3"])
    assert met == [3, ((64, 32), 1), ((64, 32), 200), ((48, 4096), 3)]
    assert not DeepGemm.switch


def test_on_a_cpu_it_is_not_deep_gemm():
    assert not batch_invariant_matmul.is_deep_gemm(torch.zeros(64, 32, dtype=torch.bfloat16))
