"""`margingate check`: does a server's answer depend on what else it serves?

A client for any server with OpenAI's chat completions, gated or not, ours or another's. Each prompt
is asked alone, then in company; an answer that changed is named. Status 1 if one did, and 2 if that
could not be found out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import margingate
from margingate.cli.errors import CHANGED, CliError
from margingate.cli.inputs import (
    api_key,
    in_a_line,
    read_pairs,
    refuse_key,
    refuse_out,
    refuse_twins,
    server_root,
)

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from rich.table import Table

PROMPTS = Path(margingate.__file__).parent / "data" / "demo_prompts.jsonl"
SEED = 20260530
RUNS = {
    "batched": "all at once",
    "shuffled": "all at once, shuffled",
    "again": "all at once, seen before",
    "arriving": "arriving at random",
}
Pair = tuple[str, str]  # a prompt's name and text
Answers = dict[str, str]  # by name


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `margingate check`."""
    parser = subparsers.add_parser(
        "check",
        help="test whether a running server's answers depend on the batch",
        description="Ask a server with an OpenAI chat API the same prompts alone and in company, "
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
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Ask, compare, print; 1 if an answer changed."""
    from rich.console import Console

    pairs = _read(args)
    result = asyncio.run(_ask_all(args, pairs))
    try:  # whichever of the two fails, the other tells the result
        console = Console(file=sys.stdout)
        console.print(make_table(result))
        console.print(meaning(result), highlight=False)
    finally:
        if args.out:
            _write(args.out, result)
    return CHANGED if changed_names(result) else 0


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as err:
        raise CliError(
            f"--out {path} cannot be written ({err.strerror}): name another file, or take the "
            "result from the table."
        ) from err


def _read(args: argparse.Namespace) -> list[Pair]:
    """The prompts; raises CliError for what cannot work, before anything is asked."""
    if args.tokens < 1:
        raise CliError(f"--tokens is {args.tokens}: give 1 or more.")
    if args.out:
        refuse_out(args.out)
    pairs = read_pairs(args.prompts)
    refuse_twins({args.prompts: pairs})
    return pairs


async def _ask_all(args: argparse.Namespace, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every run against the server; raises CliError where it does not answer as expected."""
    import aiohttp

    from margingate.cli.bar import progress

    root = server_root(args.base_url)
    headers = {"Authorization": f"Bearer {api_key(args.api_key)}"}
    options = {
        "connector": aiohttp.TCPConnector(limit=0),
        "timeout": aiohttp.ClientTimeout(total=3600),
        "headers": headers,
    }
    try:
        async with aiohttp.ClientSession(**options) as session:  # type: ignore[arg-type]
            model = args.model or await _first_model(session, root)
            fingerprint = await _fingerprint(session, root)
            asker = Asker(session, root, model, args.tokens)
            with progress((1 + len(RUNS)) * len(pairs)) as bar:
                bar.say("alone")
                alone = await asker.one_by_one(pairs, bar.tick)
                runs = {}
                for name, words in RUNS.items():
                    bar.say(words)
                    runs[name] = await asker.together(_order(pairs, name), name, bar.tick)
    except aiohttp.ClientConnectorError as err:
        why = err.os_error.strerror or err.os_error
        raise CliError(
            f"no server answers at {root} ({why}): start it, or correct --base-url."
        ) from err
    except (aiohttp.ClientError, TimeoutError, OSError) as err:
        said = in_a_line(str(err) or type(err).__name__)
        raise CliError(f"{args.base_url} failed a request ({said}): see the server's log.") from err
    return {
        "schema": 1,
        "base_url": args.base_url,
        "model": model,
        "tokens": args.tokens,
        "prompts": len(pairs),
        "fingerprint": fingerprint,
        "changed": {name: _differences(alone, said) for name, said in runs.items()},
    }


async def _first_model(session: ClientSession, root: str) -> str:
    url = f"{root}/v1/models"
    async with session.get(url) as response:
        refuse_key(root, response.status)
        text = await response.text(errors="replace")
    if response.status == 404:
        raise CliError(
            f"{url} answered 404: is this a server with OpenAI's chat API? Correct --base-url, or "
            "name its model with --model."
        )
    if response.status != 200:
        raise CliError(_refused(url, response.status, text))
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise CliError(
            f"{url} lists no model, but {in_a_line(text)!r}: name one with --model."
        ) from None


def _refused(url: str, status: int, text: str) -> str:
    return f"{url} answered {status} ({in_a_line(text)}): see the server's log."


async def _fingerprint(session: ClientSession, root: str) -> str | None:
    """The gate's, where the server has one; None of any other server."""
    import aiohttp

    async with session.get(f"{root}/server_info") as response:
        try:
            states = (await response.json())["internal_states"]
            return states[0]["margingate"]["fingerprint"] or None
        except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError):
            return None


class Asker:
    """Sends chat completions of one model, greedily."""

    def __init__(self, session: ClientSession, root: str, model: str, tokens: int) -> None:
        self._session, self._root, self._url = session, root, f"{root}/v1/chat/completions"
        self._body = {"model": model, "temperature": 0, "max_tokens": tokens}

    async def one_by_one(self, pairs: Sequence[Pair], tick: Callable[[], None]) -> Answers:
        """Each prompt when the one before is answered."""
        answers = {}
        for name, text in pairs:
            answers[name] = await self._ask(text, tick)
        return answers

    async def together(self, pairs: Sequence[Pair], run: str, tick: Callable[[], None]) -> Answers:
        """All prompts at once, or spread over some seconds where the run is `arriving`."""
        rng = random.Random(SEED)
        spread_s = 0.2 * len(pairs) if run == "arriving" else 0.0

        async def ask(text: str, delay_s: float) -> str:
            await asyncio.sleep(delay_s)
            return await self._ask(text, tick)

        asked = [ask(text, rng.uniform(0, spread_s)) for _, text in pairs]
        said = await asyncio.gather(*asked)
        return dict(zip((name for name, _ in pairs), said, strict=True))

    async def _ask(self, text: str, tick: Callable[[], None]) -> str:
        body = {**self._body, "messages": [{"role": "user", "content": text}]}
        async with self._session.post(self._url, json=body) as response:
            refuse_key(self._root, response.status)
            said = await response.text(errors="replace")
        if response.status != 200:
            raise CliError(_refused(self._url, response.status, said))
        try:
            choice = json.loads(said)["choices"][0]
            answer = f"{choice['message']['content']}\n[{choice['finish_reason']}]"
        except (ValueError, KeyError, IndexError, TypeError):
            raise CliError(
                f"{self._url} answered without a choice ({in_a_line(said)}): name a server with "
                "OpenAI's chat API."
            ) from None
        tick()
        return answer


def _order(pairs: Sequence[Pair], run: str) -> list[Pair]:
    return random.Random(SEED).sample(list(pairs), len(pairs)) if run == "shuffled" else list(pairs)


def _differences(alone: Answers, said: Answers) -> dict[str, int]:
    """By name of the answers that differ, the first character that does."""
    changed = (name for name in said if alone[name] != said[name])
    return {name: _first_difference(alone[name], said[name]) for name in changed}


def _first_difference(one: str, other: str) -> int:
    """Index of the first character that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def changed_names(result: dict[str, Any]) -> set[str]:
    """Prompts whose answer changed in any run."""
    return set().union(*result["changed"].values())


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
        return f"Every answer was the same alone and in company.{means}"
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return (
        f"{len(names)} of {result['prompts']} answers depend on what else the server does: {shown}."
    )
