"""Ten minutes of ordinary trouble: clients abort, disconnect and send nonsense; nothing leaks.

    python benchmark/endurance.py --prompts ../shared/data/*.jsonl --out result.json

Starts a gated server, asks it some prompts one at a time, then sends requests at random times. Half
of them are aborted, disconnected or malformed at random points. Every answer that was left to end
must be the one given alone; memory of all server processes is read throughout. Ends with status 1
if an answer changed, a malformed request was not answered with 400, or the integrity check fails.
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
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from determinism import environment

from margingate.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.servers import Server, launch

GATE = ("--deterministic-gate", "--gate-fast-path", "stock")
MALFORMED: tuple[dict[str, Any], ...] = (
    {"input_ids": [1, 2, 1 << 30]},
    {"input_ids": [-3]},
    {"sampling_params": {"temperature": 0, "custom_params": {"deterministic": "perhaps"}}},
    {"sampling_params": {"temperature": 0, "regex": "a+"}},
    {"sampling_params": {"temperature": 0.5, "sampling_seed": -1}},
    {"sampling_params": {"temperature": -1}},
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--distinct", type=int, default=16, help="prompts, over all files")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for the server, after --")
    return parser.parse_args()


class Load:
    """Requests of one run, and what became of them."""

    def __init__(self, client: Client, alone: list[Answer], prompts: list[Prompt]) -> None:
        self.client = client
        self.alone = {answer.name: answer for answer in alone}
        self.prompts = prompts
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    def body(self, prompt: Prompt, rid: str) -> dict[str, Any]:
        params = self.client.params
        return {"rid": rid, "input_ids": prompt.input_ids, "sampling_params": params}

    async def whole(self, session: aiohttp.ClientSession, prompt: Prompt, rid: str) -> None:
        """Left to end: held to the answer alone."""
        async with session.post("/generate", json=self.body(prompt, rid)) as response:
            reply = await response.json()
        same = tuple(reply["output_ids"]) == self.alone[prompt.name].tokens
        self.ends["same" if same else "changed"] += 1
        if not same:
            self.wrong.append(rid)

    async def leave(
        self, session: aiohttp.ClientSession, prompt: Prompt, rid: str, rng: random.Random
    ) -> None:
        """Streamed up to a random chunk, then aborted or dropped."""
        lines, aborts = rng.randrange(0, self.client.params["max_new_tokens"]), rng.random() < 0.5
        async with session.post("/generate", json=self.body(prompt, rid) | {"stream": True}) as got:
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
                prompt, rid = rng.choice(self.prompts), f"endurance-{i}"
                if i % 2 == 0:
                    group.create_task(self.whole(session, prompt, rid))
                elif rng.random() < 0.75:
                    own = random.Random(rng.random())
                    group.create_task(self.leave(session, prompt, rid, own))
                else:
                    group.create_task(self.nonsense(session, rng))


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
        from margingate.cli.model import ensure_model

        args.model = str(ensure_model("smollm2"))
    each = -(-args.distinct // len(args.prompts))
    pairs = [pair for path in args.prompts for pair in read_prompts(path, each)]
    prompts = chat_prompts(pairs, args.model)
    log = Path(tempfile.mkdtemp(prefix="margingate-")) / "server.log"
    with launch(args.model, log, *GATE, *args.server_args) as server:
        client = Client(server.base_url, args.tokens)
        alone = client.alone(prompts)
        client.together(prompts)  # buffers grow to a batch's size
        load = Load(client, alone, prompts)
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
            k: state[k] for k in ("steps", "flagged", "verified", "flips", "missed", "passes")
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
