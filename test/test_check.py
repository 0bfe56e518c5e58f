"""What `margingate check` says, without a server."""

from __future__ import annotations

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
        ([], "http://127.0.0.1:9 failed a request ("),
    ],
)
def test_what_cannot_work_is_one_sentence(arguments, said, capsys):
    assert main(["check", "--base-url", "http://127.0.0.1:9", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"margingate: {said}")
