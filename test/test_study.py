"""A study from a made-up server: resumed after any interruption, tables, signals, report."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import lzma
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

from margingate.cli.main import main
from margingate.errors import CliError
from margingate.harness.answers import common_prefix, identical
from margingate.harness.client import Answer, Prompt
from margingate.harness.servers import ServerError
from margingate.study import measure, session
from margingate.study import walk as walking
from margingate.study.column_tables import more_tables, near_flips
from margingate.study.measure import drift
from margingate.study.report import recall_curve
from margingate.study.row_counts import spans
from margingate.study.steps import Signal, bars_by_size, signals, steps_of
from margingate.study.tables import calibrated_table, first_threshold, make_tables, to_markdown

MACHINE = {"device": "d", "dtype": "torch.bfloat16", "attention": "a"}
PROBE = {
    "operators": [
        {"name": "model.norm", "kind": "norm", "shape": [8], "classes": [[1, 0], [2, 0]]},
        {"name": "model.down", "kind": "linear", "shape": [8, 4], "classes": [[1, 0], [2, 1]]},
    ],
    "steps": {"measured": [[1, True], [2, True]]},
}
TOKENS = 12


class FakeServer:
    """What a study needs of a server; batches flip some tokens of small margin."""

    base_url, timeout = "http://nowhere", None

    def __init__(self, options: tuple[str, ...], last: int | None) -> None:
        self.options, self.asked, self.last = options, 0, last
        self.counts = dict.fromkeys(measure.COUNTERS, 0)

    def gate_state(self) -> dict[str, Any]:
        return {"machine": MACHINE, "probe": PROBE, **self.counts}

    def get(self, _path: str) -> dict[str, Any]:
        return {"max_req_input_len": 64}

    def flush(self) -> None:
        pass

    def ask(self, prompts: list[Prompt], params: list[dict[str, Any]]) -> list[Answer]:
        self.asked += 1
        if self.last is not None and self.asked > self.last:
            raise KeyboardInterrupt
        self.counts["steps"] += len(prompts)
        gated = bool(self.options) and "observe" not in self.options
        return [
            _answer(prompt, one, gated, len(prompts))
            for prompt, one in zip(prompts, params, strict=True)
        ]


def _answer(prompt: Prompt, params: dict[str, Any], gated: bool, rows: int) -> Answer:
    draw = random.Random(prompt.name)
    alone = [draw.randrange(100) for _ in range(TOKENS)]
    margins = [draw.choice((0.0, 0.125, 0.5, 3.0)) for _ in alone]
    tokens = list(alone)
    for i, margin in enumerate(margins):
        if i and rows > 1 and not gated and margin <= 0.125 and draw.random() < 0.5:
            tokens[i] += 100
    choices = [(t, m, rows, None, 9.0, t, m + 0.01) for t, m in zip(tokens, margins, strict=True)]
    columns = {"prompt": [[0.0, 0.0]] * 3, "rows": [[[0.1, 0.01]] * (TOKENS - 1)] * 3}
    forced = params.get("custom_params", {}).get("gate_forced_ids")
    assert forced is None or forced == alone
    meta = {"gate": {"choices": choices, "columns": columns}}
    return Answer(prompt.name, tuple(alone if forced else tokens), "", meta)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, prompts and a fake server in a folder; `last` asks are answered."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for name in ("one", "two"):
        lines = [json.dumps({"id": f"{name}-{i}", "prompt": f"{name} {i}"}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = SimpleNamespace(path=tmp_path, last=None, started=[])

    @contextlib.contextmanager
    def gated_server(_options, _model, *options):
        found.started.append(options)
        yield FakeServer(options, found.last)

    def tokenized(sets, _model):
        return [Prompt(name, (1, 2)) for pairs in sets.values() for name, _ in pairs]

    monkeypatch.setattr(session, "gated_server", gated_server)
    monkeypatch.setattr(session, "tokenized", tokenized)
    for module in (walking, measure):
        monkeypatch.setattr(module, "ask", lambda client, *what: client.ask(*what))
    return found


def call(place: SimpleNamespace, command: str, *more: str, out: str = "out.json") -> int:
    prompts = [str(place.path / f"{name}.jsonl") for name in ("one", "two")]
    sizes = ("--batch-sizes", "4", "2", "--tokens", str(TOKENS))
    where = ("--out", str(place.path / out), "--model-path", str(place.path / "model"))
    return main([command, "--prompts", *prompts, *where, *sizes, *more])


STUDY = ("--sequences", "4", "--thresholds", "0.25", "--columns", "2")


@pytest.fixture
def record(place) -> dict[str, Any]:
    assert call(place, "study", *STUDY) == 0
    return json.loads((place.path / "out.json").read_text())


# -- measuring


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


# -- bad input


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


# -- steps, signals, tables

NAN = float("nan")


def walk(size: int, name: str, tokens: list[int], margins: list[float], **more: Any) -> Any:
    count = len(tokens)
    exact = {
        "rows": [size] * count,
        "tops": [8.0] * count,
        "exact_tokens": tokens,
        "exact_margins": margins,
    }
    return {"batch_size": size, "name": name, "tokens": tokens, "margins": margins} | exact | more


SMALL = {
    "name": "m",
    "model": {},
    "machine": MACHINE,
    "tokens": 4,
    "batch_sizes": [2, 4],
    "server_args": [],
    "sets": {"x": ["a"], "y": ["b"]},
    "walks": [
        walk(1, "a", [1, 2, 3, 4], [1, 1, 1, 1]),
        walk(2, "a", [1, 9, 3, 4], [1, 0.25, 2, 3], exact_tokens=[1, 2, 3, 4]),
        walk(4, "a", [9, 2, 3, 4], [1, 1, NAN, 3]),
        walk(1, "b", [5, 6], [1, 1]),
        walk(2, "b", [5, 7], [1, 0.5]),
        walk(4, "b", [5, 6], [1, 0.125]),
    ],
    "columns": [],
    "sequences": [],
    "probe": None,
}


def test_steps_leave_the_prefill_out():
    steps = steps_of(SMALL)
    assert steps.rows.tolist() == [2, 3, 4, 2, 3, 4, 2, 2]
    assert steps.sets.tolist() == list("xxxxxxyy")
    assert steps.flips.tolist() == [True, *[False] * 5, True, False]
    assert steps.prefill == {"x": (1, 2), "y": (0, 2)}
    assert steps.ulps[0] == 0.25 / 2**-4, "BF16 has 7 bits: 1/16 apart from 8 on"
    assert steps.gaps[0] == 0.25 + 2**-4
    assert steps.signed[0] == 0.0, "exact products choose another token there"
    assert steps.exact_flips.tolist() == [*[False] * 6, True, False]
    assert steps.moved.tolist() == [True, True, True, False, True, True, True, True]
    assert steps.distinct == 7, "row 4 of a has the same numbers in both batches"


def test_a_server_without_exact_products_leaves_the_plain_margin():
    walks = [one | {"exact_tokens": [], "exact_margins": []} for one in SMALL["walks"]]
    steps = steps_of(SMALL | {"walks": walks})
    assert [signal.name for signal in signals(steps)] == ["margin"]
    assert len(make_tables(SMALL | {"walks": walks})) == 7


def test_a_signal_flags_up_to_its_bar_and_what_has_no_number():
    steps = steps_of(SMALL)
    margin = signals(steps)[0]
    assert margin.bar(steps.sets == "x") == 0.25 and margin.bar(steps.sets == "y") == 0.5
    assert margin.bar(steps.rows == 4) == float("-inf")
    assert margin.flagged(0.25).tolist() == [True, *[False] * 3, True, False, False, True]
    assert bars_by_size(margin, steps, steps.rows > 0).tolist() == [0.5] * 3 + [-np.inf] * 3 + [
        0.5,
        -np.inf,
    ]


def test_the_recall_curve_rises_from_nothing_to_everything():
    signal = Signal("s", np.array([1.0, 2.0, 3.0, NAN]), np.array([False, True, True, False]))
    assert recall_curve(signal) == ([0.0, 0.75, 1.0, 1.0], [0.0, 0.5, 1.0, 1.0])


def cells(title: str, record: Any = SMALL) -> dict[str, tuple[str, ...]]:
    (table,) = [one for one in make_tables(record) if one.title.startswith(title)]
    assert all(len(row) == len(table.columns) for row in table.rows)
    return {row[0]: row[1:] for row in table.rows}


def test_tables_of_a_small_record():
    rates = cells("Flips by data set")
    assert rates["x"][:3] == ("6", "1", "16.67%") and rates["x"][-1] == "1 of 2"
    assert rates["all"][:3] == ("8", "2", "25.00%") and rates["all"][-1] == "1 of 4"
    assert cells("Flips by requests in the step")["3 to 4"][:2] == ("4", "0")
    assert set(cells("Flips by row")) == {"2 to 4", "all"}
    assert cells("Margins at flips")["y"] == ("1", "0.5", "0.5", "0.5", "0.5")
    assert cells("Trigger rate")["0.515625 (all flips)"][:2] == ("50.00%", "2 of 2")
    assert cells("Trigger rate")["0.5"][:2] == ("37.50%", "1 of 2"), "below, not at"
    transfer = cells("Transfer: chosen on x")
    assert transfer["margin"][:5] == ("0.25", "2", "1", "1", "9.7e-01")
    assert transfer["margin, times 2"][:4] == ("0.5", "2", "1", "0")
    assert transfer["margin, and a rounding step"][:4] == ("0.3125", "2", "1", "1")
    assert transfer["float32 lm_head that also chooses"][0] == "none"
    assert first_threshold(SMALL) == 0.265625


def test_a_calibrated_threshold_is_tested_by_data_set():
    calibration = {"threshold": 0.5, "steps": 9, "target_miss_rate": 0.1, "trigger_rate": 0.2}
    rows = {row[0]: row[1:] for row in calibrated_table(SMALL, calibration).rows}
    assert rows["x"][:3] == ("6", "1", "0") and rows["y"][:3] == ("2", "1", "1")
    assert rows["all"][4] == "37.50%", "below the threshold, or without a margin"


def test_nothing_that_flips_makes_tables_too():
    walks = [one | {"tokens": [1] * len(one["tokens"])} for one in SMALL["walks"]]
    still = SMALL | {"walks": [one | {"exact_tokens": one["tokens"]} for one in walks]}
    assert first_threshold(still) == 0.5
    assert cells("Transfer", still)["margin"][0] == "none"
    assert all(to_markdown(table) for table in make_tables(still))


def test_columns_are_counted_from_the_flips_own():
    rows = [[[i, i / 10] for i in range(5)]] * 2  # columns of rows 2 to 6, two layers
    near = near_flips([{"flips": [3], "rows": rows}])
    assert sorted(near) == [-1, 0, 1, 2, 3] and near[0] == [[(1, 0.1)], [(1, 0.1)]]
    assert near_flips([{"flips": [1], "rows": rows}]) == {}, "the prefill's token has no column"


def test_whole_answers_compare_up_to_where_they_part():
    assert common_prefix((1, 2, 3), (1, 9, 3)) == 1 and common_prefix((1, 2), (1, 2, 3)) == 2
    rows = [[[0.0, 0.0], [0.2, 0.02]]] * 3
    one = {"a": Answer("a", (1, 2, 3), "", {"gate": {"columns": {"rows": rows}}})}
    other = {"a": Answer("a", (1, 2, 4), "", {"gate": {"columns": {"rows": rows}}})}
    found = drift(one, other, {"a", "not there"})
    assert (found["columns"], found["same_bits"]) == (2, 1)
    assert found["relative_l2"] == [[0.0, 0.02, 0.02]] * 3
    assert identical(one.values(), other.values()) == 0
    assert identical(one.values(), one.values()) == 1


def test_row_counts_are_written_as_spans():
    assert spans([[1, 0], [2, 1], [3, 1], [8, 1]]) == "1 | 2 to 8"
    assert spans([[n, n] for n in range(9)]) == "9 classes"


# -- the report


def test_the_report_is_one_page_and_the_same_twice(place, record, capsys):
    pages = []
    for name in ("r1", "r2"):
        folder = place.path / name
        source = ("--from", str(place.path / "out.json"))
        assert main(["study", *source, "--report", str(folder)]) == 0
        pages.append({f.name: hashlib.sha256(f.read_bytes()).digest() for f in folder.iterdir()})
    assert pages[0] == pages[1]
    pictures = {"margins.png", "rates.png", "recall.png", "columns.png", "operators.png"}
    assert set(pages[0]) == pictures | {"index.html"}
    page = (place.path / "r1/index.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    titles = [table.title for table in make_tables(record) + more_tables(record)]
    assert len(titles) == 11 and all(f"<h2>{title}" in page for title in titles)


def test_every_table_has_a_cell_per_column(record):
    for table in make_tables(record) + more_tables(record):
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title


def test_a_report_that_cannot_be_written_is_one_sentence(place, record, capsys):
    (place.path / "file").write_text("")
    source = ("--from", str(place.path / "out.json"))
    assert main(["study", *source, "--report", str(place.path / "file")]) == 2
    assert "file cannot be made" in capsys.readouterr().err
