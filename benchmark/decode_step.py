"""Decode-step latency by batch size and context: stock, gated, and SGLang's deterministic mode.

    python benchmark/decode_step.py --model benchmark/configs/llama-3.1-8b --out steps.json

Dummy weights: for speed only. All engines are started first, each in a process of its own, and
stay; then every point is measured engine by engine, so that a drift of the machine meets them all.
The last request of a batch is streamed, the others are not: with all of them decoding, the time
between its tokens is a step, scheduling and output included. The engines must fit into the GPU's
memory together: `--kv-tokens` bounds each one's K/V pool, and points beyond it are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

GATE = {"deterministic_gate": True}
DETERMINISTIC = {"enable_deterministic_inference": True}
FLASHINFER = {"attention_backend": "flashinfer"}
TRITON = {"attention_backend": "triton"}
MODES: dict[str, dict[str, Any]] = {
    "stock": FLASHINFER,
    "stock-triton": TRITON,
    "stock-fa3": {"attention_backend": "fa3"},
    "stock-no-overlap": {**FLASHINFER, "disable_overlap_schedule": True},
    "gate": {**FLASHINFER, **GATE},
    "gate-triton": {**TRITON, **GATE},
    "gate-exact": {**FLASHINFER, **GATE, "gate_guarantee": "exact"},
    "gate-no-overlap": {**FLASHINFER, **GATE, "gate_overlap": "off"},
    "deterministic": {**FLASHINFER, **DETERMINISTIC},
    "deterministic-triton": {**TRITON, **DETERMINISTIC},
}
USUAL = ("stock", "gate", "gate-triton", "deterministic")
SETTLING = 4  # tokens before the first gap that counts
MARK = "@@ "  # before a line that is meant for the parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=USUAL)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-tokens", type=int, default=65_536)
    parser.add_argument("--budget-s", type=float, default=500, help="no new point after this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


async def gaps(engine: Any, batch: int, context: int, tokens: int) -> list[float]:
    """Seconds between the tokens of the last request while all `batch` requests decode."""
    rng = random.Random(batch * 1000 + context)
    prompts = [[rng.randrange(10, 30000) for _ in range(context)] for _ in range(batch)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    whole = {**params, "max_new_tokens": tokens + 64}  # they end behind the streamed one

    async def unstreamed(prompt: list[int]) -> None:
        await engine.async_generate(input_ids=prompt, sampling_params=whole)

    others = [asyncio.ensure_future(unstreamed(prompt)) for prompt in prompts[1:]]
    await asyncio.sleep(0.02)
    times = []
    streamed = {**params, "stream_interval": 1}
    generator = await engine.async_generate(
        input_ids=prompts[0], sampling_params=streamed, stream=True
    )
    async for _ in generator:
        times.append(time.perf_counter())
    await asyncio.gather(*others)
    return [after - before for before, after in pairwise(times[SETTLING:])]


def step_ms(engine: Any, batch: int, context: int, tokens: int, repeats: int) -> float:
    """Mean time of a step in the best of some runs."""
    engine.flush_cache()
    best = float("inf")
    for _ in range(repeats):
        found = engine.loop.run_until_complete(gaps(engine, batch, context, tokens))
        best = min(best, sum(found) / len(found))
    return best * 1e3


def serve(args: argparse.Namespace) -> None:
    """Start one engine, then measure what each line of stdin asks for."""
    import sglang

    engine = sglang.Engine(
        model_path=args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        cuda_graph_max_bs_decode=max(args.batches),
        cuda_graph_backend_prefill="disabled",  # a start of minutes; decode is what is timed
        context_length=16384,
        mem_fraction_static=0.95,
        max_total_tokens=args.kv_tokens,
        log_level="info",
        **MODES[args.one],
    )
    print(MARK + json.dumps("up"), flush=True)
    for line in sys.stdin:
        batch, context = json.loads(line)
        found = step_ms(engine, batch, context, args.tokens, args.repeats)
        print(MARK + json.dumps(found), flush=True)
    if MODES[args.one].get("deterministic_gate"):
        state = engine.get_server_info()["internal_states"][0]["margingate"]
        print(MARK + json.dumps({k: state[k] for k in ("steps", "flagged", "passes")}), flush=True)
    engine.shutdown()


class Worker:
    """The process of one engine."""

    def __init__(self, mode: str, log: Path) -> None:
        command = [sys.executable, *sys.argv, "--one", mode]
        self.mode = mode
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def answer(self) -> Any:
        """The next marked line; None when the process ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        return None

    def ask(self, *point: int) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(point) + "\n")
        self.process.stdin.flush()
        return self.answer()


def main() -> None:
    args = arguments()
    if args.one:
        serve(args)
        return
    import torch

    start = time.monotonic()
    workers = [Worker(mode, args.out.with_suffix(f".{mode}.log")) for mode in args.modes]
    workers = [worker for worker in workers if worker.answer() == "up"]
    print("up:", *(worker.mode for worker in workers), f"{time.monotonic() - start:.0f} s")
    results: list[dict[str, Any]] = []
    for context in args.contexts:
        for batch in args.batches:
            if 1.25 * batch * (context + args.tokens + 64) > args.kv_tokens:  # SGLang keeps some
                continue
            if time.monotonic() - start > args.budget_s:
                print("out of time before", context, batch)
                continue
            steps = {worker.mode: worker.ask(batch, context) for worker in workers}
            results.append({"context": context, "batch": batch, "step_ms": steps})
            base = steps[workers[0].mode]
            cells = [f"{mode} {ms:.2f} ({ms / base:.3f})" for mode, ms in steps.items() if ms]
            print(f"context {context:5} batch {batch:4}:", "  ".join(cells), flush=True)
            record = {
                "device": torch.cuda.get_device_name(),
                "versions": {name: metadata.version(name) for name in ("torch", "sglang")},
                "command": sys.argv,
                "results": results,
            }
            args.out.write_text(json.dumps(record, indent=1))
    for worker in workers:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        print(worker.mode, worker.answer())
        worker.process.wait(60)


if __name__ == "__main__":
    main()
