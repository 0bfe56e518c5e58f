"""A client of OpenAI's chat completions, for any server that has them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.harness.defaults import SEED
from margingate.harness.inputs import in_a_line, refuse_key

if TYPE_CHECKING:
    from aiohttp import ClientSession

Pair = tuple[str, str]  # a prompt's name and text
Answers = dict[str, str]  # by name
_UNGATED = "no gate"


async def first_model(session: ClientSession, root: str) -> str:
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


async def fingerprint_of(session: ClientSession, root: str) -> str | None:
    """The gate's, where the server has one; None of any other server.

    Raises CliError where its replicas have different ones.
    """
    import aiohttp

    async with session.get(f"{root}/server_info") as response:
        try:
            states = (await response.json())["internal_states"]
            found = {state["margingate"]["fingerprint"] for state in states}
        except (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError):
            return None
    if len(found) > 1:
        raise mixed(root, *map(_named, found))
    return found.pop() if found else None


def mixed(root: str, *fingerprints: str) -> CliError:
    """Several servers, or replicas of one, answer at this address, and not alike."""
    return CliError(
        f"answers at {root} come from servers with different fingerprints "
        f"({', '.join(sorted(fingerprints))}), so that they may depend on which one serves: give "
        "all the same version, settings, weights and machine, or check each by itself."
    )


def _named(fingerprint: Any) -> str:
    return "none" if fingerprint is None else str(fingerprint)


class ChatClient:
    """Sends chat completions of one model, greedily."""

    def __init__(self, session: ClientSession, root: str, model: str, tokens: int) -> None:
        self._session, self._root, self._url = session, root, f"{root}/v1/chat/completions"
        self._body = {"model": model, "temperature": 0, "max_tokens": tokens}
        self._fingerprint: str | None = None  # of the gate, in the first answer

    @property
    def fingerprint(self) -> str | None:
        """The gate's, of all answers so far; None where they came from no gate, or had none."""
        return None if self._fingerprint in (_UNGATED, _named(None)) else self._fingerprint

    async def one_by_one(self, pairs: Sequence[Pair], tick: Callable[[], None]) -> Answers:
        """Each prompt when the one before is answered."""
        answers = {}
        for name, text in pairs:
            answers[name] = await self._ask(text, tick)
        return answers

    async def together(
        self, pairs: Sequence[Pair], spread_s: float, tick: Callable[[], None]
    ) -> Answers:
        """All prompts at once, or at random moments of `spread_s` seconds."""
        rng = random.Random(SEED)

        async def ask(text: str, delay_s: float) -> str:
            await asyncio.sleep(delay_s)
            return await self._ask(text, tick)

        asked = [ask(text, rng.uniform(0, spread_s)) for _, text in pairs]
        said = await asyncio.gather(*asked)
        return dict(zip((name for name, _ in pairs), said, strict=True))

    async def _ask(self, text: str, tick: Callable[[], None]) -> str:
        asked = {**self._body, "messages": [{"role": "user", "content": text}]}
        async with self._session.post(self._url, json=asked) as response:
            refuse_key(self._root, response.status)
            said = await response.text(errors="replace")
        if response.status != 200:
            raise CliError(_refused(self._url, response.status, said))
        try:
            body = json.loads(said)
            choice = body["choices"][0]
            answer = f"{choice['message']['content']}\n[{choice['finish_reason']}]"
        except (ValueError, KeyError, IndexError, TypeError):
            raise CliError(
                f"{self._url} answered without a choice ({in_a_line(said)}): name a server with "
                "OpenAI's chat API."
            ) from None
        self._note(body)
        tick()
        return answer

    def _note(self, body: dict[str, Any]) -> None:
        """Raises CliError for an answer of another server than the answers before."""
        beside = body.get("metadata")
        records = beside.get("gate") if isinstance(beside, dict) else None
        found = _named(records[0].get("fingerprint")) if records else _UNGATED
        if self._fingerprint not in (None, found):
            raise mixed(self._root, str(self._fingerprint), found)
        self._fingerprint = found
