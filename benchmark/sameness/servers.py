"""Is an answer the same on servers that are set up differently, and however it is sent?

    python -m benchmark.sameness.servers --model MODEL --prompts DATA/*.jsonl \
        --out sameness.json

Starts several servers side by side. The gated ones, with other guarantees, prefill chunks, caches
and memory, share one reference: each of them answers a part of the prompts one at a time. Then each
answers all of them in each arrangement, with log-probs, and is held to that reference. Other
servers (stock, SGLang's deterministic mode, the gate on stock kernels) have a reference each, of
fewer prompts; `stock-default` and `sglang-deterministic-default` have the attention that SGLang
chooses, `stock` and `sglang-deterministic` FlashInfer. Counted are answers with the same token ids,
and of these those whose log-probs have the same bits. Each arrangement is written as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.bench.arrangements import (
    AT_ONCE,
    GATE,
    HOPEFUL,
    STOCK_PATH,
    WithLogprobs,
    arrange,
    compare,
    counters,
)
from benchmark.bench.machine import environment
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.servers import Server, launch

FLASHINFER = ("--attention-backend", "flashinfer")
EXACT = (GATE, "--gate-guarantee", "exact")
GATED: dict[str, tuple[str, ...]] = {
    "gate": (GATE,),
    "exact-4096": (*EXACT, "--chunked-prefill-size", "4096"),
    "exact-512": (*EXACT, "--chunked-prefill-size", "512"),
    "exact-128": (*EXACT, "--chunked-prefill-size", "128"),
    "exact-no-cache": (*EXACT, "--disable-radix-cache"),
    "exact-little-memory": (*EXACT, *HOPEFUL),
}
OTHERS: dict[str, tuple[str, ...]] = {
    "stock-default": (),
    "sglang-deterministic-default": ("--enable-deterministic-inference",),
    "stock": FLASHINFER,
    "sglang-deterministic": ("--enable-deterministic-inference", *FLASHINFER),
    "gate-stock-path": STOCK_PATH,
    "exact-stock-path": (*STOCK_PATH, "--gate-guarantee", "exact"),
}
LITTLE = "exact-little-memory"
_WRITING = threading.Lock()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--per-file", type=int, default=100)
    parser.add_argument("--others", type=int, default=100, help="prompts of the other servers")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight")
    parser.add_argument(
        "--servers", nargs="+", choices=[*GATED, *OTHERS], default=[*GATED, *OTHERS]
    )
    parser.add_argument("--arrangements", nargs="+", choices=AT_ONCE, default=AT_ONCE)
    parser.add_argument("--little", type=int, default=14_000, help=f"K/V tokens of {LITTLE}")
    parser.add_argument("--start-s", type=float, default=300, help="for a server to come up")
    parser.add_argument("--gpus", type=int, default=1, help="servers take turns on them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


@dataclass
class Case:
    """One server and what was found of it."""

    name: str
    server: Server
    prompts: list[Prompt]
    client: Client
    reference: dict[str, Answer] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def start(args: argparse.Namespace, prompts: list[Prompt]) -> list[Case]:
    """All servers side by side; those that came up."""
    logs = Path(os.environ.get("OUT", tempfile.mkdtemp(prefix="margingate-")))
    cases = []
    for i, name in enumerate(args.servers):
        extra = (*{**GATED, **OTHERS}[name], *args.server_args)
        if name == LITTLE:
            extra = (*extra, "--max-total-tokens", str(args.little))
        env = {"CUDA_VISIBLE_DEVICES": str(i % args.gpus)} if args.gpus > 1 else {}
        log = logs / f"same-{name}.log"
        server = launch(args.model, log, *extra, env=env, start_s=args.start_s)
        asked = prompts if name in GATED else prompts[:: max(len(prompts) // args.others, 1)]
        cases.append(Case(name, server, asked, WithLogprobs(server.base_url, args.tokens)))

    def begin(case: Case) -> bool:
        began = time.monotonic()
        try:
            case.server.start()
            case.client.together(case.prompts[:2])
        except Exception as problem:
            print(f"{case.name} did not come up: {problem}", flush=True)
            case.server.stop()
            return False
        case.record["start_s"] = time.monotonic() - began
        return True

    with ThreadPoolExecutor(len(cases)) as pool:
        up = list(pool.map(begin, cases))
    return [case for case, came in zip(cases, up, strict=True) if came]


def answer_alone(cases: list[Case]) -> None:
    """Each gated server a part of the common reference, each other one its own."""
    gated = [case for case in cases if case.name in GATED]

    def alone(case: Case) -> list[Answer]:
        asked = case.prompts
        if case in gated:
            asked = asked[gated.index(case) :: len(gated)]
        case.client.flush()
        return case.client.alone(asked)

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(alone, cases))
    common = {
        answer.name: answer
        for case, answers in zip(cases, found, strict=True)
        if case in gated
        for answer in answers
    }
    for case, answers in zip(cases, found, strict=True):
        case.reference = common if case in gated else {one.name: one for one in answers}


def write(args: argparse.Namespace, cases: list[Case]) -> None:
    """What is known by now, whole at any moment; servers take turns."""
    with _WRITING:
        record = {
            "environment": environment(),
            "tokens": args.tokens,
            "prompts": max((len(case.prompts) for case in cases), default=0),
            "cases": {case.name: dict(case.record) for case in cases},
        }
        made = args.out.with_name(args.out.name + ".part")
        made.write_text(json.dumps(record, indent=1))
        made.replace(args.out)


def run(case: Case, args: argparse.Namespace, cases: list[Case]) -> None:
    """All arrangements of one of the servers."""
    at_once = 0 if case.name == LITTLE else args.at_once
    for name in args.arrangements:
        began = time.monotonic()
        try:
            answers = arrange(case.client, case.prompts, name, at_once)
        except Exception as problem:
            print(f"{case.name} {name}: {problem!r}", flush=True)
            case.record[name] = {"error": repr(problem)}
            return
        found = compare(case.reference, answers)
        case.record[name] = {**found, "seconds": time.monotonic() - began}
        write(args, cases)
        print(f"{case.name:20} {name:10}", found, flush=True)
    case.record["gate"] = counters(case.client)


def main() -> None:
    args = arguments()
    pairs = [pair for path in args.prompts for pair in read_prompts(path, args.per_file)]
    prompts = chat_prompts(pairs, args.model)
    began = time.monotonic()
    cases = start(args, prompts)
    print("up:", *(case.name for case in cases), f"{time.monotonic() - began:.0f} s", flush=True)
    if not cases:
        raise SystemExit(
            "No server came up, so nothing was compared: raise --start-s, or see above."
        )
    try:
        answer_alone(cases)
        print(f"alone after {time.monotonic() - began:.0f} s", flush=True)
        with ThreadPoolExecutor(len(cases)) as pool:
            list(pool.map(lambda case: run(case, args, cases), cases))
    finally:
        write(args, cases)
        for case in cases:
            case.server.stop()
    print(f"done after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
