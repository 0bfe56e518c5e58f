"""Settings, variables and attention that the gate is not served with, a sentence each."""

import pkgutil
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import server_arguments
from sentences import sentence
from server_arguments import GATE, backends, exits

from margingate.config import GateConfig, GateError
from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings, settings_table
from margingate.runtime.start import refusals
from margingate.runtime.start.refused_settings import SERVER_REFUSALS, Refusal

# Fixtures: pytest finds them by their names here.
folder = server_arguments.folder
make = server_arguments.make
prepare = server_arguments.prepare
put_back = server_arguments.put_back
server_args_class = server_arguments.server_args_class

# What the gate does not work with

VALUES: dict[str, Any] = {
    "--attn-dp-size": 2,
    "--boundary-reduction": "rs",
    "--startup-weight-load-mode": "overlap",
    "--preferred-sampling-params": '{"deterministic": false}',
    "--speculative-algorithm": "NGRAM",
    "--pp-size": 2,
    "--disaggregation-mode": "prefill",
    "--dcp-size": 2,
    "--attn-cp-size": 2,
    "--dllm-algorithm": "LowConfidence",
    "--kv-canary": "log",
    "--elastic-ep-backend": "mooncake",
    "--rl-on-policy-target": "fsdp",
    "--cuda-graph-backend-prefill": "full",
    "--page-size": 16,
    "--tokenizer-worker-num": 2,
    "--radix-cache-backend": "another",
    "--radix-eviction-policy": "tlru",
    "--kv-cache-dtype": "fp8_e4m3",
    "--quantization-param-path": "scales.json",
    "--flashinfer-allreduce-fusion-backend": "auto",
    "--moe-dp-size": 2,
    "--ep-size": 2,
    "--moe-a2a-backend": "deepep",
    "--moe-runner-backend": "flashinfer_cutlass",
    "--ep-num-redundant-experts": 8,
    "--init-expert-location": "places.json",
    "--dwdp-size": 2,
    "--moe-dense-tp-size": 1,
    "--decoupled-spec-role": "verifier",
    "--modelopt-quant": "fp8",
    "--rl-quant-profile": "profile.pt",
    "--cpu-offload-gb": 1,
    "--offload-group-size": 2,
    "--kt-weight-path": "weights",
    "--forward-hooks": '[{"name": "one"}]',
    "--debug-tensor-dump-output-folder": "dump",
    "--debug-tensor-dump-input-file": "input.npy",
    "--msprobe-dump-config": "probe.json",
}
each_refusal = pytest.mark.parametrize("refusal", SERVER_REFUSALS, ids=lambda r: r.option)


def stand_in(server_args_class: Any, **changes: Any) -> Any:
    """ServerArgs with these fields, not resolved."""
    values = {"model_path": "model"} | settings_table.defaults(server_args_class)
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**(values | changes))


def check_refused(text: str, refusal: Refusal) -> None:
    assert text == (
        f"--deterministic-gate does not work with {refusal.option}, because {refusal.because}: "
        f"{refusal.instead}."
    )


def test_defaults_are_not_refused(server_args_class):
    refusals.refuse_server(stand_in(server_args_class))


def test_the_backend_of_the_gate_itself_is_not_refused(server_args_class):
    refusals.refuse_server(stand_in(server_args_class, radix_cache_backend="margingate"))
    refusals.refuse_server(stand_in(server_args_class, page_size=1, pp_size=1, kv_canary="none"))
    for name in ("lru", "lfu", "slru", "priority"):
        refusals.refuse_server(stand_in(server_args_class, radix_eviction_policy=name))
    tree_off = {"radix_eviction_policy": "tlru", "disable_radix_cache": True}
    refusals.refuse_server(stand_in(server_args_class, **tree_off))


@each_refusal
def test_each_setting_is_refused_by_name(server_args_class, refusal):
    attribute = refusal.option.removeprefix("--").replace("-", "_")
    changes = {attribute: VALUES.get(refusal.option, True)}
    with pytest.raises(GateError) as caught:
        refusals.refuse_server(stand_in(server_args_class, **changes))
    check_refused(sentence(caught.value), refusal)


@each_refusal
def test_each_setting_is_refused_on_the_command_line(prepare, refusal):
    """Before SGLang's own checks of the option, so that the sentence is the gate's."""
    value = [str(VALUES[refusal.option])] if refusal.option in VALUES else []
    check_refused(exits(prepare, GATE, refusal.option, *value), refusal)


def test_prefill_graphs_are_judged_by_what_sglang_resolved(server_args_class):
    for backend, refused in (("full", True), ("tc_piecewise", True), ("breakable", False)):
        prefill = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        changes = {"cuda_graph_config": prefill, "cuda_graph_backend_prefill": None}
        with pytest.raises(GateError) if refused else nullcontext():
            refusals.refuse_server(stand_in(server_args_class, **changes))


def test_hidden_states_are_refused_by_their_other_name_too(prepare):
    text = exits(prepare, GATE, "--return-hidden-states-mode", "last")
    assert "does not work with --enable-return-hidden-states" in text


def variables(refused: Any) -> list[str]:
    return [name for name, found in refusals.VARIABLES.items() if found.refused is refused]


@pytest.mark.parametrize("name", variables(refusals._is_on))
def test_each_variable_that_does_not_go_with_the_gate_is_refused(
    server_args_class, monkeypatch, name
):
    from sglang.srt.environ import EnvInt, envs

    is_level = isinstance(getattr(type(envs), name), EnvInt)
    for value in ("1", "2") if is_level else ("1", "true", "True", "YES", "y"):
        monkeypatch.setenv(name, value)
        assert getattr(envs, name).get() >= 1  # as SGLang reads it
        with pytest.raises(GateError) as caught:
            refusals.refuse_server(stand_in(server_args_class))
        does = refusals.VARIABLES[name].does
        said = f"does not work with {name}={value}, which {does}: unset it."
        assert said in sentence(caught.value)
    for value in ("0", "") if is_level else ("0", "false", "no", ""):
        monkeypatch.setenv(name, value)
        refusals.refuse_server(stand_in(server_args_class))


@pytest.mark.parametrize("name", variables(refusals._is_off))
def test_each_variable_that_the_gate_needs_is_refused_where_it_is_off(
    server_args_class, monkeypatch, name
):
    from sglang.srt.environ import envs

    monkeypatch.delenv(name, raising=False)
    assert getattr(envs, name).get(), "by default"
    for value in ("0", "false", "False", "NO", "n"):
        monkeypatch.setenv(name, value)
        assert not getattr(envs, name).get()  # as SGLang reads it
        with pytest.raises(GateError) as caught:
            refusals.refuse_server(stand_in(server_args_class))
        does = refusals.VARIABLES[name].does
        said = f"does not work with {name}={value}, which {does}: unset it."
        assert said in sentence(caught.value)
    for value in ("1", "true", ""):
        monkeypatch.setenv(name, value)
        refusals.refuse_server(stand_in(server_args_class))


def test_streaming_sessions_are_refused_before_sglang_meets_the_gates_tree(prepare):
    """There it raises NotImplementedError, with a traceback."""
    text = exits(prepare, GATE, "--enable-streaming-session")
    assert "does not work with --enable-streaming-session, because it needs a prefix cache" in text


def test_files_that_choose_kernels_are_refused_whatever_their_name(server_args_class, monkeypatch):
    for folder in ("/tables", "no"):
        monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", folder)
        with pytest.raises(GateError, match=f"SGLANG_MOE_CONFIG_DIR={folder}, which names files"):
            refusals.refuse_server(stand_in(server_args_class))
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", "")
    refusals.refuse_server(stand_in(server_args_class))


@pytest.mark.parametrize(
    ("size", "chunk", "refused"),
    [(64, 64, False), (63, 64, True), (-1, 64, False), (None, 64, False), (8, None, False)],
)
def test_the_grid_must_fit_into_a_forward(size, chunk, refused):
    config, server_args = (
        GateConfig(prefill_chunk=chunk),
        SimpleNamespace(chunked_prefill_size=size),
    )
    if not refused:
        refusals.refuse_chunks(server_args, config)
        return
    with pytest.raises(GateError, match=f"--gate-prefill-chunk is {chunk}, but") as caught:
        refusals.refuse_chunks(server_args, config)
    assert f"--chunked-prefill-size lets a forward hold only {size} tokens" in str(caught.value)


@pytest.fixture
def confidential(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's own question is answered with yes."""
    from sglang.srt.utils import common

    if not hasattr(common, "is_confidential_compute"):
        pytest.skip("this SGLang has nothing for confidential computing")
    monkeypatch.setenv("SGLANG_FORCE_CONFIDENTIAL_COMPUTE", "1")
    common.is_confidential_compute.cache_clear()
    yield
    common.is_confidential_compute.cache_clear()


@pytest.mark.usefixtures("confidential")
def test_steps_do_not_overlap_under_confidential_computing(make):
    keywords = {"model_path": "dummy", "deterministic_gate": True}
    with pytest.raises(GateError) as caught:
        make(device="cuda", gate_overlap="on", **keywords)
    assert sentence(caught.value) == (
        "--deterministic-gate does not overlap steps on a GPU in confidential computing mode, "
        "where SGLang copies a step's results in another thread: add --gate-overlap off."
    )
    make(device="cuda", gate_overlap="off", **keywords)
    make(device="cpu", gate_overlap="on", **keywords)


@pytest.mark.usefixtures("confidential")
def test_where_sglang_knows_no_such_mode_nothing_is_refused(make, monkeypatch):
    monkeypatch.setattr(release, "_DIFFERENT", pkgutil.resolve_name(release.OLDER["0.5.22"]))
    make(model_path="dummy", device="cuda", deterministic_gate=True, gate_overlap="on")


def test_a_grammar_backend_that_needs_a_driver_is_refused_on_a_cpu(prepare):
    """The first grammar would end the scheduler."""

    def backend(*argv: str) -> str:
        return settings.view(prepare(GATE, *argv)).grammar_backend

    assert backend() == "llguidance"
    assert backend("--grammar-backend", "outlines") == "outlines"
    text = exits(prepare, GATE, "--grammar-backend", "xgrammar")
    assert text == (
        "--grammar-backend is xgrammar, whose masks need a GPU's driver, but --device is cpu: use "
        "llguidance."
    )


@pytest.mark.parametrize("decode", refusals.INVARIANT_ATTENTION)
def test_attention_that_can_be_made_invariant_is_served(decode):
    refusals.refuse_fast_path(backends("cuda", decode), GateConfig())


def test_other_attention_is_refused_on_either_path():
    for config in (GateConfig(), GateConfig(fast_path="stock")):
        with pytest.raises(GateError, match="--attention-backend fa3"):
            refusals.refuse_fast_path(backends("cuda", "fa3"), config)
    refusals.refuse_fast_path(backends("cpu", "torch_native"), GateConfig(fast_path="stock"))
    refusals.refuse_fast_path(backends("cuda", "triton"), GateConfig(fast_path="stock"))
    refusals.refuse_fast_path(backends("cuda", "fa3"), GateConfig(policy="observe"))
