"""What events cost: the time per token of a real server, with and without subscribers.

    python -m benchmark.speed.events_overhead --out events.json

Two servers are up, with and without --gate-events-endpoint, and sleep while they are idle. The same
batch of prompts goes to one of them at a time, mode after mode, again and again; the first round
warms up. TPOT is the time of a request's last tokens over their number; a mode's is the median over
all requests and rounds. A busy machine's noise is larger than what is sought, so the publisher's
own time for a step of 20 records is measured too, without a model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp

from margingate.events import Flag, Verdict
from margingate.harness.client import Client, Prompt, chat_prompts, read_prompts
from margingate.harness.defaults import PROMPTS
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import free_port, launch
from margingate.runtime.observe.event_socket import Publisher

MODES = ("no option", "no subscriber", "reads", "stopped reading")
LAST = 32  # tokens of a request that are timed: by then every prompt is prefilled
WATCH = (sys.executable, "-m", "margingate.cli.main", "watch", "--json", "--endpoint")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: the embedded SmolLM2")
    parser.add_argument("--fast-path", choices=("stock", "invariant"), default="stock")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


async def ask_all(url: str, prompts: list[Prompt], tokens: int) -> list[list[float]]:
    """All at once; per request, when each of its tokens was known (seconds)."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

    async def ask(session: aiohttp.ClientSession, prompt: Prompt) -> list[float]:
        body = {"input_ids": prompt.input_ids, "sampling_params": params, "stream": True}
        times: list[float] = []
        async with session.post(f"{url}/generate", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    count = len(json.loads(line[6:])["output_ids"])
                    times += [time.perf_counter()] * (count - len(times))
        return times

    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        return list(await asyncio.gather(*(ask(session, prompt) for prompt in prompts)))


@contextlib.contextmanager
def subscriber(endpoint: str, mode: str, out: Publisher | None = None) -> Iterator[None]:
    """`margingate watch --json` meanwhile, stopped by a signal or not, if the mode has one.

    `out` is the publisher, if it is in this process and has to send what is waited for.
    """
    if mode not in ("reads", "stopped reading"):
        yield
        return
    with subprocess.Popen([*WATCH, endpoint], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while out is not None and not out.look():
            time.sleep(0.01)
        if out is not None:
            out.tell(lambda: Flag("first", 1, 0.0, "below"))
            out.send()
        process.stdout.readline()  # it is subscribed
        if mode == "reads":
            sink = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        else:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.kill()
            if mode == "reads":
                sink.wait()


def measure(args: argparse.Namespace, urls: dict[str, str], endpoint: str) -> dict[str, Any]:
    """TPOTs in ms by mode, warm-up left out."""
    pairs = list(dict(read_prompts(PROMPTS)).items())[: args.batch]
    prompts = chat_prompts(pairs, args.model)
    tpots: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(args.rounds + 1):
        shift = number % len(MODES)  # no mode always comes after the same other
        for mode in (*MODES[shift:], *MODES[:shift]):
            with subscriber(endpoint, mode):
                times = asyncio.run(ask_all(urls[mode], prompts, args.tokens))
            found = [(t[-1] - t[-1 - LAST]) / LAST * 1e3 for t in times]
            tpots[mode] += found if number else []
            print(f"round {number} {mode:16} {statistics.median(found):7.2f} ms", flush=True)
    return tpots


def publisher_us(mode: str, steps: int = 3000) -> float:
    """Microseconds that a step of 20 records takes the scheduler's thread, median of the steps."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    out, rid = Publisher(endpoint), "0123456789abcdef" * 2
    times = []
    with subscriber(endpoint, mode, out):
        for _ in range(steps):
            start = time.perf_counter()
            for row in range(20):
                out.tell(lambda row=row: Verdict(rid, row, "match", 1, 1, 0.25, True, 0))
            out.look()
            out.send()
            times.append((time.perf_counter() - start) * 1e6)
            time.sleep(2e-4)  # what follows a step, for subscriber and socket to keep up
    out.close()
    return statistics.median(times[steps // 2 :])  # a queue that can fill is full by then


def main() -> None:
    args = arguments()
    args.model = args.model or str(ensure_model("smollm2"))
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    options = ("--gate-fast-path", args.fast_path, "--sleep-on-idle")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        urls = {}
        for name, extra in (("plain", ()), ("events", ("--gate-events-endpoint", endpoint))):
            server = launch(args.model, Path(folder) / name, *options, *extra, gate=True)
            urls[name] = stack.enter_context(server).base_url
        by_mode = {mode: urls["plain" if mode == MODES[0] else "events"] for mode in MODES}
        tpots = measure(args, by_mode, endpoint)
        states = {name: Client(url, 1).gate_state() for name, url in urls.items()}
    medians = {mode: statistics.median(values) for mode, values in tpots.items()}
    record = {
        "schema": 1,
        "command": sys.argv,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {name: metadata.version(name) for name in ("margingate", "sglang", "torch")},
        "fast_path": args.fast_path,
        "batch": args.batch,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "tpot_ms": {
            mode: {
                "median": medians[mode],
                "quartiles": statistics.quantiles(values, n=4)[::2],
                "ratio": medians[mode] / medians[MODES[0]],
            }
            for mode, values in tpots.items()
        },
        "publisher_us": {mode: publisher_us(mode) for mode in MODES[1:]},
        "counts": {name: {k: s[k] for k in ("steps", "passes")} for name, s in states.items()},
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for mode in MODES:
        row = record["tpot_ms"][mode]
        low, high = row["quartiles"]
        print(
            f"{mode:16} {row['median']:7.2f} ms ({low:.2f} to {high:.2f})  {row['ratio']:.3f}",
            end="",
        )
        own = record["publisher_us"].get(mode)
        print("" if own is None else f"  {own:.0f} us per step")


if __name__ == "__main__":
    main()
