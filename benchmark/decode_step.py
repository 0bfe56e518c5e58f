"""Decode-step latency by batch size: stock, without overlap, gated, SGLang's deterministic mode.

    python benchmark/decode_step.py --model benchmark/configs/llama-3.1-8b --out steps.json

Dummy weights: for speed only. A step's time is the difference of two runs that differ in the
number of output tokens, over that number; each mode runs in a process of its own.
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

MODES: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock-no-overlap": {"disable_overlap_schedule": True},
    "gate": {"deterministic_gate": True},
    "sglang-deterministic": {"enable_deterministic_inference": True},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention-backend", default="flashinfer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_seconds(engine: Any, batch: int, context: int, tokens: int) -> float:
    rng = random.Random(batch * 1000 + tokens)
    prompts = [[rng.randrange(10, 30000) for _ in range(context)] for _ in range(batch)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    engine.flush_cache()
    start = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params=params)
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import sglang

    start = time.monotonic()
    engine = sglang.Engine(
        model_path=args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend=args.attention_backend,
        cuda_graph_max_bs_decode=max(args.batches),
        context_length=16384,
        mem_fraction_static=0.7,
        log_level="info",
        **MODES[args.one],
    )
    started_s = time.monotonic() - start
    steps = {}
    for batch in args.batches:
        run_seconds(engine, batch, args.context, 4)
        times = [
            run_seconds(engine, batch, args.context, args.tokens + 4)
            - run_seconds(engine, batch, args.context, 4)
            for _ in range(args.repeats)
        ]
        steps[batch] = min(times) / args.tokens * 1e3
        print(f"{args.one:22} batch {batch:4} {steps[batch]:7.2f} ms", flush=True)
    engine.shutdown()
    return {"mode": args.one, "start_s": started_s, "step_ms": steps}


def main() -> None:
    args = arguments()
    if args.one:
        args.out.write_text(json.dumps(measure(args)))
        return
    import torch

    results = []
    for mode in args.modes:
        part = args.out.with_suffix(f".{mode}.json")
        done = subprocess.run(
            [sys.executable, *sys.argv, "--one", mode, "--out", part], check=False
        )
        if done.returncode == 0:
            results.append(json.loads(part.read_text()))
        record = {
            "device": torch.cuda.get_device_name(),
            "versions": {name: metadata.version(name) for name in ("torch", "sglang")},
            "command": sys.argv,
            "context": args.context,
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1))
    for result in results:
        base = results[0]["step_ms"]
        cells = [f"{ms:7.2f} ({ms / base[b]:5.3f})" for b, ms in result["step_ms"].items()]
        print(f"{result['mode']:22}", *cells)


if __name__ == "__main__":
    main()
