"""The flag in SGLang's arguments: every way in, every option, and no trace without it."""

import copy
import hashlib
import json
import pickle
import socket
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import server_arguments
from sentences import sentence
from server_arguments import GATE, OPTIONS, exits

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.process import machine

# Fixtures: pytest finds them by their names here.
folder = server_arguments.folder
make = server_arguments.make
parser = server_arguments.parser
prepare = server_arguments.prepare
put_back = server_arguments.put_back
server_args_class = server_arguments.server_args_class

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


def test_without_a_radix_cache_its_name_stays_as_the_mark_of_the_gate(prepare):
    server_args = prepare(GATE, "--disable-radix-cache")
    args = settings.view(server_args)
    assert (args.disable_radix_cache, args.radix_cache_backend) == (True, "margingate")
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


@pytest.mark.parametrize(
    ("written", "default", "overlap"),
    [
        ("off", "off", "off"),
        ("on", "on", "on"),
        ("'off'", "off", "off"),
        ("no", "off", "off"),
    ],
)
def test_a_config_file_says_on_and_off_without_quotes(prepare, tmp_path, written, default, overlap):
    """YAML makes False of `off`: it was refused with the choices `on, off`."""
    path = tmp_path / "server.yaml"
    path.write_text(f"deterministic-gate: true\ngate-default: {written}\ngate-overlap: {written}\n")
    config = prepare("--config", str(path))._margingate
    assert (config.default, config.overlap) == (default, overlap)


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
        ("--gate-audit-rate 0.5 --tp-size 2", "is 0.5, but --tp-size is 2, and replays run on one"),
        (
            "--gate-policy observe --gate-study --dp-size 2",
            "--gate-study compares columns that one process keeps, but --dp-size is 2",
        ),
        (
            "--dtype float32 --kv-cache-dtype bfloat16",
            "--kv-cache-dtype is bfloat16, but the model's type is torch.float32",
        ),
    ],
)
def test_a_refused_value_is_one_line(prepare, argv, words):
    assert words in exits(prepare, GATE, *argv.split())


# Without the flag


def test_without_the_flag_there_is_no_attribute(prepare, make, server_args_class, folder):

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


@pytest.mark.parametrize("no_tree", [False, True])
@pytest.mark.parametrize("copied", [copy.copy, msgspec.structs.replace])
def test_a_copy_without_the_settings_does_not_start(make, folder, copied, no_tree):
    """It was served without the gate, and without a word."""
    from sglang.srt.entrypoints.engine import Engine

    given = {"model_path": folder, "device": "cpu", "disable_radix_cache": no_tree}
    made = Engine.server_args_class(**given, deterministic_gate=True)
    for gated in (made, make(**given, deterministic_gate=True)):
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
