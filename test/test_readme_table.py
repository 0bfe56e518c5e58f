"""README's table from records: those of H200 runs, and what is said where something is missing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmark import readme_table
from benchmark.bench import readme_cells, timed_command
from benchmark.bench.readme_cells import COLUMNS, NOT_ASKED, OUT_OF_TIME, STOCK, Part

RESULTS = Path(__file__).parents[1] / "benchmark/results"
MODE, GATE = COLUMNS[1:]
FILES = {  # of SGLang 0.5.23 but for the load, which was not measured there yet
    "sameness": "h200-2026-11-28-2/sameness.json",
    "steps": "h200-2026-11-29-2/steps-8b.json",
    "serving": "h200-2026-11-28/serving.json",
}


def recorded(part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / FILES[part]).read_text())
    return found


def cells(part: Part, row: int) -> tuple[str, ...]:
    return readme_cells.rows({part.name: part})[row].cells


def test_answers_of_a_run_on_an_h200():
    found = readme_cells.rows({"sameness": Part("sameness", recorded("sameness"), "")})
    assert [row.cells for row in found] == [
        ("66 of 100", "100 of 100", "400 of 400"),
        ("63 of 100", "82 of 100", "400 of 400"),
    ]
    assert found[0].label == "answers unchanged when batched and shuffled (smol, 256 tokens)"
    assert not any(row.missing for row in found)


def test_steps_and_prefills_of_runs_on_an_h200():
    """The ratios that the results' pages have, rounded to two places."""
    part = Part("steps", recorded("steps"), "")
    assert cells(part, 0) == ("1", "1.19 to 1.71", "0.90 to 1.02")
    assert cells(part, 1) == ("1", "1.18 to 2.23", "1.04 to 1.14")
    labels = [row.label for row in readme_cells.rows({"steps": part})]
    assert labels == [
        "time of a decode step (llama-3.1-8b shape)",
        "time of a prefill, 1,024 to 8,192 tokens",
    ]
    earlier = json.loads((RESULTS / "h200-2026-11-28-2/steps.json").read_text())
    assert cells(Part("steps", earlier, ""), 1) == ("1", "1.15 to 1.19", "1.03 to 1.05")


def test_load_of_a_run_without_sglangs_mode():
    found = readme_cells.rows({"serving": Part("serving", recorded("serving"), "")})
    assert [row.cells for row in found] == [
        ("1", NOT_ASKED, "1.03 to 1.14"),
        ("1", NOT_ASKED, "1.00 to 1.02"),
        ("1", NOT_ASKED, "0.51 to 1.03"),
        ("1", NOT_ASKED, "1.00 to 1.04"),
    ]
    assert found[1].label == "tokens a second, 4 requests a second"
    assert all(len(row.missing) == 1 for row in found), "the mode is missing in each"


def test_each_point_has_stocks_figure_and_ratios():
    parts = {name: Part(name, recorded(name), "") for name in FILES}
    by_label = {row.label: row.cells for row in readme_cells.details(parts)}
    assert by_label["same answers, cached (of these the same log-probs)"] == (
        *("63 of 100 (18)", "82 of 100 (74)", "400 of 400 (400)"),
    )
    assert by_label["decode step, 128 x 256"] == ("7.20 ms", "1.218", "0.902")
    assert by_label["time to the first token, p99, sharegpt 4 requests a second"][2] == "1.233"
    assert readme_cells.machines(parts) == [("NVIDIA H200", "0.5.23"), ("NVIDIA H200", "0.5.17")]


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("outcome", ["failed", OUT_OF_TIME, "not run"])
def test_a_part_without_a_record_says_so_in_each_cell(part, outcome):
    found = readme_cells.rows({part: Part(part, None, outcome)})
    assert found
    assert all(row.cells == (outcome,) * 3 and len(row.missing) == 3 for row in found)


def test_a_part_that_was_cut_says_how_much_it_has():
    """One server has less than the others, and all have less than was asked for."""
    record = recorded("steps")
    decode = [found for found in record["results"] if found["batch"]]
    del decode[-1]["step_ms"]["gate-triton"]
    row = readme_cells.rows({"steps": Part("steps", record, OUT_OF_TIME, {"decode": 12})})[0]
    assert row.cells[0] == "1 (10 of 12 points)"
    assert row.cells[2] == "0.90 to 1.02 (9 of 12 points)"
    assert len(row.missing) == 3

    answers = recorded("sameness")
    answers["cases"]["stock-default"]["batched"] = {"error": "gone"}
    asked = {"company": 2, "cached": 1}
    company, cached = readme_cells.rows({"sameness": Part("sameness", answers, "failed", asked)})
    assert company.cells[0] == "66 of 100 (1 of 2 arrangements)" and len(company.missing) == 1
    assert not cached.missing


def test_a_server_that_did_not_start_and_one_that_cannot_run_here():
    record = recorded("sameness")
    del record["cases"]["sglang-deterministic-default"]
    row = readme_cells.rows({"sameness": Part("sameness", record, "")})[0]
    assert row.cells[1] == "failed" and len(row.missing) == 1
    absent = Part("sameness", record, "", absent={MODE: "needs a GPU"})
    row = readme_cells.rows({"sameness": absent})[0]
    assert row.cells[1] == "needs a GPU" and not row.missing


def test_an_arrangement_for_which_nothing_was_cached_says_so():
    record = recorded("sameness")
    record["cases"]["gate"]["cached"]["cached"] = 0
    assert cells(Part("sameness", record, ""), 1)[2] == "400 of 400, nothing was cached"


def test_arrangements_of_other_numbers_of_prompts_say_each():
    record = recorded("sameness")
    record["cases"]["gate"]["batched"]["of"] -= 1
    assert cells(Part("sameness", record, ""), 0)[2].endswith(" of 399 to 400")


def test_a_point_that_two_groups_of_engines_measured_is_their_median():
    """Where not all fit into a GPU, each group has a stock engine of its own."""
    point = {"context": 256, "batch": 8}
    groups = [{"stock-default": 2.0, "gate-default": 3.0}, {"stock-default": 4.0}]
    results = [{**point, "step_ms": step_ms} for step_ms in groups]
    assert cells(Part("steps", {"results": results}, ""), 0)[2] == "1.00"


def test_points_without_stock_have_no_ratio():
    figures = {"a": {STOCK: 2.0, GATE: 3.0}, "b": {GATE: 1.0}}
    assert readme_cells.over_stock(figures, GATE) == {"a": 1.5}


def folder_of(tmp_path: Path, *parts: str) -> Path:
    """What a whole run leaves, with the logs' lines that name attention backends."""
    noted = {"outcome": "", "seconds": 60, "limit_s": 90}
    (tmp_path / "parts.json").write_text(json.dumps(dict.fromkeys(parts, noted)))
    (tmp_path / "logs").mkdir()
    for part in parts:
        (tmp_path / f"{part}.json").write_text((RESULTS / FILES[part]).read_text())
    for mode, backend in (("stock-default", "fa3"), ("gate-default", "triton")):
        told = f"'attention_backend': None\n'attention_backend': '{backend}'"
        (tmp_path / f"logs/steps.{mode}.log").write_text(told)
    return tmp_path


def test_a_folder_becomes_a_page(tmp_path):
    folder = folder_of(tmp_path, "sameness", "steps")
    (folder / "steps.txt").write_text("fine\nout of time before 8192 32\n")
    table, page, whole = readme_table.report(folder)
    assert table.splitlines()[0].startswith("| one H200, SGLang 0.5.23 | stock SGLang |")
    assert "| tokens a second, all at once | not run | not run | not run |" in table
    assert not whole and "- tokens a second, all at once, stock SGLang: not run" in page
    assert f"{STOCK} fa3, {GATE} triton." in page
    assert "- steps: done after 60 of 90 s" in page
    assert "- steps: out of time before 8192 32" in page


def test_records_of_two_machines_are_told(tmp_path):
    _, page, whole = readme_table.report(folder_of(tmp_path, *FILES))
    assert not whole
    assert "of different machines or versions: H200, SGLang 0.5.23 and H200, SGLang 0.5.17" in page


def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: bool) -> Any:
    monkeypatch.setattr(readme_table.engines, "on_gpu", lambda: gpu)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--model", "m"])
    return readme_table.arguments()


def test_a_gpu_runs_all_three_with_their_defaults(monkeypatch, tmp_path):
    args = options(monkeypatch, tmp_path, gpu=True)
    for part, make in readme_table.COMMANDS.items():
        command = make(args, 300.0)
        names = [names[0] for names in readme_cells.MODES[part].values()]
        at = command.index(names[0])
        assert command[at : at + 3] == names
        assert "--attention-backend" not in command
    assert readme_table.asked(args, "steps") == {"decode": 12, "prefill": 4}
    assert readme_table.asked(args, "serving") == {"rate inf": 3, "rate 4.0": 3}


def test_a_cpu_leaves_sglangs_mode_out(monkeypatch, tmp_path):
    args = options(monkeypatch, tmp_path, gpu=False)
    assert readme_table.modes(args, "serving") == ["stock-default", "gate"]
    args.shape = readme_table.made_shape(args)
    assert json.loads((tmp_path / "tiny/config.json").read_text())["num_hidden_layers"] == 2


def test_time_that_a_part_leaves_over_goes_to_the_next(monkeypatch, tmp_path):
    args = options(monkeypatch, tmp_path, gpu=True)
    given = {}

    def ran(command: list[str], log: Path, limit_s: float, env: dict[str, str]) -> Any:
        given[log.stem] = limit_s
        (tmp_path / f"{log.stem}.json").write_text("{}")
        return timed_command.Ended(0 if log.stem != "steps" else None, 1.0)

    monkeypatch.setattr(readme_table, "run", ran)
    readme_table.measure(args)
    minutes = [given[part] / 60 for part in readme_table.SHARES]
    assert minutes == pytest.approx([18 * 6 / 18, 18 * 5 / 12, 18.0], abs=0.1)
    parts = readme_table.parts_of(tmp_path)
    assert [parts[name].outcome for name in FILES] == ["", OUT_OF_TIME, ""]


SLEEPER = """if True:
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        print(child.pid, flush=True)
        time.sleep(100)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_a_command_is_ended_with_what_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(timed_command, "SERVERS_S", 0.1)
    log, ended_within = tmp_path / "log.txt", timed_command._ended_within
    deadline = time.monotonic() + 60
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind nohup

    def once_it_has_its_child(process: subprocess.Popen[bytes], limit_s: float) -> bool:
        """To start two Pythons may take longer than the limit."""
        while not log.read_text().endswith("\n"):
            assert time.monotonic() < deadline, "it has no child"
            time.sleep(0.05)
        return ended_within(process, limit_s)

    monkeypatch.setattr(timed_command, "_ended_within", once_it_has_its_child)
    try:
        ended = timed_command.run([sys.executable, "-c", SLEEPER], log, 0.5)
    finally:
        signal.signal(signal.SIGINT, before)
    child, said = log.read_text().split()
    assert ended.status is None and 0.5 <= ended.seconds < 15 and said == "interrupted"
    while lives(int(child)):
        assert time.monotonic() < deadline, "its child goes on"
        time.sleep(0.1)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_group_that_is_killed_is_the_commands(monkeypatch, tmp_path):
    """One that was waited for is gone, and its number may be another's."""
    seen: list[str] = []
    monkeypatch.setattr(
        timed_command.os, "killpg", lambda pid, _: seen.append(psutil.Process(pid).status())
    )
    timed_command.run([sys.executable, "-c", ""], tmp_path / "log.txt", 60.0)
    assert seen == [psutil.STATUS_ZOMBIE]


def test_a_command_that_ends_by_itself_has_its_status(tmp_path):
    ended = timed_command.run([sys.executable, "-c", "exit(3)"], tmp_path / "log.txt", 60.0)
    assert ended.status == 3
