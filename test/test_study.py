"""Studies and calibrations: interrupted and resumed, measured with other sizes, packed."""

from __future__ import annotations

import json
import lzma

import pytest
import study_world
from study_world import MACHINE, STUDY, call

from margingate.cli.main import main

# Fixtures: pytest finds them by their names here.
place = study_world.place
record = study_world.record


@pytest.mark.parametrize("last", [0, 1, 12, 14, 18, 23])
def test_a_study_that_was_interrupted_ends_with_the_same_bytes(place, last, capsys):
    assert call(place, "study", *STUDY, out="whole.json") == 0
    place.last = last
    assert call(place, "study", *STUDY) == 130
    assert not (place.path / "out.json").exists()
    place.last = None
    assert call(place, "study", *STUDY) == 0
    assert (place.path / "out.json").read_bytes() == (place.path / "whole.json").read_bytes()
    assert not list(place.path.glob("*.partial.jsonl"))


def test_a_study_starts_a_server_per_case_and_one_to_probe(place, record):
    cases = [one["case"] for one in record["sequences"]]
    assert cases == ["stock", "column 0.25", "span 0.25", "exact"]
    assert len(place.started) == 5 and place.started[-1] == ("--deterministic-gate",)
    stock, _, span, _ = record["sequences"]
    assert stock["identical"]["batched"] < 4 == span["identical"]["batched"]


def test_other_sizes_in_the_journal_stay_out_of_the_record(place):
    call(place, "study", "--no-probe", "--columns", "0", out="small.json")
    place.last = 17
    call(place, "study", "--no-probe", "--columns", "0", "--batch-sizes", "2", "4", "8")
    place.last = None
    call(place, "study", "--no-probe", "--columns", "0")
    names = ("out.json", "small.json")
    assert len({(place.path / name).read_bytes() for name in names}) == 1


def test_a_packed_study_reads_the_same(place, record, capsys):
    assert call(place, "study", *STUDY, out="out.json.xz") == 0
    assert (place.path / "out.json.xz").read_bytes()[:6] == b"\xfd7zXZ\0"
    tables = []
    for name in ("out.json", "out.json.xz"):
        capsys.readouterr()
        assert main(["study", "--from", str(place.path / name)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "### Flips by data set" in tables[0]


def test_calibration_and_its_test_on_other_prompts(place, record, capsys):
    target = ("--target-miss-rate", "0.05")
    assert call(place, "calibrate", *target, out="c.json") == 0
    first = (place.path / "c.json").read_bytes()
    place.last = 7
    assert call(place, "calibrate", *target, out="c2.json") == 130
    place.last = None
    assert call(place, "calibrate", *target, out="c2.json") == 0
    assert (place.path / "c2.json").read_bytes() == first
    table = ("study", "--from", str(place.path / "out.json"), "--calibration")
    capsys.readouterr()
    assert main([*table, str(place.path / "c.json")]) == 0
    assert "### The calibrated threshold, 0.203125 logits" in capsys.readouterr().out
    other = json.loads(first) | {"machine": {**MACHINE, "device": "e"}}
    (place.path / "c.json").write_text(json.dumps(other))
    assert main([*table, str(place.path / "c.json")]) == 2
    assert "was made for device 'e', but the study is of 'd'" in capsys.readouterr().err


def test_a_packed_calibration_reads_the_same(place, record, capsys):
    assert call(place, "calibrate", "--target-miss-rate", "0.05", out="c.json") == 0
    packed = place.path / "c.json.xz"
    packed.write_bytes(lzma.compress((place.path / "c.json").read_bytes()))
    tables = []
    for name in ("c.json", "c.json.xz"):
        capsys.readouterr()
        source = ("--from", str(place.path / "out.json"))
        assert main(["study", *source, "--calibration", str(place.path / name)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert (
        "chosen on 220 steps (52 of them with other numbers than alone, 26 of these distinct), for"
        in tables[0]
    )
