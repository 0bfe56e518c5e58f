"""The flag in SGLang's arguments: every way in, every refusal, and no trace without it."""

import argparse
import copy
import hashlib
import json
import logging
import os
import pickle
import pkgutil
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from benchmark.models import mxfp4
from margingate.config import GateConfig, GateError
from margingate.harness.embedded_model import ensure_model
from margingate.harness.tiny_models import tiny_model
from margingate.runtime.compat import release
from margingate.runtime.compat.arguments import settings, settings_table
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.model import architectures
from margingate.runtime.compat.process import machine
from margingate.runtime.start import pools, refusals, refused_models
from margingate.runtime.start.refused_settings import SERVER_REFUSALS, Refusal

GATE = "--deterministic-gate"
OPTIONS = {"--gate-" + option.name.replace("_", "-") for option in fields(GateConfig)}


@pytest.fixture(scope="module")
def folder() -> str:
    return str(ensure_model("smollm2"))


@pytest.fixture(scope="module", autouse=True)
def server_args_class() -> Any:
    """ServerArgs with the plugin loaded into this process, as SGLang's entry points load it."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    return ServerArgs


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """SGLang's argument handling sets variables and replaces the root logger's handlers."""
    environment, handlers = dict(os.environ), list(logging.root.handlers)
    level = logging.root.level
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def prepare(folder):
    """Resolve a command line as SGLang's launcher does."""
    from sglang.srt.server_args import prepare_server_args

    def prepared(*argv: str, model: str = folder) -> Any:
        made = prepare_server_args(["--model-path", model, "--device", "cpu", *argv])
        made.resolve_once()
        return made

    return prepared


@pytest.fixture
def make(server_args_class):
    """Make and resolve ServerArgs as an Engine does that is given these keywords."""
    from sglang.srt.entrypoints.engine import Engine

    def made(**keywords: Any) -> Any:
        server_args = Engine.server_args_class(**keywords)
        assert isinstance(server_args, server_args_class)
        server_args.resolve_once()
        return server_args

    return made


@pytest.fixture
def parser(server_args_class) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    server_args_class.add_cli_args(parser)
    return parser


def exits(prepare: Any, *argv: str, **keywords: str) -> str:
    """The line that ends the process: Python prints it to stderr and exits with 1.

    test_hooks.py sees a whole process do so.
    """
    with pytest.raises(SystemExit) as caught:
        prepare(*argv, **keywords)
    text = caught.value.code
    assert isinstance(text, str)
    assert text.startswith("margingate: ")
    assert sentence(text)
    return text.removeprefix("margingate: ")


def sentence(error: object) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# The options


def test_the_help_shows_a_group_with_the_flag_and_an_option_per_field(parser):
    (group,) = [g for g in parser._action_groups if "margingate" in (g.title or "")]
    shown = [string for action in group._group_actions for string in action.option_strings]
    assert sorted(shown) == sorted({GATE} | OPTIONS)
    text = parser.format_help()
    assert "deterministic gate (margingate):" in text
    for option in fields(GateConfig):
        assert option.metadata["help"].split()[0] in text


def test_nothing_else_in_the_parser_begins_like_the_gate(parser):
    strings = {string for action in parser._actions for string in action.option_strings}
    assert {s for s in strings if s.startswith("--gate-")} == OPTIONS


def test_an_events_endpoint_in_use_ends_the_start(prepare):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        text = exits(prepare, GATE, "--gate-events-endpoint", endpoint)
    assert text.startswith(f"--gate-events-endpoint {endpoint} cannot be bound (Address already")


# The command line


def test_the_flag_attaches_the_settings_and_sets_what_the_gate_needs(prepare):
    server_args = prepare(GATE)
    assert server_args._margingate == GateConfig(rows=16, prefill_chunk=64, overlap="off")
    args = settings.view(server_args)
    assert args.disable_overlap_schedule is True
    assert (args.radix_cache_backend, args.boundary_reduction) == ("margingate", "ar")
    assert (args.enable_lean_attention, args.enforce_disable_flashinfer_allreduce_fusion) == (
        False,
        True,
    )


def test_without_a_radix_cache_there_is_no_backend(prepare):
    server_args = prepare(GATE, "--disable-radix-cache")
    args = settings.view(server_args)
    assert (args.disable_radix_cache, args.radix_cache_backend) == (True, None)
    assert server_args._margingate.rows == 16


def test_every_option_reaches_the_settings(prepare):
    argv = "--gate-policy always --gate-threshold 0.25 --gate-guarantee exact --gate-repair span"
    argv += " --gate-rows 8 --gate-max-delay 3 --gate-prefill-chunk 32 --gate-debug"
    server_args = prepare(GATE, *argv.split(), "--gate-inject-faults")
    assert server_args._margingate == GateConfig(
        policy="always",
        threshold=0.25,
        guarantee="exact",
        repair="span",
        rows=8,
        max_delay=3,
        overlap="off",
        prefill_chunk=32,
        debug=True,
        inject_faults=True,
    )


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


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_an_option_without_the_flag_is_refused(prepare, option):
    switches = ("--gate-debug", "--gate-inject-faults", "--gate-study")
    argv = [option] if option in switches else [option, "1"]
    text = exits(prepare, *argv)
    assert text == f"{option} is set without --deterministic-gate: add the flag, or drop it."


def test_simulated_verdicts_need_made_up_weights(prepare):
    argv = (GATE, "--gate-fast-path", "stock", "--gate-simulate-trigger-rate", "0.1")
    assert "or serve made-up weights with --load-format dummy" in exits(prepare, *argv)
    config = prepare(*argv, "--load-format", "dummy", "--gate-simulate-flip-rate", "1")._margingate
    assert (config.simulate_trigger_rate, config.simulate_flip_rate) == (0.1, 1.0)


def test_one_parsed_command_line_can_be_used_twice(server_args_class, parser, folder):
    """Benchmarks read the same namespace again; a flag that was eaten would be a silent no."""
    args = parser.parse_args(["--model-path", folder, "--device", "cpu", GATE])
    given = dict(vars(args))
    for _ in range(2):
        made = server_args_class.from_cli_args(args)
        made.resolve_once()
        assert made._margingate.rows == 16
    assert vars(args) == given


def test_a_command_line_leaves_nothing_for_the_next_server(server_args_class, prepare, folder):
    prepare(GATE)
    assert not hasattr(server_args_class(model_path=folder, device="cpu"), "_margingate")
    exits(prepare, GATE, "--gate-rows", "0")
    assert not hasattr(server_args_class(model_path=folder, device="cpu"), "_margingate")


def test_a_config_file_turns_the_gate_on(prepare, tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text(
        "deterministic-gate: true\ngate-threshold: 0.25\ngate-debug: true\n"
        "gate-inject-faults: false\ngate-rows: 8\n"
    )
    config = prepare("--config", str(path))._margingate
    assert (config.threshold, config.debug, config.inject_faults) == (0.25, True, False)
    assert config.rows == 8


def test_a_config_file_that_says_false_leaves_it_off(prepare, tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("deterministic-gate: false\n")
    assert not hasattr(prepare("--config", str(path)), "_margingate")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--gate-policy sometimes", "--gate-policy is 'sometimes': choose one of margin"),
        ("--gate-threshold=-1", "--gate-threshold is -1.0, "),
        ("--gate-threshold auto", "'auto' without --gate-calibration: "),
        ("--gate-rows 0", "--gate-rows is 0: give a whole number from 1"),
        ("--gate-max-delay x", "--gate-max-delay is 'x'"),
        ("--gate-guarantee exact --gate-repair column", "exact needs --gate-repair span"),
        (
            "--gate-prefill-chunk 8192 --chunked-prefill-size 4096",
            "--gate-prefill-chunk is 8192, but --chunked-prefill-size lets a forward hold only "
            "4096 tokens: lower the first or raise the second.",
        ),
    ],
)
def test_a_refused_value_is_one_line(prepare, argv, words):
    assert words in exits(prepare, GATE, *argv.split())


# Without the flag


def test_without_the_flag_there_is_no_attribute(prepare, make, server_args_class, folder):
    from margingate.runtime.compat.arguments.server_args import gate_config

    for server_args in (
        prepare(),
        server_args_class(model_path=folder, device="cpu"),
        make(model_path=folder, device="cpu"),
        make(model_path=folder, device="cpu", deterministic_gate=False),
    ):
        assert "_margingate" not in vars(server_args)
        assert gate_config(server_args) is None
        args = settings.view(server_args)
        assert (args.radix_cache_backend, args.disable_overlap_schedule) == (None, False)


# Python


def test_keywords_turn_the_gate_on(make, folder):
    server_args = make(
        model_path=folder, device="cpu", deterministic_gate=True, gate_threshold=0.25, gate_rows=8
    )
    assert server_args._margingate == GateConfig(
        threshold=0.25, rows=8, prefill_chunk=64, overlap="off"
    )
    assert settings.view(server_args).radix_cache_backend == "margingate"


def test_server_arguments_themselves_take_no_keyword_of_ours(server_args_class, folder):
    with pytest.raises(TypeError, match="deterministic_gate"):
        server_args_class(model_path=folder, deterministic_gate=True)


def test_a_server_without_a_model_is_gated_too(make):
    assert make(model_path="dummy", deterministic_gate=True)._margingate.rows == 64


def test_arguments_that_were_refused_stay_refused(make, server_args_class, folder):
    """SGLang resolves them once, and takes them for resolved from then on."""
    from sglang.srt.entrypoints.engine import Engine

    keywords = {"model_path": folder, "device": "cpu", "deterministic_gate": True}
    made = Engine.server_args_class(**keywords, gate_prefill_chunk=8192, chunked_prefill_size=4096)
    with pytest.raises(GateError, match="--gate-prefill-chunk is 8192"):
        made.resolve_once()
    with pytest.raises(GateError, match=r"without the hook on ServerArgs\.resolve_once"):
        made.resolve_once()


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"gate_threshold": 0.25}, "--gate-threshold is set without --deterministic-gate: "),
        ({"deterministic_gate": True, "gate_treshold": 1}, "gate_treshold is not an option"),
        ({"deterministic_gate": True, "gate_threshold": -1}, "--gate-threshold is -1, "),
        ({"deterministic_gate": True, "gate_rows": True}, "--gate-rows is True: "),
        ({"deterministic_gate": True, "page_size": 16}, "does not work with --page-size, "),
    ],
)
def test_refused_keywords_raise(make, folder, keywords, words):
    with pytest.raises(GateError) as caught:
        make(model_path=folder, device="cpu", **keywords)
    assert words in sentence(caught.value)


def test_another_version_of_sglang_does_not_start(make, folder, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.18")
    with pytest.raises(GateError, match=r"but SGLang is 0\.5\.18: pip install"):
        make(model_path=folder, device="cpu", deterministic_gate=True)
    # Without the flag nothing is looked for that such a version may have elsewhere.
    monkeypatch.setattr(settings, "view", lambda _args: pytest.fail("looks into SGLang"))
    assert make(model_path="dummy")


def test_the_settings_travel_with_a_copy(prepare):
    server_args = prepare(GATE, "--gate-threshold", "0.25")
    for other in (pickle.loads(pickle.dumps(server_args)), copy.deepcopy(server_args)):
        assert other._margingate == server_args._margingate
        assert settings.view(other).radix_cache_backend == "margingate"


@pytest.mark.parametrize("copied", [copy.copy, msgspec.structs.replace])
def test_a_copy_without_the_settings_does_not_start(make, server_args_class, folder, copied):
    """It was served without the gate, and without a word."""
    from sglang.srt.entrypoints.engine import Engine

    made = Engine.server_args_class(model_path=folder, device="cpu", deterministic_gate=True)
    for gated in (made, make(model_path=folder, device="cpu", deterministic_gate=True)):
        other = copied(gated)
        assert not hasattr(other, "_margingate")
        with pytest.raises(GateError) as caught:
            other.resolve_once()
        assert "carry no settings of the gate" in sentence(caught.value)


# Calibration


def calibrated(tmp_path: Path, sha256: str, made_on: dict[str, str] | None = None) -> str:
    path = tmp_path / "calibration.json"
    model = {"config_sha256": sha256}
    record = {"schema": 1, "model": model, "machine": made_on or {}, "threshold": 0.375}
    path.write_text(json.dumps(record))
    return str(path)


def test_a_calibration_of_this_model_on_this_machine_sets_the_threshold(prepare, folder, tmp_path):
    sha256 = hashlib.sha256((Path(folder) / "config.json").read_bytes()).hexdigest()
    here = machine.describe(prepare(GATE))
    path = calibrated(tmp_path, sha256, here)
    argv = ["--gate-threshold", "auto", "--gate-calibration", path]
    assert prepare(GATE, *argv)._margingate.threshold == 0.375
    for name in here:
        calibrated(tmp_path, sha256, {**here, name: "another"})
        text = exits(prepare, GATE, *argv)
        assert f"--gate-calibration {path} was made for {name} 'another', but" in text


def test_a_calibration_of_another_model_is_refused(prepare, tmp_path):
    path = calibrated(tmp_path, "00")
    text = exits(prepare, GATE, "--gate-threshold", "auto", "--gate-calibration", path)
    assert f"--gate-calibration {path} was made for config_sha256 '00', but" in text


def test_a_calibration_needs_a_model_in_a_folder(prepare, tmp_path):
    path = calibrated(tmp_path, "00")
    argv = ["--gate-threshold", "auto", "--gate-calibration", path]
    text = exits(prepare, GATE, *argv, model="owner/name")
    assert "owner/name/config.json, which cannot be read: give --model-path a local folder" in text


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


# Models


def model_config(text: dict[str, Any] | None = None, **changes: Any) -> SimpleNamespace:
    """A stand-in for SGLang's ModelConfig of a dense decoder."""
    values = {
        "hf_text_config": SimpleNamespace(**(text or {})),
        "hf_config": SimpleNamespace(
            get_text_config=lambda: None, architectures=["OneForCausalLM"]
        ),
        "is_generation": True,
        "attention_arch": SimpleNamespace(name="MHA"),
        "is_hybrid_swa": False,
        "is_hybrid_swa_compress": False,
        "has_attention_sinks": False,
        "is_encoder_decoder": False,
        "is_multimodal": False,
        "is_draft_model": False,
        "linear_attn_registry_result": None,
        "quantization": None,
    }
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**{**values, **changes})


WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("text", [{}, {"num_experts": 8}, WINDOWS])
def test_a_decoder_is_served_whatever_its_family(text):
    """Experts are refused by the operator that nobody knows, and by no name of a family."""
    refused_models.refuse_model(model_config(text))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (model_config(is_generation=False), "does not generate text"),
        (model_config(attention_arch=SimpleNamespace(name="MLA")), "uses latent attention (MLA)"),
        (model_config(attention_arch=SimpleNamespace(name="SSM")), "keeps recurrent state"),
        (model_config(is_encoder_decoder=True), "is an encoder-decoder"),
        (model_config(is_multimodal=True), "is multimodal and none of Qwen2-VL, Qwen2.5-VL and"),
        (
            model_config(linear_attn_registry_result=(object(), object())),
            "keeps recurrent state (Mamba or linear attention)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_kind_of_model_is_refused_in_words(model, what):
    with pytest.raises(GateError) as caught:
        refused_models.refuse_model(model)
    text = sentence(caught.value)
    assert text.startswith(f"--deterministic-gate does not serve this model yet, because it {what}")
    assert text.endswith(": serve it without the flag.")


@pytest.mark.parametrize(
    ("text", "changes", "refused"),
    [
        ({}, {}, False),
        ({}, {"has_attention_sinks": True}, False),
        ({"attention_chunk_size": 8192}, {}, True),
        ({}, {"is_hybrid_swa_compress": True}, True),
    ],
)
@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "OneForCausalLM"])
def test_a_second_pool_is_served_of_windows_alone(architecture, text, changes, refused):
    """For an architecture with two pools and without."""
    two = architecture != "OneForCausalLM"
    names = SimpleNamespace(get_text_config=lambda: None, architectures=[architecture])
    said = pytest.raises(GateError, match="chunks that are no windows: ")
    with said if refused and two else nullcontext():
        refused_models.refuse_model(model_config(text, hf_config=names, **changes))


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


def test_mxfp4_is_served_of_gpt_oss_alone():
    """Of others SGLang has the same experts, but nobody looked at how their weights come there."""
    packed = {"quant_method": "mxfp4"}
    gpt_oss = SimpleNamespace(
        get_text_config=lambda: None,
        architectures=["GptOssForCausalLM"],
        quantization_config=packed,
    )
    refused_models.refuse_model(model_config(quantization="mxfp4", hf_config=gpt_oss))
    other = SimpleNamespace(**{**vars(gpt_oss), "architectures": ["OtherForCausalLM"]})
    rounded = SimpleNamespace(**{**vars(gpt_oss), "quantization_config": None})
    for config in (other, rounded):
        with pytest.raises(GateError, match=r"quantized \(mxfp4\), of which.*gpt-oss in MXFP4"):
            refused_models.refuse_model(model_config(quantization="mxfp4", hf_config=config))


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


def test_what_is_quantized_otherwise_is_refused_with_what_would_do():
    plain = model_config().hf_config
    rounded = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    blocks = SimpleNamespace(**vars(plain), quantization_config=rounded)
    static = SimpleNamespace(**vars(plain), quantization_config={"activation_scheme": "static"})
    experts = {"num_experts": 8}
    for model in (
        model_config(quantization=None, hf_config=plain),
        model_config(quantization="fp8", hf_config=blocks),
        model_config(quantization="fp8", hf_config=plain),  # by the server: a scale a row of inputs
        model_config(quantization="w8a8_fp8", hf_config=plain),
        model_config(experts, quantization="fp8", hf_config=blocks),
        model_config(experts, quantization="fp8", hf_config=static),
        model_config(experts, quantization="compressed-tensors", hf_config=plain),
    ):
        refused_models.refuse_model(model)
    with pytest.raises(GateError, match=r"by one scale for all rows.*: use a checkpoint with"):
        refused_models.refuse_model(model_config(experts, quantization="fp8", hf_config=plain))
    with pytest.raises(GateError, match=r"quantized \(awq\), of which.*: use a checkpoint in BF16"):
        refused_models.refuse_model(model_config(quantization="awq", hf_config=plain))


def experts_wanted(**changes: Any) -> SimpleNamespace:
    given = {"enable_return_routed_experts": True, "chunked_prefill_size": 64}
    return SimpleNamespace(**(given | changes))


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2}
VERIFIED = {"rows": 16, "fast_path": "stock"}


@pytest.mark.parametrize(
    ("config", "text", "args", "because"),
    [
        ({"rows": 16}, {}, {}, "is for mixtures of experts"),
        ({"rows": 16}, {"num_experts_per_tok": 2}, {}, "is for mixtures of experts"),
        ({"rows": 16}, MIXTURE, {"chunked_prefill_size": -1}, "--chunked-prefill-size is -1"),
        ({"rows": 16}, MIXTURE, {"chunked_prefill_size": 15}, "is 15 and --gate-rows is 16"),
        (VERIFIED, MIXTURE, {}, "may depend on the batch: use --gate-guarantee exact"),
        ({"rows": 16, "repair": "column"}, MIXTURE, {}, "nor with --gate-repair column"),
    ],
)
def test_experts_are_returned_where_all_rows_are_canonical(config, text, args, because):
    with pytest.raises(GateError, match=because) as caught:
        refusals.refuse_experts(experts_wanted(**args), GateConfig(**config), model_config(text))
    sentence(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 16},
        VERIFIED | {"guarantee": "exact"},
        VERIFIED | {"policy": "always"},
        VERIFIED | {"policy": "observe"},
    ],
)
def test_experts_are_returned_elsewhere(config):
    made = GateConfig(**config)
    refusals.refuse_experts(experts_wanted(), made, model_config(MIXTURE))
    refusals.refuse_experts(experts_wanted(enable_return_routed_experts=False), made, None)


def test_experts_in_mxfp4_are_not_returned():
    """Their runner's choice passes SGLang's record of experts by."""
    said = SimpleNamespace(
        architectures=["GptOssForCausalLM"], quantization_config={"quant_method": "mxfp4"}
    )
    model = model_config(MIXTURE, quantization="mxfp4", hf_config=said)
    with pytest.raises(GateError, match="keeps no ids: drop the option") as caught:
        refusals.refuse_experts(experts_wanted(), GateConfig(rows=16), model)
    sentence(caught.value)


def test_experts_of_a_model_without_any_are_refused_at_start(prepare):
    assert "for mixtures of experts" in exits(prepare, GATE, "--enable-return-routed-experts")


def test_the_names_of_sglangs_attention_kinds_are_the_expected_ones():
    from sglang.srt.configs.model_config import AttentionArch

    assert {kind.name for kind in AttentionArch} == {"MHA", "MLA", "SSM"}


def test_a_quantized_model_is_refused_when_it_is_loaded(prepare):
    said = exits(prepare, GATE, "--quantization", "w8a8_int8")
    assert "because it is quantized (w8a8_int8), of which" in said


# The launcher asks its schedulers


def launched(gated: bool, *infos: dict[str, Any]) -> tuple[Any, ...]:
    server_args = SimpleNamespace(dp_size=1, **({"_margingate": GateConfig()} if gated else {}))
    manager = SimpleNamespace(server_args=server_args)
    return (manager, None, None, SimpleNamespace(scheduler_infos=list(infos)), None, [])


def test_a_scheduler_that_came_up_without_the_gate_ends_the_server():
    from margingate.runtime.start.install import confirm_schedulers

    with pytest.raises(GateError) as caught:
        confirm_schedulers(launched(True, {"margingate": {}}, {"max_req_input_len": 1}))
    text = sentence(caught.value)
    assert text.startswith("scheduler 1 came up without the gate although --deterministic-gate")
    assert "SGLANG_PLUGINS" in text


def test_schedulers_with_the_gate_and_servers_without_it_pass():
    from margingate.runtime.start.install import confirm_schedulers

    confirm_schedulers(launched(True, {"margingate": {}}, {"margingate": {}}))
    confirm_schedulers(launched(False, {}))
    confirm_schedulers((None, *launched(True)[1:]))


def backends(device: str, decode: str) -> SimpleNamespace:
    return SimpleNamespace(
        device=device,
        attention_backend="triton",
        prefill_attention_backend=None,
        decode_attention_backend=decode,
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
