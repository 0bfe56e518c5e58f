"""Decode-step latency by batch size and context: stock, gated, and SGLang's deterministic mode.

    python -m benchmark.speed.decode_step --model benchmark/models/configs/llama-3.1-8b \
        --out steps.json

Dummy weights: for speed only. As many engines as fit are up at once, and every point
is measured engine by engine; ratios are to the first mode, within a group where it is up. The last
request of a batch is streamed, the others are not: with all of them decoding, the time between its
tokens is a step, scheduling and output included. Points beyond the K/V pool are left out.

The modes NAME-default have the attention that they choose themselves: FlashAttention 3 on Hopper,
Triton with the gate. Others have one that is told: FlashInfer where the name has none. gate-16 runs
16 requests at most, so that layers by Marlin need not serve larger steps.

`--prefills` times prompts of so many tokens too: from sending one, which nothing cached, to its
first token. `--turns` times a turn of 64 tokens behind so many cached ones. A mode NAME@FOLDER is
measured with margingate from another checkout. On Blackwell, MARGINGATE_DUAL_GEMM=keep or off has
gated engines use SGLang's DualGemm, or not, whatever its bits.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import time
from functools import partial
from itertools import pairwise, product
from typing import Any

from benchmark.bench import engines

GATE = {"deterministic_gate": True}
DETERMINISTIC = {"enable_deterministic_inference": True}
FLASHINFER = {"attention_backend": "flashinfer"}
TRITON = {"attention_backend": "triton"}
FA3 = {"attention_backend": "fa3"}
MODES: dict[str, dict[str, Any]] = {
    "stock-default": {},  # the attention backend is SGLang's choice
    "stock": FLASHINFER,
    "stock-triton": TRITON,
    "stock-fa3": FA3,
    "stock-no-overlap": {**FLASHINFER, "disable_overlap_schedule": True},
    "gate-default": GATE,
    "gate": {**FLASHINFER, **GATE},
    "gate-triton": {**TRITON, **GATE},
    "gate-16": {**GATE, "max_running_requests": 16},
    "gate-exact": {**FLASHINFER, **GATE, "gate_guarantee": "exact"},
    "gate-no-overlap": {**FLASHINFER, **GATE, "gate_overlap": "off"},
    "deterministic-default": DETERMINISTIC,
    "deterministic": {**FLASHINFER, **DETERMINISTIC},
    "deterministic-triton": {**TRITON, **DETERMINISTIC},
    "deterministic-fa3": {**FA3, **DETERMINISTIC},
}
USUAL = ("stock-default", "gate-default", "deterministic-default")
SETTLING = 4  # tokens before the first gap that counts
BEHIND = 64  # tokens of the others behind the streamed one's last
TURN = -64  # in place of a batch: a turn of so many tokens
PROMPT_TOKENS = 16_000  # of a repeat, in 4 to 16 prompts: the CPU's part of short ones is unsteady


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines.add_options(parser, budget_s=500, kv_tokens=65_536)
    parser.add_argument("--modes", nargs="+", type=mode, default=USUAL, help=", ".join(MODES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefills", nargs="*", type=int, default=[], help="tokens of a prompt")
    parser.add_argument("--turns", nargs="*", type=int, default=[], help="tokens that are cached")
    parser.add_argument("--prefill-graphs", action="store_true", help="as SGLang has them")
    parser.add_argument("--tp-size", type=int, default=1, help="GPUs of each engine")
    return parser.parse_args()


def mode(text: str) -> str:
    """A mode, with or without @FOLDER; ValueError where there is none of that name."""
    if text.partition("@")[0] not in MODES:
        raise ValueError(text)
    return text


def most_requests(text: str) -> float:
    """Requests that the engine of a mode runs at once."""
    return MODES[text.partition("@")[0]].get("max_running_requests", math.inf)


def fits(batch: int, context: int, tokens: int, kv_tokens: int) -> bool:
    """Whether a point's requests fit into the K/V pool, of which SGLang keeps some."""
    return 1.25 * max(batch, 1) * (context + tokens + BEHIND) <= kv_tokens


async def gaps(engine: Any, batch: int, context: int, tokens: int) -> list[float]:
    """Seconds between the tokens of the last request while all `batch` requests decode."""
    rng = random.Random(batch * 1000 + context)
    prompts = [[rng.randrange(10, 30000) for _ in range(context)] for _ in range(batch)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    whole = {**params, "max_new_tokens": tokens + BEHIND}  # they end behind the streamed one

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


def prefill_ms(engine: Any, tokens: int, repeats: int, cached: int = 0) -> float:
    """Median time from a prompt to its first token; nothing cached it, or its first tokens."""
    rng = random.Random(tokens)
    params = {"temperature": 0, "max_new_tokens": 1}

    def some(count: int) -> list[int]:
        return [rng.randrange(10, 30000) for _ in range(count)]

    before = some(cached)
    if cached:
        engine.flush_cache()
        engine.generate(input_ids=before, sampling_params=params)
    times = []
    for _ in range(repeats + 2):
        prompt = [*before, *some(tokens)]
        if not cached:
            engine.flush_cache()
        began = time.perf_counter()
        engine.generate(input_ids=prompt, sampling_params=params)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:]) * 1e3


def measure(engine: Any, batch: int, context: int, args: argparse.Namespace) -> float:
    """Milliseconds of a decode step; without a batch, of the prefill of so many tokens; or of a
    turn behind them."""
    if batch == TURN:
        return prefill_ms(engine, -TURN, 8 * args.repeats, context)
    if batch == 0:
        prompts = min(max(PROMPT_TOKENS // context, 4), 16)
        return prefill_ms(engine, context, prompts * args.repeats)
    return step_ms(engine, batch, context, args.tokens, args.repeats)


def serve(args: argparse.Namespace) -> None:
    """Start one engine, then measure what each line of stdin asks for."""
    options = dict(MODES[args.one.partition("@")[0]])
    if args.prefill_graphs:
        options["cuda_graph_backend_prefill"] = None
    if args.tp_size > 1:
        options["tp_size"] = args.tp_size
    longest = max([*args.contexts, *args.prefills, *args.turns]) + args.tokens + BEHIND + 8
    options["context_length"] = engines.context(args.model, max(longest, engines.LONGEST))
    engine = engines.start(args.model, args.kv_tokens, max(args.batches), **options)
    engines.serve(engine, partial(measure, args=args))
    if state := engines.gate_state(engine):
        engines.tell({name: state[name] for name in ("steps", "flagged", "passes")})
    engine.shutdown()


def run_group(
    args: argparse.Namespace, modes: list[str], results: list[dict[str, Any]], seconds: float
) -> None:
    """Start these engines, measure every point, add to `results` and write them."""
    workers = engines.all_up(modes, args)
    deadline = time.monotonic() + seconds
    prefills = [(tokens, 0) for tokens in args.prefills]
    prefills += [(tokens, TURN) for tokens in args.turns]
    for context, batch in [*prefills, *product(args.contexts, args.batches)]:
        if not fits(batch, context, args.tokens, args.kv_tokens):
            continue
        if time.monotonic() > deadline:
            print("out of time before", context, batch)
            continue
        able = [worker for worker in workers if batch <= most_requests(worker.mode)]
        asked = {worker.mode: worker.ask(batch, context) for worker in able}
        steps = {mode: ms for mode, ms in asked.items() if ms is not None}
        results.append({"context": context, "batch": batch, "step_ms": steps})
        engines.write(args.out, results)
        same = (found for found in results if found["context"] == context)
        known = [found["step_ms"] for found in same if found["batch"] == batch]
        base = next((ms[args.modes[0]] for ms in known if args.modes[0] in ms), float("nan"))
        cells = [f"{mode} {ms:.2f} ({ms / base:.3f})" for mode, ms in steps.items()]
        kind = {0: "prefill", TURN: "turn behind"}.get(batch, f"batch {batch:4}, context")
        point = f"{kind} {context:5}:"
        print(point, "  ".join(cells), flush=True)
    for worker in workers:
        print(worker.mode, worker.end())


def main() -> None:
    args = arguments()
    if args.one:
        serve(args)
        return
    results: list[dict[str, Any]] = []
    for modes, seconds in engines.turns(args, args.modes):
        run_group(args, modes, results, seconds)


if __name__ == "__main__":
    main()
