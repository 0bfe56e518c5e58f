"""`n` choices with a seed: are they the same however they are asked for, and single requests too?

    python -m benchmark.sameness.choices --prompts DATA/gsm8k.jsonl --out choices.json

Starts a gated server and asks it for `n` choices of each prompt with a seed of the prompt's own:
each prompt alone, all at once, beside greedy requests, all in one list, each of these streamed and
not, and at last each choice as a single request with the seed that its record says. Every choice is
held to the first run, by token ids, log-probs, text and seed. Ends with status 1 if one differs, if
two choices of a prompt are the same, or if a seed is not the documented one. With the sparse
guarantee log-probs of steps that are not canonical, on a CPU those of more than 64 rows, may
differ where tokens do not: `-- --gate-guarantee exact` holds them too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import torch

from benchmark.bench.machine import environment
from margingate.core.choice_seeds import choice_seed
from margingate.harness.client import Client, Prompt, chat_prompts, read_prompts
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import launch

T = TypeVar("T")
BESIDE = 16  # greedy requests in the company


class Choice(NamedTuple):
    """What a server said of one choice."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    seed: int  # in its record
    fingerprint: str | None


Found = list[list[Choice]]  # by prompt


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL, a prompt a line")
    parser.add_argument("--count", type=int, default=48, help="of prompts")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--at-once", type=int, default=48 if gpu else 8, help="prompts in flight")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of asking")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for the server, after --")
    return parser.parse_args()


class Asker:
    """Asks one server's `/generate` for several choices with a seed."""

    def __init__(self, client: Client, prompts: Sequence[Prompt], args: argparse.Namespace) -> None:
        self._client, self._prompts, self._n = client, prompts, args.n
        self._at_once = args.at_once
        self._params = {"temperature": args.temperature, "max_new_tokens": args.tokens}

    def _drawn(self, i: int, **more: Any) -> dict[str, Any]:
        """Parameters of prompt number `i`, whose seed is its own."""
        return {**self._params, "n": self._n, "sampling_seed": 1000 + i, **more}

    def run(self, name: str) -> Found:
        """All choices of all prompts in one way; all ways begin with an empty radix tree."""
        self._client.flush()
        way, _, streamed = name.partition(", ")
        return asyncio.run(self._within_a_session(WAYS[way], bool(streamed)))

    async def _within_a_session(self, way: _Way, stream: bool) -> Found:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # as `margingate check`
        timeout = aiohttp.ClientTimeout(total=3600)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await way(self, session, stream)

    async def alone(self, session: aiohttp.ClientSession, stream: bool) -> Found:
        return [await self._choices(session, i, stream) for i in range(len(self._prompts))]

    async def together(self, session: aiohttp.ClientSession, stream: bool) -> Found:
        asked = (self._choices(session, i, stream) for i in range(len(self._prompts)))
        return await at_once(self._at_once, asked)

    async def company(self, session: aiohttp.ClientSession, stream: bool) -> Found:
        """As `together`, with greedy requests of other lengths between them."""
        greedy = {"temperature": 0, "max_new_tokens": self._params["max_new_tokens"] // 2 + 1}
        others = [
            asyncio.create_task(self._ask(session, [prompt], greedy, stream=False))
            for prompt in self._prompts[:BESIDE]
        ]
        found = await self.together(session, stream)
        await asyncio.gather(*others)
        return found

    async def listed(self, session: aiohttp.ClientSession, stream: bool) -> Found:
        """All prompts in one request."""
        params = [self._drawn(i) for i in range(len(self._prompts))]
        said = await self._ask(session, self._prompts, params, stream)
        return [said[i : i + self._n] for i in range(0, len(said), self._n)]

    async def singles(self, session: aiohttp.ClientSession, stream: bool) -> Found:
        """Each choice as a request of its own, all at once."""

        async def single(i: int, number: int) -> Choice:
            params = self._drawn(i, n=1, sampling_seed=choice_seed(1000 + i, number))
            (one,) = await self._ask(session, [self._prompts[i]], params, stream)
            return one

        numbers = [(i, j) for i in range(len(self._prompts)) for j in range(self._n)]
        said = await at_once(self._at_once * self._n, (single(*each) for each in numbers))
        return [said[i : i + self._n] for i in range(0, len(said), self._n)]

    async def _choices(self, session: aiohttp.ClientSession, i: int, stream: bool) -> list[Choice]:
        return await self._ask(session, [self._prompts[i]], self._drawn(i), stream)

    async def _ask(
        self, session: aiohttp.ClientSession, prompts: Sequence[Prompt], params: Any, stream: bool
    ) -> list[Choice]:
        """The choices in order; raises RuntimeError for an answer other than 200."""
        ids = [list(prompt.input_ids) for prompt in prompts]
        one = len(ids) == 1
        body = {"input_ids": ids[0] if one else ids, "sampling_params": params}
        body |= {"return_logprob": True, "stream": stream}
        url = f"{self._client.base_url}/generate"
        async with session.post(url, json=body) as reply:
            said = await reply.text()
        if reply.status != 200:
            raise RuntimeError(f"{url} answered {reply.status}: {said[:300]}")
        outputs = _last_of_each(said) if stream else json.loads(said)
        return [_choice(each) for each in ([outputs] if isinstance(outputs, dict) else outputs)]


async def at_once(count: int, asked: Iterable[Awaitable[T]]) -> list[T]:
    """What all give, in order, with so many of them under way."""
    room = asyncio.Semaphore(count)

    async def one(each: Awaitable[T]) -> T:
        async with room:
            return await each

    return await asyncio.gather(*map(one, asked))


_Way = Callable[[Asker, aiohttp.ClientSession, bool], Awaitable[Found]]
WAYS: dict[str, _Way] = {
    "alone": Asker.alone,
    "all at once": Asker.together,
    "beside greedy requests": Asker.company,
    "in one list": Asker.listed,
    "as single requests": Asker.singles,
}
STREAMED = "streamed"


def _last_of_each(said: str) -> list[dict[str, Any]]:
    """Of a stream of several choices, each one's last event, which has all of it."""
    last: dict[int, dict[str, Any]] = {}
    for line in said.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            last[event.get("index", 0)] = event
    return [last[i] for i in sorted(last)]


def _choice(output: dict[str, Any]) -> Choice:
    meta = output["meta_info"]
    gate = meta["gate"]
    values = tuple(value for value, *_ in meta["output_token_logprobs"])
    seed, fingerprint = gate.get("seed", 0), gate["fingerprint"]
    return Choice(tuple(output["output_ids"]), values, output["text"], seed, fingerprint)


def compare(reference: Found, found: Found) -> dict[str, int]:
    """Choices with the tokens of the first run, and those with its log-probs and record too."""
    pairs = [
        pair
        for one, other in zip(reference, found, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    tokens = sum(one.tokens == other.tokens for one, other in pairs)
    return {
        "of": len(pairs),
        "tokens": tokens,
        "same": sum(one == other for one, other in pairs),
    }


def run(asker: Asker, ways: Sequence[str], runs: dict[str, dict[str, Any]]) -> Found:
    """The first run; into `runs` goes, of each, how many choices are as in it."""
    reference: Found = []
    for way in ways:
        for name in (way, f"{way}, {STREAMED}"):
            began = time.monotonic()
            found = asker.run(name)
            reference = reference or found
            seconds = round(time.monotonic() - began, 1)
            runs[name] = {**compare(reference, found), "seconds": seconds}
            print(f"{name:34} {runs[name]}", flush=True)
    return reference


def about(reference: Found) -> dict[str, Any]:
    """Of the first run: prompts whose choices all differ, and what the records say."""
    wanted = [[choice_seed(1000 + i, j) for j in range(len(x))] for i, x in enumerate(reference)]
    return {
        "all choices differ": sum(len({c.tokens for c in x}) == len(x) for x in reference),
        "seeds as documented": [[choice.seed for choice in x] for x in reference] == wanted,
        "fingerprints": sorted({str(choice.fingerprint) for x in reference for choice in x}),
    }


def main() -> int:
    args = arguments()
    model = args.model or str(ensure_model("smollm2"))
    prompts = chat_prompts(read_prompts(args.prompts, args.count), model)
    log = Path(tempfile.mkdtemp(prefix="margingate-")) / "choices.log"
    runs: dict[str, dict[str, Any]] = {}
    said: dict[str, Any] = {**environment(), "prompts": len(prompts), "runs": runs}
    try:
        with launch(model, log, *args.server_args, gate=True) as server:
            client = Client(server.base_url, args.tokens)
            said |= about(run(Asker(client, prompts, args), args.ways, runs))
            state = client.gate_state()
            said["gate"] = {name: state[name] for name in ("steps", "missed", "flips", "integrity")}
    finally:
        args.out.write_text(json.dumps(said, indent=1) + "\n")
    print({name: said[name] for name in ("all choices differ", "seeds as documented", "gate")})
    same = all(found["same"] == found["of"] for found in runs.values())
    apart = said["all choices differ"] == len(prompts)
    return int(not (same and apart and said["seeds as documented"]))


if __name__ == "__main__":
    sys.exit(main())
