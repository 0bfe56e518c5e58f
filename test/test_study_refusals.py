"""What a study cannot use or meets on its way is one sentence, and what was measured is kept."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import study_world
from study_world import STUDY, FakeServer, call

from margingate.cli.main import main
from margingate.errors import CliError
from margingate.harness.servers import ServerError
from margingate.study import session

# Fixtures: pytest finds them by their names here.
place = study_world.place
record = study_world.record


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "one.jsonl holds no prompts"),
        ("\n\n", "one.jsonl holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "one.jsonl, line 2: not a JSON object"),
        ('{"prompt": "a"}\n["prompt"]\n', "one.jsonl, line 2: not a JSON object"),
        ('\n{"text": "a"}\n', "one.jsonl, line 2: not a JSON object with a"),
        ('\n{"prompt": 5}\n', 'one.jsonl, line 2: "prompt" is 5: give a text in quotes.'),
        ('{"id": "two-0", "prompt": "a"}', "one.jsonl and "),
        ('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}', "two prompts with the id 'x'"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", ["study", "calibrate"])
def test_prompt_files_that_cannot_be_used_name_the_line(place, command, content, said, capsys):
    data = content if isinstance(content, bytes) else content.encode()
    (place.path / "one.jsonl").write_bytes(data)
    assert call(place, command) == 2
    assert said in capsys.readouterr().err
    assert not place.started and not list(place.path.glob("*.partial.jsonl"))


def test_a_prompt_longer_than_the_context_is_named(place, monkeypatch, capsys):
    monkeypatch.setattr(FakeServer, "get", lambda *_: {"max_req_input_len": 13})
    assert call(place, "study") == 2
    assert "the prompt one-0 has 2 tokens, and the server takes 13 with an answer of 12" in (
        capsys.readouterr().err
    )


def test_too_few_steps_keep_what_was_measured(place, capsys):
    assert call(place, "calibrate", out="c.json") == 2
    said = (
        "26 distinct steps with other numbers than alone cannot show a miss rate of 1e-05, which "
    )
    assert said in capsys.readouterr().err
    assert (place.path / "c.partial.jsonl").exists() and not (place.path / "c.json").exists()
    place.last = 0  # nothing is left to ask
    assert call(place, "calibrate", "--target-miss-rate", "0.05", out="c.json") == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ServerError("the server ended at start: no weights."), "the server ended at start: no"),
        (requests.ConnectionError("gone"), "the server stopped answering (ConnectionError)"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot go on (No space left on device)",
        ),
    ],
)
def test_a_server_that_fails_is_one_sentence(tmp_path, monkeypatch, error, said):
    class Failing:
        log = tmp_path / "out.log"

        def __enter__(self):
            raise error

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("margingate.harness.servers.launch", lambda *_, **__: Failing())
    options = SimpleNamespace(out=tmp_path / "out.json", server_args=[], tokens=1)
    refused = pytest.raises(CliError, match=re.escape(said))
    with refused, session.observing_server(options, tmp_path):
        pass


def test_a_folder_without_a_model_is_refused_before_anything_starts(place, capsys):
    assert call(place, "study", "--model-path", str(place.path)) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    assert not place.started


@pytest.mark.parametrize("full", ["out.partial.jsonl", "out.json.draft"])
def test_a_full_disk_keeps_what_was_measured(place, monkeypatch, full, capsys):
    real_open, real_write = Path.open, Path.write_bytes
    used = 0

    def fill(path: Path) -> None:
        nonlocal used
        used += path.name == full
        if path.name == full and (used > 9 or full.endswith("draft")):
            raise OSError(errno.ENOSPC, "No space left on device")

    def limited_open(path, *args, **kwargs):
        fill(path)
        return real_open(path, *args, **kwargs)

    def limited_write(path, data):
        fill(path)
        return real_write(path, data)

    call(place, "study", *STUDY, out="whole.json")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited_open)
        patch.setattr(Path, "write_bytes", limited_write)
        assert call(place, "study", *STUDY) == 2
    assert "No space left on device): make room" in capsys.readouterr().err
    assert call(place, "study", *STUDY) == 0
    assert (place.path / "out.json").read_bytes() == (place.path / "whole.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--columns", "-1"], "--columns is -1"),
        (["--sequences", "-1"], "--sequences is -1"),
        (["--thresholds", "-0.5"], "--thresholds has -0.5"),
        (["--thresholds", "inf"], "--thresholds has inf"),
        (["--report", "/dev/null/x"], "--report /dev/null/x cannot be made"),
        (["--out", "/nowhere/s.json"], "--out /nowhere/s.json cannot be written"),
        (["--out", "/tmp"], "--out /tmp is a folder: name a file in it."),
        (["--from", "/nowhere"], "--from /nowhere cannot be read"),
        (["--from", "x", "--tokens", "9"], "--tokens is for measuring, and --from x measures"),
        (["--from", "x", "--out", "y"], "--out is for measuring"),
        (["--from", "x", "--batch-sizes", "4"], "--batch-sizes is for measuring"),
        (["--from", "x", "--model-path", "m"], "--model-path is for measuring"),
        (["--from", "x", "--columns", "0"], "--columns is for measuring"),
        (["--from", "x", "--no-probe"], "--no-probe is for measuring"),
        (["--from", "x", "--", "--dtype", "half"], "'--dtype' is for measuring"),
        (["--calibration", __file__], f"--calibration {__file__} is not a calibration file"),
        (["--from", __file__], f"--from {__file__} is not a study"),
        (["--calibration", "/nowhere"], "--calibration /nowhere cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(arguments, said, capsys):
    assert main(["study", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"margingate: {said}")


def test_a_study_that_is_not_whole_is_one_sentence(place, record, capsys):
    file = place.path / "cut.json"
    whole = json.loads((place.path / "out.json").read_text())
    for cut, said in (
        ({key: whole[key] for key in ("kind", "schema")}, "is not whole, it lacks name, model,"),
        (whole | {"walks": []}, "is damaged (ValueError: "),
        (whole | {"walks": [{"name": "one-0"}]}, "is damaged (KeyError: "),
    ):
        file.write_text(json.dumps(cut))
        capsys.readouterr()
        assert main(["study", "--from", str(file)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
