"""`margingate study` and `calibrate` with real servers: interrupted, resumed, and loaded again."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from margingate.cli.main import main
from margingate.harness.client import Client
from margingate.study import session

DATA = (
    {"id": "rivers", "prompt": "Name three rivers."},
    {"id": "sum", "prompt": "What is 17 plus 25? Think step by step."},
    {"id": "code", "prompt": "Write a Python function that reverses a string."},
)
WALK = ("--batch-sizes", "2", "3")
STUDY = ("study", *WALK, "--tokens", "12", "--no-probe", "--columns", "1")
LISTENING = """
import signal
from margingate.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where pytest itself ignores it
raise SystemExit(main())
"""
RESOLVE = """
import sys
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
load_plugins()
from margingate.runtime.compat.arguments.server_args import gate_config
print("threshold", gate_config(prepare_server_args(sys.argv[1:])).threshold)
"""


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and two prompt files, named in main's arguments."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "model").symlink_to(model)
    (folder / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in DATA[:2]))
    (folder / "two.jsonl").write_text(json.dumps(DATA[2]) + "\n")
    return folder


def arguments(place: Path, *command: str, out: str) -> list[str]:
    prompts = ("--prompts", str(place / "one.jsonl"), str(place / "two.jsonl"))
    return [*command, *prompts, "--model-path", str(place / "model"), "--out", str(place / out)]


def interrupt_half_way(place: Path) -> int:
    """Ctrl-C for a study once its journal has four walks of nine; its exit status.

    Once more where it was done before, as when this process was stopped meanwhile.
    """
    command = [sys.executable, "-c", LISTENING, *arguments(place, *STUDY, out="a.json")]
    journal = place / "a.partial.jsonl"
    for _ in range(3):
        (place / "a.json").unlink(missing_ok=True)
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            while process.poll() is None:
                if journal.exists() and journal.read_text().count("\n") >= 5:
                    process.send_signal(signal.SIGINT)
                    break
                time.sleep(0.02)
            process.communicate(timeout=300)
        if process.returncode:
            break
    return process.returncode


@pytest.fixture
def one_server(monkeypatch) -> Iterator[None]:
    """Studies of this process ask one server: a start takes longer than all that they ask."""
    own, clients = session.gated_server, []
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def shared(*asked: Any) -> Iterator[Client]:
            if not clients:
                clients.append(stack.enter_context(own(*asked)))
            yield clients[0]

        monkeypatch.setattr(session, "gated_server", shared)
        yield


def test_a_study_goes_on_after_an_interrupt_as_if_there_had_been_none(place, one_server, capsys):
    assert interrupt_half_way(place) == 130
    journal = place / "a.partial.jsonl"
    kept = journal.read_text().splitlines()
    assert 5 <= len(kept) < 11 and not (place / "a.json").exists()
    report = place / "report"
    assert main([*arguments(place, *STUDY, out="a.json"), "--report", str(report)]) == 0
    assert not journal.exists() and (report / "index.html").stat().st_size > 50_000
    capsys.readouterr()
    assert main(arguments(place, *STUDY, out="whole.json")) == 0
    said = capsys.readouterr().out
    assert "### Flips by data set" in said and "### Transfer: chosen on one" in said
    record = json.loads((place / "whole.json").read_text())
    assert len(record["walks"]) == 9
    assert all(len(one["exact_margins"]) == len(one["tokens"]) for one in record["walks"])
    assert {n for one in record["walks"] for n in one["rows"]} == {1, 2, 3}, "batches did form"
    assert (place / "a.json").read_bytes() == (place / "whole.json").read_bytes()


def test_a_calibration_is_what_the_gate_loads(place, capsys):
    command = ("calibrate", *WALK, "--tokens", "20", "--target-miss-rate", "0.06")
    assert main(arguments(place, *command, out="c.json")) == 0
    assert "Use it: --gate-fast-path stock --gate-threshold auto" in capsys.readouterr().out
    record = json.loads((place / "c.json").read_text())
    assert record["steps"] == 2 * 3 * 19 and record["miss_rate_bound"] <= 0.06
    assert 0 <= record["distinct_steps"] <= record["moved_steps"] <= record["steps"]
    flags = ("--deterministic-gate", "--gate-fast-path", "stock", "--gate-threshold", "auto")
    server = ("--model-path", str(place / "model"), "--device", "cpu", *flags)
    command = (sys.executable, "-c", RESOLVE, *server, "--gate-calibration", str(place / "c.json"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"threshold {record['threshold']}" in done.stdout, done.stderr[-2000:]
