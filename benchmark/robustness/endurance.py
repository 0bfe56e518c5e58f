"""Ten minutes of ordinary trouble: clients abort, disconnect and send nonsense; nothing leaks.

    python -m benchmark.robustness.endurance --prompts DATA/*.jsonl --out result.json

Starts a gated server and asks it some requests one at a time, each with parameters drawn at random:
seeds, grammars, penalties, biases, stops, log-probs. Then it sends them at random times, beside
requests that the gate leaves alone. A part is streamed, and half is aborted, disconnected or
malformed at random points. Every answer that was left to end must be the one given alone; memory
of all server processes is read throughout. Ends with status 1 if an answer changed, a malformed
request was not answered with 400, or the integrity check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmark.bench.machine import environment
from margingate.harness.client import Client, Prompt, chat_prompts, read_prompts
from margingate.harness.servers import Server, launch, retracting

STOCK_PATH = ("--gate-fast-path", "stock")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": r"(yes|no|maybe), because [a-z ]{5,30}\."},
    {"ebnf": 'root ::= ("red" | "green") (" " ("red" | "green"))*'},
)
SAMPLERS: tuple[dict[str, Any], ...] = ({"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {})
PENALTIES: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 0.6},
    {"presence_penalty": 0.4, "min_new_tokens": 6},
    {"repetition_penalty": 1.2},
)
STOPS: tuple[dict[str, Any], ...] = (
    {"stop": [" the", "."]},
    {"stop": ["\n"], "no_stop_trim": True},
    {"stop_token_ids": [28, 30]},  # a comma and a full stop of SmolLM2's
    {"stop_regex": ["[0-9]{2}"]},
    {"ignore_eos": True},
    {"skip_special_tokens": False},
)
LOG_PROBS: tuple[dict[str, Any], ...] = (
    {"return_logprob": True},
    {"return_logprob": True, "top_logprobs_num": 3},
    {"return_logprob": True, "token_ids_logprob": [5, 260, 1000]},
    {"return_logprob": True, "logprob_start_len": 0},
)
LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
# Batched with the others, and not gated.
COMPANY: tuple[dict[str, Any], ...] = ({"temperature": 0.9}, {"deterministic": False})
MALFORMED: tuple[dict[str, Any], ...] = (
    {"input_ids": [1, 2, 1 << 30]},
    {"input_ids": [-3]},
    {"sampling_params": {"temperature": 0, "custom_params": {"deterministic": "perhaps"}}},
    {"sampling_params": {"temperature": 0, "regex": "(("}},
    {"sampling_params": {"temperature": 0, "json_schema": "{"}},
    {"sampling_params": {"temperature": 0.5, "sampling_seed": -1}},
    {"sampling_params": {"temperature": -1}},
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--distinct", type=int, default=16, help="requests, over all files")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most; 6 or more")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--retract-every", type=int, metavar="N", help="steps; by SGLang's switch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "server_args",
        nargs="*",
        default=STOCK_PATH,
        help=f"for the server, after --; default {' '.join(STOCK_PATH)}",
    )
    return parser.parse_args()


@dataclass(frozen=True)
class Request:
    """A prompt, and what else is asked of it."""

    prompt: Prompt
    params: Mapping[str, Any]  # sampling parameters, over those of all
    ask: Mapping[str, Any]  # more of the body


def draw(prompt: Prompt, tokens: int, rng: random.Random) -> Request:
    """Random parameters for a gated request; a tenth of them has none but a length."""

    def perhaps(share: float, kinds: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return rng.choice(kinds) if rng.random() < share else {}

    params: dict[str, Any] = {"max_new_tokens": rng.randint(6, tokens)}
    if rng.random() < 0.4:
        params |= {"temperature": rng.choice((0.5, 1.0)), "sampling_seed": rng.randrange(1 << 40)}
        params |= rng.choice(SAMPLERS)
    params |= perhaps(0.35, GRAMMARS) | perhaps(0.3, PENALTIES) | perhaps(0.4, STOPS)
    params |= perhaps(0.2, ({"logit_bias": {"260": 4.0}}, {"logit_bias": {"28": -100.0}}))
    return Request(prompt, params, perhaps(0.4, LOG_PROBS))


class Load:
    """Requests of one run, and what became of them.

    Args:
        log_probs: compare them too, where a request asks for them.
    """

    def __init__(self, client: Client, requests: Sequence[Request], log_probs: bool) -> None:
        self.client = client
        self.requests = requests
        self.lists = LISTS if log_probs else ()
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.alone = {request.prompt.name: self.ask_alone(request) for request in requests}

    def ask_alone(self, request: Request) -> tuple[Any, ...]:
        [answer] = self.client.alone(
            [request.prompt], sampling_params=dict(request.params), **request.ask
        )
        return self.told(answer.tokens, answer.text, answer.meta)

    def told(self, tokens: Sequence[int], text: str, meta: Mapping[str, Any]) -> tuple[Any, ...]:
        """Of an answer, all that must not depend on other requests."""
        return (tuple(tokens), text, meta["finish_reason"], *(meta.get(key) for key in self.lists))

    def body(self, request: Request, rid: str) -> dict[str, Any]:
        params = {**self.client.params, **request.params}
        ids = request.prompt.input_ids
        return {"rid": rid, "input_ids": ids, "sampling_params": params, **request.ask}

    def judge(self, request: Request, rid: str, reply: Mapping[str, Any]) -> None:
        told = self.told(reply["output_ids"], reply["text"], reply["meta_info"])
        wanted = self.alone[request.prompt.name]
        self.ends["same" if told == wanted else "changed"] += 1
        if told != wanted:
            self.wrong.append(f"{rid} {dict(request.params)} {dict(request.ask)}: {told} {wanted}")

    async def whole(self, session: aiohttp.ClientSession, request: Request, rid: str) -> None:
        """Left to end: held to the answer alone."""
        async with session.post("/generate", json=self.body(request, rid)) as response:
            self.judge(request, rid, await response.json())

    async def streamed(self, session: aiohttp.ClientSession, request: Request, rid: str) -> None:
        """Left to end: its texts only ever grow, and the last is the answer alone."""
        last: dict[str, Any] = {"text": ""}
        body = self.body(request, rid) | {"stream": True}
        async with session.post("/generate", json=body) as got:
            async for line in got.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if not chunk["text"].startswith(last["text"]):
                        self.wrong.append(f"{rid}: {last['text']!r} became {chunk['text']!r}")
                    last = chunk
        self.judge(request, rid, last)

    async def company(
        self, session: aiohttp.ClientSession, request: Request, rid: str, rng: random.Random
    ) -> None:
        """Not gated, and not compared."""
        params = {"sampling_params": {"max_new_tokens": 24, **rng.choice(COMPANY)}}
        async with session.post("/generate", json=self.body(request, rid) | params) as response:
            gate = (await response.json())["meta_info"]["gate"]
        self.ends["ungated"] += 1
        if gate["gated"]:
            self.wrong.append(f"{rid} was gated")

    async def leave(
        self, session: aiohttp.ClientSession, request: Request, rid: str, rng: random.Random
    ) -> None:
        """Streamed up to a random chunk, then aborted or dropped."""
        body = self.body(request, rid) | {"stream": True}
        lines, aborts = rng.randrange(0, self.client.params["max_new_tokens"]), rng.random() < 0.5
        async with session.post("/generate", json=body) as got:
            for _ in range(lines):
                if not await got.content.readline():
                    break
            if aborts:
                async with session.post("/abort_request", json={"rid": rid}):
                    pass
                await got.read()
        self.ends["aborted" if aborts else "disconnected"] += 1

    async def nonsense(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        body = {"input_ids": [1, 2, 3], **rng.choice(MALFORMED)}
        async with session.post("/generate", json=body) as response:
            self.ends["refused" if response.status == 400 else "not refused"] += 1
            if response.status != 400:
                self.wrong.append(f"{body}: {response.status}")

    async def run(self, count: int, seconds: float, seed: int) -> None:
        """`count` requests at random times within `seconds`; every second one is trouble."""
        rng = random.Random(seed)
        times = sorted(rng.uniform(0, seconds) for _ in range(count))
        began = time.monotonic()
        timeout, limit = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
        base = self.client.base_url
        session = aiohttp.ClientSession(base, timeout=timeout, connector=limit)
        async with session, asyncio.TaskGroup() as group:
            for i, at in enumerate(times):
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                request, rid = rng.choice(self.requests), f"endurance-{i}"
                trouble, own = i % 2 == 1, random.Random(rng.random())
                if not trouble:
                    way = rng.choice((self.whole, self.streamed))
                    group.create_task(way(session, request, rid))
                elif (kind := rng.random()) < 0.5:
                    group.create_task(self.leave(session, request, rid, own))
                elif kind < 0.75:
                    group.create_task(self.company(session, request, rid, own))
                else:
                    group.create_task(self.nonsense(session, own))


def memory(server: Server) -> float:
    """Resident MiB of all processes of the server, shared pages counted once per process."""
    root = psutil.Process(server.pid)
    return sum(p.memory_info().rss for p in (root, *root.children(recursive=True))) / 2**20


async def watch(server: Server, readings: list[float]) -> None:
    while True:
        readings.append(memory(server))
        await asyncio.sleep(5)


async def drive(server: Server, load: Load, args: argparse.Namespace) -> list[float]:
    readings: list[float] = []
    watcher = asyncio.create_task(watch(server, readings))
    try:
        await load.run(args.requests, args.seconds, args.seed)
    finally:
        watcher.cancel()
    return readings


def settled(client: Client) -> dict[str, Any]:
    """The gate's counters once nothing is open any more, or after 30 s."""
    for _ in range(150):
        state = client.gate_state()
        if not state["open"]:
            break
        time.sleep(0.2)
    client.flush()
    return client.gate_state()


def main() -> int:
    args = arguments()
    if args.model is None:
        from margingate.harness.embedded_model import ensure_model

        args.model = str(ensure_model("smollm2"))
    each = -(-args.distinct // len(args.prompts))
    pairs = [pair for path in args.prompts for pair in read_prompts(path, each)]
    rng = random.Random(args.seed)
    requests = [draw(prompt, args.tokens, rng) for prompt in chat_prompts(pairs, args.model)]
    log = Path(tempfile.mkdtemp(prefix="margingate-")) / "server.log"
    env = {} if args.retract_every is None else retracting(args.retract_every)
    with launch(args.model, log, *args.server_args, gate=True, env=env) as server:
        client = Client(server.base_url, args.tokens)
        exact = "exact" in args.server_args
        load = Load(client, requests, log_probs=exact)
        client.together([request.prompt for request in requests])  # buffers grow to a batch's size
        readings = asyncio.run(drive(server, load, args))
        state = settled(client)
    quarter = max(1, len(readings) // 4)
    first, last = (
        sorted(part)[len(part) // 2] for part in (readings[:quarter], readings[-quarter:])
    )
    record = {
        "environment": environment(),
        "ends": dict(load.ends),
        "wrong": load.wrong,
        "memory_mib": {"first_quarter": first, "last_quarter": last, "readings": readings},
        "gate": {
            k: state[k]
            for k in ("steps", "flagged", "verified", "flips", "missed", "passes", "retractions")
        },
        "open": state["open"],
        "held": state["held"],
        "integrity": state["integrity"],
    }
    args.out.write_text(json.dumps(record, indent=1))
    print(dict(load.ends), f"memory {first:.0f} -> {last:.0f} MiB, integrity {state['integrity']}")
    return int(bool(load.wrong or state["open"] or state["held"] or state["integrity"] != "ok"))


if __name__ == "__main__":
    sys.exit(main())
