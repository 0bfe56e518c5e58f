"""Servers always end, their failures are one sentence; the demo's report and plot from records."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from margingate.cli import demo
from margingate.cli.main import main
from margingate.core.histogram import MarginHistogram
from margingate.errors import CliError
from margingate.harness.client import Answer, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.servers import Server, ServerError, free_port, telling_line
from margingate.study import comparison
from margingate.study.comparison_report import make_report
from margingate.study.plots import Margins, plot_margins, telling_counts

# A launcher as SGLang's: unhealthy first, with a child that ignores SIGTERM.
FAKE = """
import http.server, subprocess, sys, time
print("starting", flush=True)
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=1); "
child = subprocess.Popen([sys.executable, "-c", STUBBORN + "time.sleep(100)"], stdout=-1)
child.stdout.readline()
print("child", child.pid, flush=True)
polls = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global polls
        polls += 1
        self.send_response(200 if polls > 1 and self.path == "/health_generate" else 503)
        self.end_headers()
    def log_message(self, *args):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake(tmp_path, code=FAKE, **options) -> Server:
    script = tmp_path / "fake.py"
    script.write_text(code)
    command = (sys.executable, str(script))
    return Server([], tmp_path / "logs" / "fake.log", command=command, stop_s=0.5, **options)


def child_of(log: Path) -> int:
    return next(
        int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child")
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(holds, what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def assert_ends(*pids: int) -> None:
    wait_for(lambda: not any(map(alive, pids)), f"one of {pids} is still alive")


def test_a_server_is_awaited_and_its_whole_group_ended(tmp_path):
    with fake(tmp_path) as server:
        assert server.running() and server.healthy()
        assert server.base_url == f"http://127.0.0.1:{server.port}"
        pids = (server.pid, child_of(server.log))
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    assert server.pid is None and not server.running()
    server.stop()  # once more does nothing


def test_an_exception_inside_ends_the_group(tmp_path):
    with pytest.raises(KeyboardInterrupt), fake(tmp_path) as server:
        pids = (server.pid, child_of(server.log))
        raise KeyboardInterrupt
    assert not any(map(alive, pids))


def test_a_server_that_dies_at_start_is_one_sentence(tmp_path):
    code = "print('loading'); raise ValueError('no such model')"
    with pytest.raises(ServerError) as caught, fake(tmp_path, code):
        pass
    log = tmp_path / "logs" / "fake.log"
    assert f"ended at start with status 1 (ValueError: no such model): see {log}." in str(
        caught.value
    )


def test_the_deadline_ends_a_server_that_never_gets_healthy(tmp_path, monkeypatch):
    server = fake(tmp_path, FAKE.replace("polls > 1", "polls > 1000"), start_s=1.5)
    ask = server.healthy

    def healthy_once_it_has_its_child(timeout_s: float) -> bool:
        """Not before: to start two Pythons takes longer on some machines."""
        wait_for(lambda: "child" in server.log.read_text(), "it has no child")
        return ask(timeout_s)

    monkeypatch.setattr(server, "healthy", healthy_once_it_has_its_child)
    with pytest.raises(ServerError, match=r"was not healthy within 1\.5 s \(child"):
        server.start()
    assert server.pid is None
    assert_ends(child_of(server.log))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_group_ends_with_the_process_that_started_it(tmp_path, number):
    fake(tmp_path)  # writes the script
    code = f"""
        import sys, time
        from margingate.harness.servers import Server
        command = (sys.executable, {str(tmp_path / "fake.py")!r})
        with Server([], {str(tmp_path / "log")!r}, command=command, stop_s=0.5) as server:
            print(server.pid, flush=True)
            time.sleep(100)
    """
    parent = subprocess.Popen(
        # Python leaves SIGINT ignored where a script runs pytest in the background.
        ["env", "--default-signal=INT", sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    launcher = int(parent.stdout.readline())
    parent.send_signal(number)
    parent.communicate(timeout=60)
    assert_ends(launcher, child_of(tmp_path / "log"))


def test_a_port_of_another_process_is_not_mistaken_for_ours(tmp_path):
    with fake(tmp_path) as first:
        second = fake(tmp_path, "import time; time.sleep(100)", port=first.port)
        second.log = tmp_path / "second.log"
        with pytest.raises(ServerError, match=f"port {first.port} is answered by another process"):
            second.start()


def test_free_port_skips_taken_ports():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        taken = holder.getsockname()[1]
        with pytest.raises(ServerError, match="is free"):
            free_port([taken])
    assert free_port() in range(31000, 32768)


@pytest.mark.parametrize(
    "text, line",
    [
        ("", ""),
        ("one\ntwo\n\n", "two"),
        ("margingate: --gate-rows is 0: give more.\nkill_process_tree called", "margingate: --ga"),
        ("RuntimeError: boom\nbye\n" + "\0" * 50, "RuntimeError: boom"),
    ],
)
def test_telling_line(tmp_path, text, line):
    log = tmp_path / "log"
    log.write_text(text)
    assert telling_line(log).startswith(line) and bool(telling_line(log)) == bool(line)
    assert telling_line(tmp_path / "absent") == ""


# -- plots


def margins(values=(0.0, 0.25, 0.3, 1.0, 9.0, 40.0), flips=(0.25,)) -> Margins:
    histogram = MarginHistogram()
    histogram.add_steps(values)
    for value in flips:
        histogram.add_flip(value)
    return Margins.from_record(json.loads(json.dumps(histogram.record())))


def size_of(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


@pytest.mark.parametrize(
    "record",
    [
        margins(),
        margins(flips=()),
        margins(values=(), flips=()),
        Margins((0.0, 1.0, 2.0), (5, 0), (0, 0)),
    ],
)
def test_plot_margins_writes_a_png_whatever_was_counted(tmp_path, record):
    plot_margins(record, 0.5, tmp_path / "m.png", "Margins")
    assert size_of(tmp_path / "m.png") == (1350, 750)


def test_margins_refuse_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="one edge more"):
        Margins((0.0, 1.0), (1, 2), (0, 0))
    with pytest.raises(ValueError, match="do not ascend"):
        Margins((0.0, 2.0, 1.0), (1, 2), (0, 0))


def test_margins_since_counts_what_came_later():
    later = margins().since(margins(values=(0.0, 9.0), flips=()))
    assert (sum(later.steps), sum(later.flips)) == (4, 1)


# -- the demo, less its servers


def side(gated: bool, changed: int) -> comparison.Side:
    """Two prompts; `changed` of them differ from the second token on in the batched run."""
    meta = {"gate": {"threshold": 0.5}}
    alone = [Answer(name, (1, 2, 3), "", meta) for name in "ab"]
    other = [Answer(name, (1, 9, 3), "", meta) for name in "ab"[:changed]] + alone[changed:]
    gate = dict.fromkeys(comparison.COUNTERS, 4) | {"flagged": 1} if gated else {}
    runs = {
        name: comparison.Run(other if name == "batched" else alone, 2.0, gate)
        for name in comparison.RUNS
    }
    return comparison.Side(runs, margins() if gated else None, 0.5 if gated else None)


def report(stock: int, gated: int):
    sides = {"stock": side(False, stock), "gated": side(True, gated)}
    return make_report(sides, {"model": "m", "tokens": 3, "seed": 0})


def test_report_counts_and_compares():
    found = json.loads(json.dumps(report(stock=1, gated=0)))
    stock, gated = found["sides"]["stock"], found["sides"]["gated"]
    assert stock["identical"] == {"batched": 1, "shuffled": 2, "cached": 2}
    assert stock["changed"]["batched"] == {"a": 1}
    assert gated["identical"]["batched"] == 2
    assert gated["gate"]["trigger_rate"] == 0.25 and gated["gate"]["flips"] == 16
    assert gated["runs"]["alone"]["tokens_per_s"] == 3
    assert found["overhead"]["batched"] == 1
    assert found["versions"].keys() == {"margingate", "sglang", "torch"}


@pytest.mark.parametrize(
    "stock, gated, words",
    [
        (1, 0, "1 of 2 answers changed when the requests shared a batch; with it, every answer"),
        (0, 0, "none of 2 answers happened to change"),
        (1, 1, "with it, 1 still changed"),
    ],
)
def test_meaning_says_what_was_found(stock, gated, words):
    assert words in report(stock, gated)["meaning"]


def test_table_shows_every_number(capsys):
    demo._show(report(stock=1, gated=0), Path("out"))
    shown = capsys.readouterr().out
    for words in ("1 of 2", "2 of 2", "25.0% (4 of 16)", "out/margins.png"):
        assert words in shown


def test_demo_prompts_are_24_with_distinct_names():
    names = [name for name, _ in read_prompts(PROMPTS)]
    assert len(set(names)) == len(names) == 24
    assert {name.split("-")[1] for name in names} == {"20", "21", "22", "23", "24", "25"}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tokens", "0"], "--tokens is 0: give 1 or more."),
        (["--prompts", "/absent.jsonl"], "--prompts /absent.jsonl cannot be read"),
        (["--prompts", "TWICE"], "has two prompts with the id 'x'"),
        (["--prompts", "ONE"], "has one prompt, which makes no batch: add another."),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be made"),
    ],
)
def test_demo_refuses_in_one_line_before_any_server(tmp_path, capsys, options, words):
    files = {"TWICE": tmp_path / "twice.jsonl", "ONE": tmp_path / "one.jsonl"}
    for lines, file in zip((2, 1), files.values(), strict=True):
        file.write_text('{"id": "x", "prompt": "a"}\n' * lines)
    options = [str(files.get(option, option)) for option in options]
    assert main(["demo", *options]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_server_that_fails_is_the_demos_one_sentence(tmp_path, monkeypatch):
    code = "raise SystemExit('margingate: --gate-rows is 0: give a whole number.')"
    monkeypatch.setattr("margingate.harness.client.chat_prompts", lambda pairs, model: [])
    monkeypatch.setattr("margingate.harness.servers.launch", lambda *a, **k: fake(tmp_path, code))
    with pytest.raises(CliError, match=r"stock: the server on port .* --gate-rows is 0"):
        comparison.measure(tmp_path, [("a", "b")], 1, tmp_path, {"stock": (), "gated": ()})
    assert os.path.exists(tmp_path / "logs" / "fake.log")


def test_a_picture_of_row_counts_leaves_out_what_says_nothing_new():
    small, large = list(range(1, 257)), list(range(300, 8192, 100))
    same = dict.fromkeys([*small, *large], 0)
    breaks = {count: int(count >= 1000) for count in same}
    assert telling_counts({"qkv": same, "down": breaks}) == [*small, 900, 1000, 8100]
    assert telling_counts({"qkv": {1: 0, 64: 1}}) == [1, 64]
