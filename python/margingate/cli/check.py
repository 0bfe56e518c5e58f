"""`margingate check`: does a server's answer depend on what else it serves?

An answer that changed is named. Status 1 if one did, and 2 if that could not be found out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from margingate.cli import score_table
from margingate.cli.exit_status import CHANGED
from margingate.errors import CliError
from margingate.harness.defaults import PROMPTS
from margingate.harness.inputs import read_pairs, refuse_one, refuse_out, refuse_twins
from margingate.study import score_check
from margingate.study.batch_check import RUNS, CheckOptions, changed_names, check

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate check`."""
    parser = subparsers.add_parser(
        "check",
        help="test whether a running server's answers depend on the batch",
        description="Ask a server with an OpenAI chat API the same prompts alone and in a batch, "
        "greedily. Let nothing else use the server meanwhile, or that is tested too.",
        epilog="Example: margingate check --base-url http://127.0.0.1:30000 --tokens 128. Exit "
        "status: 0 every answer was the same; 1 an answer changed; 2 it could not be tested; 130 "
        "Ctrl-C.",
    )
    parser.add_argument(
        "--base-url",
        required=True,
        metavar="URL",
        help="http://HOST:PORT; /v1 or /v1/chat/completions at its end is no matter",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=PROMPTS,
        metavar="FILE",
        help='JSONL with a "prompt" a line; default: the demo\'s 24',
    )
    parser.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="per answer; default 64"
    )
    parser.add_argument("--model", help="as the server calls it; default: its first one")
    parser.add_argument("--api-key", default="none", metavar="KEY", help="if the server wants one")
    parser.add_argument(
        "--scores",
        action="store_true",
        help="compare log-probs instead, of an SGLang server: of tokens that it decoded, and that "
        "it scores in one go alone, in a batch and from the cache",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Ask, compare, print; 1 if an answer changed."""
    pairs = _read(args)
    options = CheckOptions(args.base_url, args.api_key, args.model, args.tokens)
    if args.scores:
        return _tell(args.out, score_check.check_scores(options, pairs), _SCORES)
    return _tell(args.out, check(options, pairs), _ANSWERS)


def _tell(out: Path | None, result: dict[str, Any], words: _Words) -> int:
    from rich.console import Console

    try:  # whichever of the two fails, the other tells the result
        console = Console(file=sys.stdout)
        console.print(words.table(result))
        console.print(words.meaning(result), highlight=False)
    finally:
        if out:
            _write(out, result)
    return CHANGED if words.changed(result) else 0


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as err:
        raise CliError(
            f"--out {path} cannot be written ({err.strerror}): name another file, or take the "
            "result from the table."
        ) from err


def _read(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The prompts; raises CliError for what cannot work, before anything is asked."""
    if args.tokens < 1:
        raise CliError(f"--tokens is {args.tokens}: give 1 or more.")
    if args.out:
        refuse_out(args.out)
    pairs = read_pairs(args.prompts)
    refuse_twins({args.prompts: pairs})
    refuse_one(args.prompts, pairs)
    return pairs


def make_table(result: dict[str, Any]) -> Table:
    """A row per run: how many answers were the same as alone."""
    from rich.table import Table

    count = result["prompts"]
    table = Table(title=f"{result['model']}: {count} prompts, {result['tokens']} tokens each")
    table.add_column("requests")
    table.add_column("same as alone", justify="right")
    for name, words in RUNS.items():
        table.add_row(words, f"{count - len(result['changed'][name])} of {count}")
    return table


def meaning(result: dict[str, Any]) -> str:
    """The result in plain sentences."""
    names = sorted(changed_names(result))
    if not names:
        known = result.get("fingerprint")
        means = f" The server's fingerprint: {known}." if known else ""
        return f"Every answer was the same alone and in a batch.{means}"
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"{len(names)} of {result['prompts']} answers depend on what else the server does: {shown}."
    )


class _Words(NamedTuple):
    """What is said of a result, and the prompts that changed in it."""

    table: Callable[[dict[str, Any]], Table]
    meaning: Callable[[dict[str, Any]], str]
    changed: Callable[[dict[str, Any]], set[str]]


_ANSWERS = _Words(make_table, meaning, changed_names)
_SCORES = _Words(score_table.make_table, score_table.meaning, score_check.changed_names)
