"""Every setting of SGLang was looked at: it is in the fingerprint, refused, or has no effect."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments import environment, request_table, settings, settings_table
from margingate.runtime.compat.arguments.settings_table import (
    ARITHMETIC,
    COUNTED,
    NO_EFFECT,
    REFUSED,
)
from margingate.runtime.compat.process import machine

MakeArgs = Callable[..., Any]


def sglang_classes() -> dict[str, type]:
    from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    found = (SamplingParams, GenerateReqInput, TokenizedGenerateReqInput)
    return {kind.__name__: kind for kind in found}


@pytest.fixture(scope="module")
def make_args() -> MakeArgs:
    """SGLang's defaults and these changes, in place of ServerArgs; nothing resolved, no server."""
    from sglang.srt.server_args import ServerArgs

    defaults = {"model_path": None} | settings_table.defaults(ServerArgs)

    def made(**changes: Any) -> Any:
        assert changes.keys() <= defaults.keys()
        return SimpleNamespace(**(defaults | changes))

    return made


# The tables are whole


def test_every_field_of_the_server_is_in_one_place_with_a_reason():
    from sglang.srt.server_args import ServerArgs

    rows = list(settings_table.rows(settings_table.GROUPS))
    named = Counter(name for name, _, _ in rows)
    assert set(named) == set(ServerArgs.__struct_fields__) - settings_table.GONE.keys()
    assert max(named.values()) == 1
    assert all(kind and len(reason) > 5 for _, kind, reason in rows)


@pytest.mark.parametrize("kind", request_table.TABLES)
def test_every_field_of_a_request_is_in_one_place_with_a_reason(kind):
    named = Counter(name for name, _ in request_table.rows(kind))
    assert set(named) == set(request_table.fields_of(sglang_classes()[kind]))
    assert max(named.values()) == 1
    assert all(len(reason) > 5 for _, reason in request_table.rows(kind))


# What nobody has looked at


def test_a_field_that_nobody_has_looked_at_is_refused_unless_it_is_at_its_default(monkeypatch):
    from sglang.srt import server_args
    from sglang.srt.server_args import ServerArgs

    from margingate.runtime.start.refusals import refuse_server

    def make_args(**changes: Any) -> Any:
        return SimpleNamespace(**({"model_path": None} | settings_table.defaults(newer) | changes))

    new = {"enable_wonder": False, "wonders": []}
    fields = [*settings_table.defaults(ServerArgs).items(), *new.items()]
    newer = msgspec.defstruct("Newer", [(name, Any, value) for name, value in fields])
    monkeypatch.setattr(server_args, "ServerArgs", newer)
    refuse_server(make_args(**new))
    for name, value in (("enable_wonder", True), ("wonders", [1])):
        with pytest.raises(GateError) as caught:
            refuse_server(make_args(**(new | {name: value})))
        option = "--" + name.replace("_", "-")
        assert str(caught.value).startswith(
            f"--deterministic-gate does not work with {option}, which nobody has looked at in "
        )


def test_a_field_of_a_request_that_nobody_has_looked_at_is_refused_where_it_is_set():
    known = sglang_classes()["GenerateReqInput"]

    @dataclass
    class GenerateReqInput(known):  # type: ignore[misc, valid-type]
        wonder: int | None = None

    assert request_table.unseen(GenerateReqInput(text="a")) == ""
    text = request_table.unseen(GenerateReqInput(text="a", wonder=1))
    assert text == "the deterministic gate does not know what wonder does: drop it."
    assert request_table.unseen(SimpleNamespace(wonder=1)) == "", "no request for an answer"


# Refused

OTHER = {
    **dict.fromkeys(
        [
            "pp_size",
            "dcp_size",
            "attn_cp_size",
            "moe_dp_size",
            "dwdp_size",
            "moe_dense_tp_size",
            "page_size",
            "tokenizer_worker_num",
            "cpu_offload_gb",
            "offload_group_size",
        ],
        2,
    ),
    "kv_cache_dtype": "fp8_e5m2",
    "disaggregation_mode": "decode",
    "decoupled_spec_role": "drafter",
    "kv_canary": "log",
    "attn_dp_size": 2,
    "forward_hooks": [{"name": "one"}],
}


def other(name: str, args: Any) -> Any:
    """Another value than the default."""
    value = getattr(args, name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else "another"


@pytest.mark.parametrize("name", settings_table.names(REFUSED))
def test_each_field_that_is_called_refused_is_refused(make_args, name):
    from margingate.runtime.start.refusals import refuse_server

    args = make_args()
    refuse_server(args)
    setattr(args, name, other(name, args))
    with pytest.raises(GateError, match=r"^--deterministic-gate does not work with --"):
        refuse_server(args)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "mxfp8", "nvfp4", "fp4_mx_block16"])
def test_columns_of_fewer_bits_are_refused(make_args, name):
    from margingate.runtime.start.refusals import refuse_server

    with pytest.raises(GateError, match="--kv-cache-dtype, because K/V columns of another type"):
        refuse_server(make_args(kv_cache_dtype=name))


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("auto", torch.float16, False),
        ("bf16", torch.bfloat16, False),
        ("bf16", torch.float16, True),
        ("bfloat16", torch.float32, True),
    ],
)
def test_columns_have_the_type_of_the_model(name, dtype, refused):
    from margingate.runtime.start.refused_models import refuse_column_type

    config = SimpleNamespace(dtype=dtype)
    args = SimpleNamespace(kv_cache_dtype=name, _model_config=config)
    if not refused:
        refuse_column_type(args)
        return
    with pytest.raises(GateError, match=f"--kv-cache-dtype is {name}, but the model's type"):
        refuse_column_type(args)


def test_columns_that_a_checkpoint_scales_are_refused():
    from margingate.runtime.start.refused_models import refuse_columns

    model = torch.nn.Sequential(torch.nn.Identity())
    runner = SimpleNamespace(model=model, dtype=torch.bfloat16, kv_cache_dtype=torch.bfloat16)
    refuse_columns(runner)
    model[0].k_scale_float = 1.0
    refuse_columns(runner)
    model[0].k_scale_float = 0.5
    with pytest.raises(GateError, match="because 0 scales its K/V columns"):
        refuse_columns(runner)
    runner.kv_cache_dtype = torch.float8_e4m3fn
    with pytest.raises(GateError, match=r"K/V columns are torch\.float8_e4m3fn and it computes in"):
        refuse_columns(runner)


@pytest.mark.parametrize("kind", ["decoder_bidirectional", "encoder_only"])
def test_a_prompt_that_sees_its_later_tokens_is_refused(kind):
    """HRM-Text's on the stock path: the gate cut such prompts, which SGLang leaves whole."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    from margingate.runtime.start.refused_models import refuse_other_masks

    model = torch.nn.Sequential(RadixAttention(2, 8, 1.0, 2, 0))
    refuse_other_masks(model, GateConfig(rows=8))
    model.append(RadixAttention(2, 8, 1.0, 2, 1, attn_type=AttentionType(kind)))
    with pytest.raises(GateError, match=rf"because 1 lets tokens .* later ones \({kind}\): serve"):
        refuse_other_masks(model, GateConfig(rows=8))
    refuse_other_masks(model, GateConfig(rows=8, policy="observe"))


def test_a_fused_all_reduce_that_sglang_would_choose_by_itself_is_off(tmp_path):
    """SGLang's own passes over the arguments that the gate has set, as if on a Hopper GPU.

    The model is a folder: of another name SGLang would ask the hub.
    """
    from sglang.srt.arg_groups import overrides
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    from margingate.runtime.start import arguments

    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))
    args = ServerArgs(model_path=str(tmp_path), tp_size=2, device="cuda")
    args._model_config = model
    with override_platform(is_sm90=True):
        assert overrides._flashinfer_allreduce_fusion_auto_enable(settings.view(args)) == {
            "flashinfer_allreduce_fusion_backend": "auto"
        }
        arguments._prepare(args, GateConfig())
        overrides.run_post_process_pass(args, overrides._flashinfer_allreduce_fusion_auto_enable)
        overrides.run_post_process_pass(args, overrides._enforce_disable_allreduce_fusion)
    assert settings.view(args).flashinfer_allreduce_fusion_backend is None


# In the fingerprint


@pytest.mark.parametrize("name", settings_table.names(ARITHMETIC, COUNTED))
def test_servers_that_differ_in_a_setting_that_counts_have_other_fingerprints(make_args, name):
    from margingate.runtime.observe import fingerprint

    def value(args: Any) -> Any:
        parts = {"arguments": fingerprint.arguments(args)}
        return fingerprint.Fingerprint(parts, lambda: "w", lambda: True).of()["fingerprint"]

    args = make_args()
    assert value(args) == value(make_args())
    assert value(args) != value(make_args(**{name: other(name, args)}))


@pytest.mark.parametrize("name", settings_table.names(ARITHMETIC))
def test_the_probe_is_redone_where_a_setting_reaches_the_arithmetic(monkeypatch, make_args, name):
    from margingate.runtime.probe.measuring import cache

    def key(args: Any) -> Any:
        runner = SimpleNamespace(
            model_config=SimpleNamespace(model_path="/m"),
            attn_backend=None,
            device="cpu",
            server_args=args,
        )
        return cache.identity(runner, ["a"], 64)

    monkeypatch.setattr(cache.ranks, "tp_rank", lambda: 0)
    args = make_args()
    assert key(args) == key(make_args())
    assert key(args) != key(make_args(**{name: other(name, args)}))


def test_settings_without_effect_are_not_in_it(make_args):
    from margingate.runtime.observe import fingerprint

    assert not set(fingerprint.ARGUMENTS) & set(settings_table.names(NO_EFFECT))
    assert fingerprint.arguments(make_args()) == fingerprint.arguments(
        make_args(port=1, random_seed=2, log_level="debug", max_running_requests=3)
    )


def test_the_text_of_a_file_counts_and_not_its_name(make_args, tmp_path):
    from margingate.runtime.observe import fingerprint

    for name in fingerprint.READ:
        for number in (1, 2):
            (tmp_path / f"{name}{number}").write_text("the same")
        one, two = (
            fingerprint.arguments(make_args(**{name: str(tmp_path / f"{name}{number}")}))
            for number in (1, 2)
        )
        assert one == two
        assert one[name] == "the same"


def test_what_the_prefill_graphs_became_counts(make_args):
    from margingate.runtime.observe import fingerprint

    def arguments(backend: str) -> Any:
        graphs = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        return fingerprint.arguments(make_args(cuda_graph_config=graphs))

    assert arguments("breakable") != arguments("disabled")


# Variables and machines


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
    from margingate.runtime.observe import fingerprint
    from margingate.runtime.probe.measuring import cache

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


@pytest.mark.parametrize("name", ["tekken.json", "params.json", "spiece.vocab", "chat.jinja"])
def test_files_of_every_kind_of_tokenizer_count(tmp_path, name):
    from margingate.runtime.observe import fingerprint

    (tmp_path / "config.json").write_text("{}")
    before = fingerprint.files(str(tmp_path), str(tmp_path), None)
    (tmp_path / name).write_text("{}")
    assert fingerprint.files(str(tmp_path), str(tmp_path), None) != before


# A hook is seen to fire


def test_a_command_line_whose_arguments_carry_no_settings_ends_the_start(monkeypatch):
    from margingate.runtime.start import arguments

    asked = argparse.Namespace(deterministic_gate=True)
    monkeypatch.setattr(arguments, "attach", lambda made, options: None)
    with pytest.raises(SystemExit) as caught:
        arguments.from_command_line(lambda cls, args: SimpleNamespace(), object, asked)
    text = str(caught.value.code)
    assert text.startswith("margingate: --deterministic-gate was given, but SGLang made its")
    assert "ServerArgs.from_cli_args" in text
    good = SimpleNamespace(_margingate=GateConfig())
    assert arguments.from_command_line(lambda cls, args: good, object, asked) is good
    plain = argparse.Namespace(deterministic_gate=False)
    assert arguments.from_command_line(lambda cls, args: None, object, plain) is None


def test_settings_that_were_never_checked_end_the_start():
    from margingate.runtime.start import arguments

    arguments.confirm_settings(SimpleNamespace(_margingate=GateConfig(rows=16)))
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.resolve_once"):
        arguments.confirm_settings(SimpleNamespace(_margingate=GateConfig()))
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.from_cli_args"):
        arguments.confirm_settings(SimpleNamespace())


def test_an_engine_whose_arguments_carry_no_settings_launches_nothing(monkeypatch):
    """Its first one began before there was any hook, and ignores what it is given beside them."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    from margingate.runtime.start.engine import gate_to_launch

    seen = []
    monkeypatch.setattr(
        Engine,
        "_launch_subprocesses",
        classmethod(lambda cls, server_args, **_rest: seen.append(gate_to_launch(server_args))),
    )
    monkeypatch.setattr("atexit.register", lambda function: None)
    given = ServerArgs(model_path="dummy")
    for keywords in ({"deterministic_gate": True}, {"deterministic_gate": True, "gate_rows": 8}):
        with pytest.raises(GateError, match="give all arguments as keywords, without server_args"):
            Engine(server_args=given, **keywords)
    with pytest.raises(TypeError):  # of the launch that is none
        Engine(server_args=given)
    given._margingate = config = GateConfig(rows=16)
    with pytest.raises(TypeError):
        Engine(server_args=given, deterministic_gate=True)
    assert seen == [None, config]
    assert gate_to_launch(SimpleNamespace()) is None, "the wish ends with the Engine"


def test_a_scheduler_that_no_hooked_launcher_started_does_not_come_up():
    from margingate.runtime.start.install import confirm_launcher

    with pytest.raises(GateError, match=r"went around Engine\._launch_subprocesses"):
        confirm_launcher(SimpleNamespace())
    confirm_launcher(SimpleNamespace(_margingate_launched=True))
