"""A small client of `/generate`, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

Progress = Callable[[], None]


@dataclass(frozen=True)
class Prompt:
    """One request's prompt, as token ids."""

    name: str
    input_ids: tuple[int, ...]
    images: tuple[str, ...] = ()  # data URLs, one for each of the ids that stands for an image


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    name: str  # the prompt's
    tokens: tuple[int, ...]  # ids of the output, an end token included
    text: str
    meta: dict[str, Any]  # meta_info of /generate: "gate", "cached_tokens", "finish_reason", ...


def read_prompts(path: Path, count: int | None = None) -> list[tuple[str, str]]:
    """(id, prompt) pairs from a JSONL file whose lines have a `prompt`.

    Args:
        path: UTF-8 text, with a byte order mark or without. A line without an `id` has the file's
            stem and its number.
        count: read no more than so many; None: all.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the line that is not such an object; UnicodeDecodeError where it is not
            UTF-8.
    """
    pairs: list[tuple[str, str]] = []
    # Not splitlines(), which ends lines at characters that a JSON string may hold.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if count is not None and len(pairs) >= count:
            break
        if line.strip():
            pairs.append(_pair(line, f"{path}, line {number}", f"{path.stem}-{number}"))
    if not pairs:
        raise ValueError(f"{path} holds no prompts: give a JSONL file with a prompt a line.")
    return pairs


def _pair(line: str, where: str, default: str) -> tuple[str, str]:
    """A line's id and prompt; raises ValueError, which says `where`."""
    try:
        record = json.loads(line)
        name, prompt = record.get("id"), record["prompt"]
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f'{where}: not a JSON object with a "prompt": correct the line.') from None
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: "prompt" is {json.dumps(prompt)[:60]}: give a text in quotes.')
    return default if name is None else str(name), prompt


def chat_prompts(pairs: Sequence[tuple[str, str]], model_path: Path | str) -> list[Prompt]:
    """Apply the model's chat template to (id, text) pairs, each as a user's only message.

    Raises:
        OSError, ValueError: transformers', where no tokenizer loads or it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = []
    for name, text in pairs:
        messages = [{"role": "user", "content": text}]
        templated = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(templated, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(name, tuple(ids)))
    return prompts


_Work = Callable[[aiohttp.ClientSession], Awaitable[list[Answer]]]


class Client:
    """Sends prompts to one server, greedily; every call opens and closes its own connections.

    Args:
        base_url: of the server, without a path.
        max_new_tokens: of each answer, at most.
        timeout_s: seconds for a single request, waiting included.

    Raises:
        RuntimeError: from `alone` and `together`, with the status and what the server says, for
            an answer other than 200.
        aiohttp.ClientError, TimeoutError: from the same, where there is no answer.
    """

    def __init__(self, base_url: str, max_new_tokens: int, timeout_s: float = 3600) -> None:
        self.base_url = base_url.rstrip("/")
        self.params = {"temperature": 0, "max_new_tokens": max_new_tokens}
        self.timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def _post(self, session: aiohttp.ClientSession, prompt: Prompt, **extra: Any) -> Answer:
        params = {**self.params, **extra.pop("sampling_params", {})}
        body = {"input_ids": prompt.input_ids, "sampling_params": params, **extra}
        if prompt.images:
            body["image_data"] = list(prompt.images)
        async with session.post(f"{self.base_url}/generate", json=body) as response:
            if response.status != 200:
                said = " ".join((await response.text()).split())[:400]
                raise RuntimeError(f"{self.base_url} answered {response.status}: {said}")
            reply = await response.json()
        return Answer(prompt.name, tuple(reply["output_ids"]), reply["text"], reply["meta_info"])

    def _run(self, work: _Work) -> list[Answer]:
        async def session_scope() -> list[Answer]:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(timeout=self.timeout, connector=connector) as session:
                return await work(session)

        return asyncio.run(session_scope())

    def alone(
        self, prompts: Sequence[Prompt], progress: Progress | None = None, **extra: Any
    ) -> list[Answer]:
        """One request at a time, in order.

        Args:
            progress: called after each answer.
            extra: more of the request's body; "sampling_params" are added to the client's.
        """

        async def work(session: aiohttp.ClientSession) -> list[Answer]:
            answers = []
            for prompt in prompts:
                answers.append(await self._post(session, prompt, **dict(extra)))
                if progress:
                    progress()
            return answers

        return self._run(work)

    def together(
        self,
        prompts: Sequence[Prompt],
        progress: Progress | None = None,
        delays_s: Sequence[float] | None = None,
        params: Mapping[str, dict[str, Any]] | None = None,
        **extra: Any,
    ) -> list[Answer]:
        """All at once, or each after its own delay; answers in the order of `prompts`.

        Args:
            progress: called after each answer.
            delays_s: seconds before each prompt is sent, as many as prompts; None: none.
            params: sampling parameters by prompt's name, one for each, over those of all.
            extra: as in `alone`, for all prompts.

        Raises:
            ValueError: another number of delays than of prompts.
            KeyError: `params` lacks a prompt.
        """

        async def one(session: aiohttp.ClientSession, prompt: Prompt, delay: float) -> Answer:
            await asyncio.sleep(delay)
            own = dict(extra)
            if params is not None:
                own["sampling_params"] = {**own.get("sampling_params", {}), **params[prompt.name]}
            answer = await self._post(session, prompt, **own)
            if progress:
                progress()
            return answer

        async def work(session: aiohttp.ClientSession) -> list[Answer]:
            waits = delays_s or [0.0] * len(prompts)
            pairs = list(zip(prompts, waits, strict=True))
            return list(await asyncio.gather(*(one(session, p, d) for p, d in pairs)))

        return self._run(work)

    def get(self, path: str) -> Any:
        """GET a JSON document; raises requests.RequestException for anything else."""
        import requests

        return requests.get(self.base_url + path, timeout=60).json()

    def flush(self, wait_s: float = 20) -> None:
        """Empty the radix tree; raises requests.HTTPError when the server stays busy."""
        import requests

        deadline = time.monotonic() + wait_s
        while True:
            reply = requests.post(self.base_url + "/flush_cache", timeout=60)
            if reply.ok or time.monotonic() > deadline:
                reply.raise_for_status()
                return
            time.sleep(0.1)  # the last request's batch may not have been filtered yet

    def gate_state(self) -> dict[str, Any]:
        """The gate's counters, those of all replicas summed; KeyError without the gate."""
        state: dict[str, Any] = self.gate_states()[0]
        return state | state.get("all_replicas", {})

    def gate_states(self) -> list[dict[str, Any]]:
        """What the gate of each replica says; KeyError on a server without the gate."""
        states = self.get("/server_info")["internal_states"]
        return [state["margingate"] for state in states]
