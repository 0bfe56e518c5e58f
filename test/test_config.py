"""Options: what is taken, and one sentence with the way out for everything else."""

import json
import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from sentences import one_sentence

from margingate.config import (
    GUARANTEES,
    MAX_ROWS,
    POLICIES,
    REPAIRS,
    GateConfig,
    GateError,
    load_threshold,
    make_config,
    option_name,
)

MODEL = {"config_sha256": "aa"}
CALIBRATION = {"schema": 1, "model": {"config_sha256": "aa", "note": "x"}, "threshold": 0.375}


def refused(options: dict[str, Any], model: dict[str, str] | None = None) -> str:
    """The sentence that refuses these options; checked to be one line with an end."""
    with pytest.raises(GateError) as caught:
        make_config(options, model or {})
    return one_sentence(caught.value)


def calibration(folder: Path, content: Any) -> str:
    path = folder / "calibration.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_defaults_are_what_the_dataclass_says():
    config = make_config({}, {})
    assert config == GateConfig()
    assert (config.policy, config.threshold, config.guarantee) == ("margin", 0.5, "sparse")
    assert (config.rows, config.prefill_chunk, config.max_delay) == (None, None, None)
    assert (config.debug, config.inject_faults) == (False, False)


def test_the_record_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        GateConfig().threshold = 1.0  # type: ignore[misc]


def test_every_option_has_help_that_ends_like_a_sentence():
    for option in fields(GateConfig):
        assert option.metadata["help"].endswith("."), option.name


def test_command_line_text_becomes_numbers():
    text = {"threshold": "0.25", "rows": "8", "max_delay": "3", "prefill_chunk": "128"}
    config = make_config(text, {})
    assert (config.threshold, config.rows) == (0.25, 8)
    assert (config.max_delay, config.prefill_chunk) == (3, 128)
    assert [type(v) for v in (config.threshold, config.rows)] == [float, int]


NUMBERS = [option for option in fields(GateConfig) if "parse" in option.metadata]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_text_becomes_what_the_option_says(option):
    config = make_config({option.name: "1", "fast_path": "stock"}, {})
    assert type(getattr(config, option.name)) is option.metadata["parse"]
    said = f"{option_name(option.name)} is 'x', which is not"
    assert refused({option.name: "x"}).startswith(said)


def test_every_number_is_made_of_text_and_every_choice_is_checked():
    """An option is a choice, a number, a switch, or a path or an address."""
    for option in fields(GateConfig):
        kinds = option.metadata.keys() & {"choices", "parse"}
        other = option.default is False or option.name in ("calibration", "events_endpoint")
        assert len(kinds) == (not other), option.name
        if "choices" in kinds:
            said = f"{option_name(option.name)} is 'x': choose one of "
            assert refused({option.name: "x"}).startswith(said)


@pytest.mark.parametrize("name", ["policy", "guarantee", "repair"])
def test_every_choice_is_accepted(name):
    for choice in {"policy": POLICIES, "guarantee": GUARANTEES, "repair": REPAIRS}[name]:
        assert getattr(make_config({name: choice}, {}), name) == choice


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0},
        {"threshold": "0"},
        {"threshold": 1e9},
        {"rows": 1},
        {"rows": MAX_ROWS},
        {"max_delay": 0},
        {"prefill_chunk": 1},
        {"guarantee": "exact", "policy": "always"},
    ],
)
def test_the_ends_of_each_range_are_accepted(options):
    assert isinstance(make_config(options, {}), GateConfig)


@pytest.mark.parametrize(
    ("name", "choices"), [("policy", POLICIES), ("guarantee", GUARANTEES), ("repair", REPAIRS)]
)
@pytest.mark.parametrize("value", ["", "Margin", "none", None, 1, ["span"]])
def test_an_unknown_choice_is_answered_with_the_choices(name, choices, value):
    text = refused({name: value})
    assert text.startswith(f"--gate-{name} is {value!r}: choose one of ")
    assert all(choice in text for choice in choices)


@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, "-0.5", "nan", None, [0.5]])
def test_a_threshold_must_be_a_number_of_logits(value):
    text = refused({"threshold": value})
    shown = float(value) if isinstance(value, str) else value
    assert text.startswith(f"--gate-threshold is {shown!r}, ")
    assert "give a number of logits >= 0, or 'auto' with --gate-calibration" in text


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "0", "inf", True, [0.5]])
def test_a_routers_threshold_must_flag_something_and_not_everything(value):
    text = refused({"router_threshold": value})
    shown = float(value) if isinstance(value, str) else value
    assert text.startswith(f"--gate-router-threshold is {shown!r}, ")
    assert "give a number > 0" in text


def test_a_router_has_no_threshold_unless_one_is_given():
    assert GateConfig().router_threshold is None
    assert make_config({"router_threshold": "0.125"}, {}).router_threshold == 0.125


def test_a_threshold_is_not_a_truth_value():
    assert refused({"threshold": True}).startswith("--gate-threshold is True, ")


@pytest.mark.parametrize("value", [math.inf, "inf", "Infinity", "1e999"])
def test_an_infinite_threshold_points_at_the_policy_that_means_it(value):
    text = refused({"threshold": value})
    assert text.startswith("--gate-threshold is infinite: ")
    assert "--gate-policy always" in text


@pytest.mark.parametrize("value", ["", "half", "0,5", "AUTO", "0.5 logits"])
def test_a_threshold_in_words_is_refused(value):
    text = refused({"threshold": value})
    assert text.startswith(f"--gate-threshold is {value!r}, ")
    assert "give a number" in text


def test_auto_is_not_a_threshold_once_parsed():
    with pytest.raises(GateError, match="'auto' with --gate-calibration"):
        GateConfig(threshold="auto")  # type: ignore[arg-type]


RANGES = {"rows": (1, MAX_ROWS), "max_delay": (0, 1 << 20), "prefill_chunk": (1, 1 << 20)}


@pytest.mark.parametrize("name", RANGES)
def test_a_count_outside_its_range_is_answered_with_the_range(name):
    low, high = RANGES[name]
    option = "--gate-" + name.replace("_", "-")
    for value in (low - 1, high + 1, -(1 << 70), True, False, 1.0, math.nan, [1]):
        text = refused({name: value})
        assert text == f"{option} is {value!r}: give a whole number from {low} to {high}."


@pytest.mark.parametrize("name", RANGES)
def test_a_count_out_of_range_as_text_is_refused_alike(name):
    low, high = RANGES[name]
    option = "--gate-" + name.replace("_", "-")
    for value in (low - 1, high + 1):
        assert refused({name: str(value)}) == refused({name: value})
        assert refused({name: str(value)}).startswith(f"{option} is {value}: ")


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", ["many", "", "1.5", "0x10"])
def test_a_count_in_words_is_refused(name, value):
    text = refused({name: value})
    assert text.startswith(f"--gate-{name.replace('_', '-')} is {value!r}, ")
    assert "whole number" in text


def test_the_delay_may_be_left_to_the_gate():
    assert make_config({"max_delay": "auto"}, {}).max_delay is GateConfig().max_delay is None


@pytest.mark.parametrize("name", ["debug", "inject_faults"])
@pytest.mark.parametrize("value", ["false", "yes", 1])
def test_a_switch_is_true_or_false(name, value):
    text = refused({name: value})
    assert text.startswith(f"--gate-{name.replace('_', '-')} is {value!r}: ")


@pytest.mark.parametrize("other", [{"repair": "column"}, {"policy": "observe"}])
def test_exact_needs_a_repair_that_is_complete(other):
    text = refused({"guarantee": "exact", **other})
    assert text.startswith("--gate-guarantee exact needs --gate-repair span")
    assert "--gate-policy margin or always" in text


def test_an_unknown_option_is_answered_with_the_known_ones():
    text = refused({"treshold": 0.5})
    assert text.startswith("gate_treshold is not an option of the gate: use one of ")
    assert all(f"gate_{option.name}" in text for option in fields(GateConfig))


def test_a_calibration_for_this_model_gives_the_threshold(tmp_path):
    path = calibration(tmp_path, CALIBRATION)
    config = make_config({"threshold": "auto", "calibration": path}, MODEL)
    assert (config.threshold, config.calibration) == (0.375, path)
    assert load_threshold(path, {}) == 0.375


def test_auto_without_a_calibration_is_refused():
    text = refused({"threshold": "auto"}, MODEL)
    assert text.startswith("--gate-threshold is 'auto' without --gate-calibration: ")
    assert "give the threshold as a number" in text


def test_a_calibration_that_cannot_be_read_names_the_path_and_the_reason(tmp_path):
    absent = str(tmp_path / "absent.json")
    text = refused({"threshold": "auto", "calibration": absent}, MODEL)
    assert text.startswith(f"--gate-calibration {absent} cannot be read (No such file")
    assert "check the path" in text
    text = refused({"threshold": "auto", "calibration": str(tmp_path)}, MODEL)
    assert "cannot be read (Is a directory)" in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "threshold: 0.5",
        "[1, 2]",
        "3",
        "null",
        "\x00",
        {},
        {"schema": 1, "threshold": 0.5},
        {"schema": 1, "model": MODEL},
        {"model": MODEL, "threshold": 0.5},
        {"schema": 1, "model": None, "threshold": 0.5},
        {"schema": 1, "model": ["config"], "threshold": 0.5},
        {"schema": 1, "model": MODEL, "threshold": "half"},
        {"schema": 1, "model": MODEL, "threshold": None},
    ],
)
def test_a_malformed_calibration_is_named(tmp_path, content):
    path = calibration(tmp_path, content)
    text = refused({"threshold": "auto", "calibration": path}, MODEL)
    assert text.startswith(f"--gate-calibration {path} is not a calibration file: ")
    assert "make one for this model" in text


def test_a_calibration_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_bytes(b"\xff\xfe\x00")
    text = refused({"threshold": "auto", "calibration": str(path)}, MODEL)
    assert "is not a calibration file" in text


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused(tmp_path, schema):
    path = calibration(tmp_path, {**CALIBRATION, "schema": schema})
    text = refused({"threshold": "auto", "calibration": path}, MODEL)
    assert text.startswith(f"--gate-calibration {path} has schema {schema!r}, ")
    assert "reads 1: recalibrate" in text


@pytest.mark.parametrize("made_for", [{"config_sha256": "bb"}, {}, {"other": "aa"}])
def test_a_calibration_made_for_another_model_is_refused(tmp_path, made_for):
    path = calibration(tmp_path, {**CALIBRATION, "model": made_for})
    text = refused({"threshold": "auto", "calibration": path}, MODEL)
    assert text.startswith(f"--gate-calibration {path} was made for config_sha256 ")
    assert "'aa'" in text
    assert "calibrate this one, or give the threshold as a number" in text


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_threshold_out_of_range_in_a_calibration_is_refused_too(tmp_path, value):
    path = calibration(tmp_path, {**CALIBRATION, "threshold": value})
    assert refused({"threshold": "auto", "calibration": path}, MODEL)
