"""What counts of the environment: variables, what the processor can do, libraries."""

from __future__ import annotations

import pytest

from margingate.runtime.compat.arguments import environment
from margingate.runtime.compat.process import machine
from margingate.runtime.observe import fingerprint
from margingate.runtime.probe.measuring import cache


@pytest.mark.parametrize(
    "name",
    [
        "ONEDNN_MAX_CPU_ISA",
        "DNNL_MAX_CPU_ISA",
        "ATEN_CPU_CAPABILITY",
        "MKL_ENABLE_INSTRUCTIONS",
        "MKL_CBWR",
        "NVIDIA_TF32_OVERRIDE",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TORCH_BLAS_PREFER_CUBLASLT",
        "CUBLASLT_WORKSPACE_SIZE",
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
        "NCCL_ALGO",
        "NCCL_PROTO",
        "NCCL_NVLS_ENABLE",
        "OMP_NUM_THREADS",
        "TRTLLM_ENABLE_PDL",
        "TORCH_MKLDNN_MATMUL_MIN_DIM",
        "TORCH_COMPILE_DISABLE",
        "SGLANG_ENABLE_JIT_DEEPGEMM",
        "SGLANG_USE_1STAGE_ALLREDUCE",
        "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2",
        "SGLANG_FORCE_FUSED_OP_BACKEND",
        "SGLANG_DEFAULT_THINKING",
        "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM",
        "SGLANG_ROPE_CACHE_FP32",
        "DISABLE_ADDMM_CUDA_LT",
        "SGLANG_CUSTOM_ALL_REDUCE_V2_MAX_SIZE_KB",
        "SGLANG_RETURN_ORIGINAL_LOGPROB",
        "SGLANG_PLUGINS",
        "GLIBC_TUNABLES",
        "NPY_DISABLE_CPU_FEATURES",
    ],
)
def test_variables_that_choose_kernels_or_read_requests_count(monkeypatch, name):
    before = environment.chosen()
    monkeypatch.setenv(name, "another")
    assert environment.chosen() == before | {name: "another"}


@pytest.mark.parametrize(
    "name",
    [
        "HOME",
        "PATH",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_VISIBLE_DEVICES",
        "TRITON_CACHE_DIR",
        "SGLANG_RUN_ID",
        "NCCL_DEBUG",
        "SGLANG_LOG_MS",
        "SGLANG_TORCH_PROFILER_DIR",
        "SGLANG_PORT",
        "SGLANG_WARMUP_TIMEOUT",
        "ONEDNN_VERBOSE",
        "CUDA_VERSION",
        "TORCH_LOGS",
        "TORCHINDUCTOR_CACHE_DIR",
        "SGLANG_TEST_RETRACT",
        "NVIDIA_VISIBLE_DEVICES",
        "XDG_CACHE_HOME",
        "LD_LIBRARY_PATH",
        "SGLANG_CUDA_COREDUMP_DIR",
        "CUTE_DSL_LIBS",
        "OMP_WAIT_POLICY",
    ],
)
def test_variables_that_place_files_and_processes_do_not_count(name):
    assert not environment.counts(name)


X86 = "model name\t: AMD EPYC\nflags\t\t: fpu sse4_2 avx2 {}hypervisor fma\ncache size\t: {}\n"


def test_a_virtual_machine_is_told_by_what_its_cpu_can_do():
    plain = machine.units_of(X86.format("", "512 KB"))
    assert plain == {"instructions": "avx2 fma sse4_2", "cache size": "512 KB"}
    assert machine.units_of(X86.format("avx512_bf16 ", "512 KB")) != plain
    assert machine.units_of(X86.format("", "1024 KB")) != plain
    two = X86.format("", "512 KB") + "\n" + X86.format("avx512f ", "1 KB")
    assert machine.units_of(two) == plain, "of the first"
    assert machine.units_of("") == {"instructions": ""}
    assert machine.units_of("Features\t: fp asimd sve bf16\n")["instructions"] == (
        "asimd bf16 fp sve"
    )
    assert "instructions" in machine.arithmetic_units("cpu")


def test_libraries_that_read_requests_and_write_answers_count(monkeypatch):
    here = fingerprint.libraries()
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.0"))
    assert fingerprint.libraries() == here | {"libc": "glibc 2.0"} != here
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.99")
    assert fingerprint.libraries()["python"] == "3.99"

    named = [
        "llguidance",
        "xgrammar",
        "outlines",
        "jinja2",
        "sentencepiece",
        "tiktoken",
        "mistral_common",
    ]
    assert set(named) <= set(fingerprint.LIBRARIES)
    assert all(machine.version(name) for name in ("llguidance", "jinja2", "xgrammar"))
    assert cache.NVIDIA == "nvidia-"
    assert set(machine.versions("jinja", "Jinja")) == {"Jinja2"}
