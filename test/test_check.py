"""What `margingate check` says, without a server."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from margingate.cli import check
from margingate.cli.main import main

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
    assert check.meaning(same) == "Every answer was the same alone and in company."
    told = check.meaning({**same, "fingerprint": "0123"})
    assert told.endswith("in company. The server's fingerprint: 0123.")


def test_differences_name_the_first_character():
    alone = {"a": "same", "b": "one", "c": "on"}
    assert check._differences(alone, {"a": "same", "b": "owe", "c": "one"}) == {"b": 1, "c": 2}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "--tokens is 0"),
        (["--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
        (["--out", "/nowhere/result.json"], "--out /nowhere/result.json cannot be written"),
        (["--base-url", "127.0.0.1:9"], "--base-url is '127.0.0.1:9': give http://HOST:PORT."),
        ([], "no server answers at http://127.0.0.1:9 ("),
    ],
)
def test_what_cannot_work_is_one_sentence(arguments, said, capsys):
    assert main(["check", "--base-url", "http://127.0.0.1:9", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"margingate: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "is not UTF-8 text (invalid start byte): convert it."),
        ('{"id": "x", "prompt": "a"}\n' * 2, "has two prompts with the id 'x': rename one."),
        ("[1]", 'line 1: not a JSON object with a "prompt"'),
        ("", "holds no prompts"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_one_sentence(content, said, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["check", "--base-url", "http://127.0.0.1:9", "--prompts", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("margingate: --prompts") and said in error
    assert error.count("\n") == 1


class Refusing(BaseHTTPRequestHandler):
    """A server that wants another key."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


@pytest.mark.parametrize("command", ["check", "probe"])
def test_a_server_with_a_key_asks_for_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main([command, "--base-url", url]) == 1
        server.shutdown()
    said = f"margingate: {url} answered 401: give --api-key the server's key."
    assert said in capsys.readouterr().err
