"""What the gate sets by itself: sizes, runners of experts, pools and attention."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import server_arguments
from server_arguments import backends

from benchmark.models import mxfp4
from margingate.config import GateConfig, GateError
from margingate.harness.tiny_models import tiny_model
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.model import architectures
from margingate.runtime.start import arguments, pools

# Fixtures: pytest finds them by their names here.
folder = server_arguments.folder
make = server_arguments.make
put_back = server_arguments.put_back
server_args_class = server_arguments.server_args_class


@pytest.mark.parametrize(("device", "sizes"), [("cpu", (16, 64)), ("cuda", (64, 512))])
def test_sizes_default_by_device_and_given_ones_stand(device, sizes):
    from margingate.runtime.start.arguments import _with_device_defaults

    def server(device, chunk=8192, graphs=None, requests=None):
        config = SimpleNamespace(decode=graphs)
        return SimpleNamespace(
            device=device,
            chunked_prefill_size=chunk,
            cuda_graph_config=config,
            max_running_requests=requests,
        )

    config = _with_device_defaults(GateConfig(), server(device))
    assert (config.rows, config.prefill_chunk) == sizes
    given = GateConfig(rows=3, prefill_chunk=7)
    assert _with_device_defaults(given, server(device)) == given
    small = SimpleNamespace(backend="full", bs=[1, 8, 16], max_bs=16)
    tight = _with_device_defaults(GateConfig(), server("cuda", 128, small))
    assert (tight.rows, tight.prefill_chunk) == (16, 128)
    stock = _with_device_defaults(GateConfig(fast_path="stock"), server("cuda", 128, small))
    assert stock.rows == 128
    large = SimpleNamespace(backend="full", bs=[1, 256], max_bs=256)
    for graphs in (large, None):
        assert _with_device_defaults(GateConfig(), server("cuda", 512, graphs, 12)).rows == 12
    stock = _with_device_defaults(GateConfig(fast_path="stock"), server("cuda", requests=12))
    assert stock.rows == 12


def test_a_gate_sets_experts_that_take_rows(make, tmp_path):
    """For gpt-oss SGLang would take kernels whose routing has no axis of rows."""
    folder = str(tiny_model("gpt_oss", tmp_path))
    args = settings.view(make(model_path=folder, device="cpu", deterministic_gate=True))
    assert args.moe_runner_backend == "triton"
    stock = settings.view(make(model_path=folder, device="cpu"))
    assert stock.moe_runner_backend == "triton", "of the host's, whose experts are torch operators"


def test_gpt_oss_in_mxfp4_runs_by_triton_kernels_and_no_other_model_does(make, folder, tmp_path):
    """As SGLang chooses on Hopper. `triton` makes the weights BF16, which is served as such."""
    source, packed = tiny_model("gpt_oss", tmp_path), tmp_path / "packed"
    mxfp4.make(source, packed)
    for gate in (True, False):
        args = settings.view(make(model_path=str(packed), device="cpu", deterministic_gate=gate))
        assert args.moe_runner_backend == "triton_kernel" and args.dtype == "bfloat16"
    options = {"device": "cpu", "deterministic_gate": True}
    asked = make(model_path=str(packed), moe_runner_backend="triton", **options)
    assert settings.view(asked).moe_runner_backend == "triton"
    for path in (str(source), folder):
        with pytest.raises(GateError, match=r"--moe-runner-backend.*: use triton"):
            make(model_path=path, moe_runner_backend="triton_kernel", **options)
    for runner in ("marlin", "flashinfer_mxfp4"):
        with pytest.raises(GateError, match=r"--moe-runner-backend.*: use triton"):
            make(model_path=str(packed), moe_runner_backend=runner, **options)


def test_a_gate_leaves_the_experts_of_others_to_sglang(make, folder):
    args = settings.view(make(model_path=folder, device="cpu", deterministic_gate=True))
    assert args.disable_hybrid_swa_memory and args.moe_runner_backend == "auto"


@pytest.mark.parametrize("path", [None, "none", "/nowhere"])
def test_a_model_that_cannot_be_read_has_no_architecture(path):
    assert architectures.architectures(SimpleNamespace(model_path=path, revision=None)) == ()


def test_two_pools_are_kept_if_asked_for_where_few_rows_are_replayed(make, tmp_path):
    folder = str(tiny_model("gpt_oss", tmp_path))
    chosen = {
        "": {},
        "no --swa-full-tokens-ratio asks for two": {"swa_full_tokens_ratio": None},
        "with --gate-fast-path stock": {"gate_fast_path": "stock"},
        "a study replays": {"gate_study": True},
        "--gate-repair column": {"gate_repair": "column"},
        "an audit compares": {"gate_audit_rate": "0.5"},
        "two pools take the gate's radix tree": {"disable_radix_cache": True},
        "--disable-hybrid-swa-memory is set": {"disable_hybrid_swa_memory": True},
    }
    for reason, options in chosen.items():
        given = {"swa_full_tokens_ratio": 0.2} | options
        made = make(model_path=folder, device="cpu", deterministic_gate=True, **given)
        args, config = settings.view(made), gate_config(made)
        assert args.disable_hybrid_swa_memory is bool(reason), reason
        assert pools.why_one(args, config).startswith(reason) and config is not None
    given = SimpleNamespace(**dict.fromkeys(BACKENDS), disable_radix_cache=False, model_path=folder)
    given.revision, given.disable_hybrid_swa_memory = None, False
    given.swa_full_tokens_ratio = 0.2
    assert pools.why_one(given, GateConfig()) == ""
    given.decode_attention_backend = "flashinfer"
    assert pools.why_one(given, GateConfig()) == "two pools take attention by triton"
    config = json.loads((Path(folder) / "config.json").read_text())
    config["layer_types"] = ["sliding_attention"] * 4
    (Path(folder) / "config.json").write_text(json.dumps(config))
    given.decode_attention_backend = None
    assert pools.why_one(given, GateConfig()).startswith("its layers are not some with a window")


BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def test_the_room_of_one_pool_and_of_two():
    """gpt-oss-20b: 12 layers of each kind, of which the windowed ones would keep 0.8 as much."""
    assert pools.room_of_two(90_000, 12, 12, 0.8) == 100_000
    assert pools.room_of_two(1000, 0, 4, 1.0) == 1000


@pytest.mark.parametrize(
    ("config", "flashinfer", "chosen"),
    [
        (GateConfig(), True, "triton"),
        (GateConfig(fast_path="stock"), True, "flashinfer"),
        (GateConfig(fast_path="stock"), False, "triton"),
        (GateConfig(policy="observe", study=True, overlap="off"), True, "flashinfer"),
        (GateConfig(policy="observe"), True, None),
    ],
)
def test_the_attention_of_a_gpu_depends_on_the_path(monkeypatch, config, flashinfer, chosen):
    from margingate.runtime.start import arguments

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sglang.srt.utils.is_flashinfer_available", lambda: flashinfer)
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    args = SimpleNamespace(device="cuda", **dict.fromkeys(names))
    assert arguments._attention(args, config) == chosen
    args.attention_backend = "fa3"
    assert arguments._attention(args, config) is None


@pytest.mark.parametrize(
    ("decode", "reason", "made"),
    [
        ("triton", "", ["triton"]),
        ("triton", "a head has 80 lanes", ["triton"]),
        ("flashinfer", "", ["triton"]),
        ("flashinfer", "a head has 80 lanes", ["triton", "flashinfer"]),
    ],
)
def test_the_verifier_has_the_gates_kernels_beside_other_attention(
    monkeypatch, decode, reason, made
):
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    from margingate.runtime.attention import layer_rules, verify_backend

    built = []

    def build(*, model_runner, backend_str, init_new_workspace):
        model_runner.init_new_workspace = init_new_workspace
        built.append(backend_str)
        return backend_str

    monkeypatch.setattr(attention_backend_setup, "_build_full_attention_backend_from_str", build)
    monkeypatch.setattr(layer_rules, "unfit", lambda backend, runner: reason)
    runner = SimpleNamespace(
        server_args=backends("cuda", decode),
        init_new_workspace=False,
        model=SimpleNamespace(modules=list),
    )
    assert verify_backend._attention(runner) == made[-1]
    assert built == made
    assert runner.init_new_workspace is False


def test_a_fused_all_reduce_that_sglang_would_choose_by_itself_is_off(tmp_path):
    """SGLang's own passes over the arguments that the gate has set, as if on a Hopper GPU.

    The model is a folder: of another name SGLang would ask the hub.
    """
    from sglang.srt.arg_groups import overrides
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

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
