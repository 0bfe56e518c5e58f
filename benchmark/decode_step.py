"""Decode-step latency by batch size and context: stock, gated, and SGLang's deterministic mode.

    python benchmark/decode_step.py --model benchmark/configs/llama-3.1-8b --out steps.json

Dummy weights: for speed only. All engines are started first, each in a process of its own, and
stay; then every point is measured engine by engine, so that a drift of the machine meets them all.
A step's time is the difference of two runs that differ in the number of output tokens, over that
number: seen from `Engine.generate`, so scheduling counts. They must fit into the GPU's memory
together: `--kv-tokens` bounds each one's K/V pool, and points that do not fit into it are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from importlib import metadata
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
USUAL = ("stock", "gate", "gate-triton", "deterministic", "deterministic-triton")
MARK = "@@ "  # before a line that is meant for the parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=USUAL)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--kv-tokens", type=int, default=45_000)
    parser.add_argument("--budget-s", type=float, default=500, help="no new point after this")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_seconds(engine: Any, batch: int, context: int, tokens: int) -> float:
    rng = random.Random(batch * 1000 + context)
    prompts = [[rng.randrange(10, 30000) for _ in range(context)] for _ in range(batch)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    start = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start


def step_ms(engine: Any, batch: int, context: int, tokens: int, repeats: int) -> float:
    """The prompts are cached after the first run; runs take turns, and the best of each counts."""
    engine.flush_cache()
    run_seconds(engine, batch, context, 4)
    both = [
        (run_seconds(engine, batch, context, tokens + 4), run_seconds(engine, batch, context, 4))
        for _ in range(repeats)
    ]
    return (min(long for long, _ in both) - min(short for _, short in both)) / tokens * 1e3


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
            if batch * (context + args.tokens + 8) > args.kv_tokens:
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
