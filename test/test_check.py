"""What `margingate check` says, without a server."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from margingate.cli import check
from margingate.cli.main import main
from margingate.harness.inputs import server_root
from margingate.study import batch_check, score_check

RESULT = {
    "model": "m",
    "prompts": 3,
    "tokens": 8,
    "changed": {"batched": {"b": 4}, "shuffled": {}, "again": {"a": 0, "b": 4}, "arriving": {}},
}


def test_the_table_and_its_meaning(capsys):
    from rich.console import Console

    Console(width=100).print(check.make_table(RESULT))
    said = capsys.readouterr().out
    assert "2 of 3" in said and "3 of 3" in said and "1 of 3" in said
    assert check.meaning(RESULT) == "2 of 3 answers depend on what else the server does: a, b."
    same = {**RESULT, "changed": {name: {} for name in check.RUNS}}
    assert check.meaning(same) == "Every answer was the same alone and in a batch."
    told = check.meaning({**same, "fingerprint": "0123"})
    assert told.endswith("in a batch. The server's fingerprint: 0123.")


def test_differences_name_the_first_character():
    alone = {"a": "same", "b": "one", "c": "on"}
    said = {"a": "same", "b": "owe", "c": "one"}
    assert batch_check._differences(alone, said) == {"b": 1, "c": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens is 0"),
        (["--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
        (["--out", "/nowhere/result.json"], "--out /nowhere/result.json cannot be written"),
        (["--out", "/tmp"], "--out /tmp is a folder: name a file in it."),
        (["--base-url", "127.0.0.1:9"], "--base-url is '127.0.0.1:9': give http://HOST:PORT."),
        (["--base-url", "http://"], "--base-url is 'http://': give http://HOST:PORT."),
        (["--base-url", "http://h:99999"], "--base-url is 'http://h:99999' (Port out of range"),
        (["--base-url", "http://[bad"], "--base-url is 'http://[bad' (Invalid IPv6 URL): give"),
        (["--base-url", "http://h:1?x=y"], "--base-url is 'http://h:1?x=y': give"),
        (["--api-key", "a\nb"], "--api-key has a line break, or another character that"),
        (["--api-key", "ключ"], "--api-key has a line break, or another character that"),
        ([], "no server answers at http://127.0.0.1:9 ("),
    ],
)
def test_what_cannot_work_is_one_sentence(arguments, said, capsys):
    assert main(["check", "--base-url", "http://127.0.0.1:9", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"margingate: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_may_have_the_apis_path_at_its_end(end):
    assert server_root(f"HTTP://Host:9/prefix{end}") == "http://Host:9/prefix"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is not UTF-8 text (invalid start byte): convert it."),
        (
            '{"id": "x", "prompt": "a"}\n' * 2,
            "prompts.jsonl has two prompts with the id 'x': rename one.",
        ),
        ("[1]", 'line 1: not a JSON object with a "prompt"'),
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n', "has one prompt, which makes no batch: add another."),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_sentence(content, said, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["check", "--base-url", "http://127.0.0.1:9", "--prompts", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("margingate: --prompts") and said in error
    assert error.count("\n") == 1


@contextmanager
def serving(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    """The address of a server with these statuses and bodies by path; 404 for others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.get(self.path, (404, "<html>\n no\n  such page</html>"))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CHAT, MODELS = "/v1/chat/completions", "/v1/models"
ANSWER = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}
GOOD = {MODELS: (200, json.dumps({"data": [{"id": "m"}]})), CHAT: (200, json.dumps(ANSWER))}


@pytest.mark.parametrize("command", ["check", "probe"])
def test_a_server_with_a_key_asks_for_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with serving({MODELS: (401, ""), "/server_info": (401, "")}) as url:
        assert main([command, "--base-url", url]) == 2
    said = f"margingate: {url} answered 401: give --api-key the server's key."
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        (CHAT, (200, "{}"), f"{CHAT} answered without a choice ({{}}): name a server with"),
        (CHAT, (200, "[]"), "answered without a choice ([])"),
        (CHAT, (200, '{"choices": []}'), "answered without a choice"),
        (CHAT, (200, "<p>\n</p>"), "answered without a choice (<p> </p>)"),
        (CHAT, (401, ""), "answered 401: give --api-key the server's key."),
        (CHAT, (500, "<html>\n\n<p>no"), f"{CHAT} answered 500 (<html> <p>no): see the server's"),
        (CHAT, (500, "x" * 999), f" ({'x' * 200}...): see the server's log."),
        (MODELS, (404, "no"), f"{MODELS} answered 404: is this a server with OpenAI's chat API?"),
        (MODELS, (503, ""), f"{MODELS} answered 503 (nothing): see the server's log."),
        (MODELS, (200, '{"data": []}'), f"{MODELS} lists no model, but "),
        (MODELS, (200, "<html>"), f"{MODELS} lists no model, but '<html>': name one with --model."),
    ],
)
def test_a_server_of_another_kind_is_one_sentence(path, answer, said, capsys):
    with serving({**GOOD, path: answer}) as url:
        assert main(["check", "--base-url", url]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"margingate: {url}") and said in error


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return file


def test_without_a_terminal_each_stage_is_a_line(prompts, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--prompts", str(prompts), "--out", str(out), "--api-key", " key\n"]
    with serving(GOOD) as url:
        assert main(["check", "--base-url", url, *arguments]) == 0
    lines = [f"margingate: {words}" for words in ("alone", *check.RUNS.values())]
    told = capsys.readouterr()
    assert told.err.splitlines() == lines
    assert "Every answer was the same" in told.out
    assert json.loads(out.read_text())["prompts"] == 2


def test_a_result_that_cannot_be_written_is_still_shown(prompts, capsys):
    with serving(GOOD) as url:
        arguments = ["--prompts", str(prompts), "--out", "/dev/full"]
        assert main(["check", "--base-url", url, *arguments]) == 2
    told = capsys.readouterr()
    assert "Every answer was the same" in told.out
    assert "--out /dev/full cannot be written (No space left on device)" in told.err


def gated(fingerprint: str | None) -> tuple[int, str]:
    return 200, json.dumps({**ANSWER, "metadata": {"gate": [{"fingerprint": fingerprint}]}})


def test_servers_with_different_fingerprints_behind_one_address_are_named(prompts, capsys):
    """A proxy that takes turns between two of them; and one that has no gate."""

    class Turns(dict[str, tuple[int, str]]):
        def get(self, path: str, default: Any = None) -> Any:
            return next(turns) if path == CHAT else super().get(path, default)

    for other, named in (("ffff", "ffff"), (None, "none"), ("", "no gate")):
        turns = itertools.cycle([gated("0000"), gated(other) if other != "" else GOOD[CHAT]])
        with serving(Turns(GOOD)) as url:
            assert main(["check", "--base-url", url, "--prompts", str(prompts)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"margingate: answers at {url} come from servers with different")
        assert f"fingerprints (0000, {named}), so that" in error


def test_replicas_with_different_fingerprints_are_named(prompts, capsys):
    states = [{"margingate": {"fingerprint": each}} for each in ("aa", "bb")]
    told = {"/server_info": (200, json.dumps({"internal_states": states}))}
    with serving({**GOOD, **told}) as url:
        assert main(["check", "--base-url", url, "--prompts", str(prompts)]) == 2
    assert "different fingerprints (aa, bb), so" in capsys.readouterr().err


def test_the_fingerprint_of_the_answers_is_told_where_a_router_tells_none(prompts, capsys):
    with serving({**GOOD, CHAT: gated("0123")}) as url:
        assert main(["check", "--base-url", url, "--prompts", str(prompts)]) == 0
    assert "fingerprint: 0123." in " ".join(capsys.readouterr().out.split())


def run(*arguments: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "margingate.cli.main", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_one_sentence_and_the_result_is_in_the_file(unbuffered, prompts, tmp_path):
    out = tmp_path / "result.json"
    arguments = ("--prompts", str(prompts), "--out", str(out))
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with serving(GOOD) as url, open("/dev/full", "w") as full:
        done = run("check", "--base-url", url, *arguments, stdout=full, env=env)
    assert done.returncode == 2
    said = (
        "margingate: stdout cannot be written (No space left on device): make room, or send it on."
    )
    assert done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr
    assert json.loads(out.read_text())["prompts"] == 2


def test_a_reader_that_leaves_is_no_traceback(prompts):
    reading, writing = os.pipe()
    os.close(reading)
    with serving(GOOD) as url:
        done = run("check", "--base-url", url, "--prompts", str(prompts), stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert all(line.startswith("margingate: ") for line in done.stderr.splitlines())


def test_help_tells_an_example_and_what_the_statuses_mean(capsys):
    for command in ("check", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "0 every " in said and "2 it could not be tested; 130 Ctrl-C." in said
    for command in ("hooks", "model", "calibrate", "probe", "study", "watch"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert len(capsys.readouterr().out.split("\n\n")) > 2, f"{command} has no description"


# -- scores


def reply(decoded: float = -0.5, scored: float = -0.5, ids: Any = (1, 2, 3, 4)) -> str:
    """Of /generate, to every request: two tokens behind a prompt of four."""
    top = [[[-0.5, 9, None]]] * 4
    meta = {
        "output_token_logprobs": [[-1.0, 7, None], [decoded, 8, None]],
        "output_top_logprobs": top[:2],
        "input_token_logprobs": [[None, 3, None], [-2.0, 4, None], [-1.0, 7, None]],
        "input_top_logprobs": [None, *top[:3]],
        "cached_tokens": 2,
    }
    meta["input_token_logprobs"].append([scored, 8, None])
    return json.dumps({"prompt_token_ids": ids, "meta_info": meta})


def info(scores: str) -> str:
    return json.dumps(
        {"internal_states": [{"margingate": {"scores": scores, "fingerprint": "f1"}}]}
    )


@pytest.mark.parametrize(
    ("decoded", "server", "status", "said"),
    [
        (-0.5, "as_decoded", 0, "Every score was that of decoding, alone, in a batch and from"),
        (-0.5, None, 0, "Every score was that of decoding"),
        (-0.25, "as_decoded", 1, "Scores of 2 of 2 prompts depend on how they are computed: p"),
        (-0.25, None, 1, "Scores of 2 of 2 prompts"),
        (-0.25, "as_prefilled", 0, "not bit for bit those of decoding. The server's fingerprint"),
    ],
)
def test_scores_are_compared_with_decoding(
    decoded, server, status, said, prompts, tmp_path, capsys
):
    out = tmp_path / "result.json"
    answers = {"/generate": (200, reply(decoded)), "/flush_cache": (200, "")}
    if server:
        answers["/server_info"] = (200, info(server))
    with serving(answers) as url:
        arguments = ["--scores", "--prompts", str(prompts), "--out", str(out)]
        assert main(["check", "--base-url", url, *arguments]) == status
    assert said in " ".join(capsys.readouterr().out.split())
    result = json.loads(out.read_text())
    assert result["scores"] == server
    assert result["decoded"]["differ"] == 2 * (decoded != -0.5)
    assert result["decoded"]["largest"] == abs(decoded + 0.5)
    assert {each["tokens"] for each in result["runs"].values()} == {6}
    assert [each["hits"] for each in result["runs"].values()] == [2, 2, 2]


def test_no_connection_is_used_twice(prompts):
    """A server may close a kept one, as SGLang's did, just as the next request goes out."""

    class Once(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        answered = False

        def do_GET(self) -> None:
            if self.answered:
                self.close_connection = True
                return
            self.answered = True
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply())))
            self.end_headers()
            self.wfile.write(reply().encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Once) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = ["--scores", "--prompts", str(prompts)]
        assert main(["check", "--base-url", url, *options]) == 0
        server.shutdown()


def test_log_probs_and_lists_that_differ_are_counted_by_prompt():
    def scored(*values: float, top: float = -1.0) -> score_check.Scored:
        return score_check.Scored(list(enumerate(values)), [[(5, top)]], 0)

    alone = [scored(-1.0, -2.0), scored(-3.0), scored(-4.0)]
    other = [scored(-1.0, -2.5), scored(-3.0), scored(-4.0, top=-1.5)]
    found = score_check.differences(["a", "b", "c"], alone, other)
    assert found == score_check.Difference(["a", "c"], tokens=4, differ=1, largest=0.5, lists=1)


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/generate", (404, "no"), "/generate answered 404 (no): name an SGLang server, or"),
        ("/generate", (401, ""), "answered 401: give --api-key the server's key."),
        ("/generate", (200, "{}"), "answered without log-probs ({}): name an SGLang server."),
        ("/generate", (200, reply(ids=None)), "without prompt_token_ids, which --scores needs and"),
        ("/flush_cache", (400, ""), "/flush_cache answered 400 for 0 seconds: let nothing else"),
        ("/server_info", (401, ""), "answered 401: give --api-key the server's key."),
    ],
)
def test_a_server_that_cannot_score_is_one_sentence(
    path, answer, said, prompts, monkeypatch, capsys
):
    monkeypatch.setattr(score_check, "_ROOM_S", 0.0)
    good = {"/generate": (200, reply()), "/flush_cache": (200, "")}
    with serving({**good, path: answer}) as url:
        assert main(["check", "--base-url", url, "--scores", "--prompts", str(prompts)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"margingate: {url}") and said in error
