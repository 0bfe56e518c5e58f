"""Whether a server's answer depends on what else it serves, seen from outside.

A client for any server with OpenAI's chat completions, gated or not, ours or another's. Each prompt
is asked alone, then in a batch.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from margingate.errors import CliError
from margingate.harness.answers import common_prefix
from margingate.harness.chat_client import (
    Answers,
    ChatClient,
    Pair,
    fingerprint_of,
    first_model,
)
from margingate.harness.defaults import SEED
from margingate.harness.inputs import api_key, in_a_line, server_root
from margingate.harness.progress import progress

if TYPE_CHECKING:
    from aiohttp import ClientSession

T = TypeVar("T")
RUNS = {
    "batched": "all at once",
    "shuffled": "all at once, shuffled",
    "again": "all at once, seen before",
    "arriving": "arriving at random",
}


@dataclass(frozen=True)
class CheckOptions:
    """Which server is asked, and how."""

    base_url: str
    api_key: str
    model: str | None  # as the server calls it; None: its first one
    tokens: int  # per answer


def check(options: CheckOptions, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Every run against the server; raises CliError where it does not answer as expected."""
    return asyncio.run(_ask_all(options, pairs))


async def _ask_all(options: CheckOptions, pairs: Sequence[Pair]) -> dict[str, Any]:
    async def work(session: ClientSession, root: str) -> dict[str, Any]:
        model = options.model or await first_model(session, root)
        fingerprint = await fingerprint_of(session, root)
        client = ChatClient(session, root, model, options.tokens)
        changed = await _changes(client, pairs)
        return {
            "model": model,
            "fingerprint": client.fingerprint or fingerprint,
            "changed": changed,
        }

    found = await with_session(options, work)
    about = {"base_url": options.base_url, "tokens": options.tokens, "prompts": len(pairs)}
    return {"schema": 1, **about, **found}


async def with_session(
    options: CheckOptions, work: Callable[[ClientSession, str], Awaitable[T]]
) -> T:
    """What `work` returns of a session and the server's root address.

    Raises:
        CliError: nobody answers there, or a request failed on its way.
    """
    import aiohttp

    root = server_root(options.base_url)
    headers = {"Authorization": f"Bearer {api_key(options.api_key)}"}
    timeout = aiohttp.ClientTimeout(total=3600)
    # A kept connection may be closed by the server just as the next POST goes out on it.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    try:
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers
        ) as session:
            return await work(session, root)
    except aiohttp.ClientConnectorError as err:
        why = err.os_error.strerror or err.os_error
        raise CliError(
            f"no server answers at {root} ({why}): start it, or correct --base-url."
        ) from err
    except (aiohttp.ClientError, TimeoutError, OSError) as err:
        said = in_a_line(str(err) or type(err).__name__)
        raise CliError(
            f"{options.base_url} failed a request ({said}): see the server's log."
        ) from err


async def _changes(client: ChatClient, pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """By run, the answers that are another than alone, and the first character that differs."""
    with progress((1 + len(RUNS)) * len(pairs)) as bar:
        bar.say("alone")
        alone = await client.one_by_one(pairs, bar.tick)
        found = {}
        for name, words in RUNS.items():
            bar.say(words)
            spread_s = 0.2 * len(pairs) if name == "arriving" else 0.0
            answers = await client.together(_order(pairs, name), spread_s, bar.tick)
            found[name] = _differences(alone, answers)
    return found


def _order(pairs: Sequence[Pair], run: str) -> list[Pair]:
    return random.Random(SEED).sample(list(pairs), len(pairs)) if run == "shuffled" else list(pairs)


def _differences(alone: Answers, said: Answers) -> dict[str, int]:
    """By name of the answers that differ, the first character that does."""
    changed = (name for name in said if alone[name] != said[name])
    return {name: common_prefix(alone[name], said[name]) for name in changed}


def changed_names(result: dict[str, Any]) -> set[str]:
    """Prompts whose answer changed in any run."""
    return set().union(*result["changed"].values())
