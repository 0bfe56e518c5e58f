"""What verification adds to a decode step, by the share of rows that are flagged.

    python benchmark/latency_increment.py --model benchmark/configs/llama-3.1-8b --out inc.json

Dummy weights, `--gate-fast-path stock`. Flags are simulated at fixed rates (`margin-R`), beside an
engine that verifies every row at every step (`always`) and a stock one. A step's time is that of a
whole batch's generation, from the request to the last settled token, less that of a short one,
divided by the tokens between them: prefill and the end cancel out. The figure of merit is the
increment of `always` over stock, divided by that of `margin`. The best of some rounds counts; each
round does the same work. The engines must fit into the GPU's memory together (`--kv-tokens`).
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from typing import Any

import engines

STOCK, ALWAYS, MARGIN = "stock", "always", "margin-"
USUAL = (STOCK, "margin-0.05", "margin-0.1856", "margin-0.5", ALWAYS)
SHORT = 16  # tokens of the generation that is taken off
COUNTED = ("steps", "flagged", "verified", "passes", "flips", "rolled_back")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines.add_options(parser, budget_s=400, kv_tokens=32_768)
    parser.add_argument(
        "--modes", nargs="+", type=mode, default=USUAL, help=f"{STOCK}, {ALWAYS}, {MARGIN}RATE"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="of the long generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flip-rate", type=float, default=0.0, help="of the flagged rows")
    parser.add_argument("--max-delay", type=int, help="--gate-max-delay of the margin modes")
    parser.add_argument("--rows", type=int, help="--gate-rows of all gated modes")
    parser.add_argument("--attention-backend", help="of all engines; default: triton on a GPU")
    return parser.parse_args()


def mode(text: str) -> str:
    """One of the modes; ValueError, which argparse turns into a message, for anything else."""
    if text not in (STOCK, ALWAYS):
        float(text.removeprefix(MARGIN))
    return text


def options(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """For `sglang.Engine`."""
    backend = args.attention_backend or ("triton" if engines.on_gpu() else None)
    base = {"attention_backend": backend} if backend else {}
    if mode == STOCK:
        return base
    gate = {"deterministic_gate": True, "gate_fast_path": "stock"}
    given: dict[str, Any] = {"gate_rows": args.rows}
    if mode == ALWAYS:
        given |= {"gate_policy": "always", "gate_max_delay": 0}
    else:
        rate = float(mode.removeprefix(MARGIN))
        given |= {"gate_simulate_trigger_rate": rate, "gate_max_delay": args.max_delay}
        given |= {"gate_simulate_flip_rate": args.flip_rate}
    return base | gate | {name: value for name, value in given.items() if value is not None}


def generate(engine: Any, batch: int, tokens: int, context: int) -> dict[str, Any]:
    """Seconds of one generation of `batch` requests, and what the gate counted meanwhile."""
    rng = random.Random(batch)
    prompts = [[rng.randrange(10, 30000) for _ in range(context)] for _ in range(batch)]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    flush(engine)
    before = engines.gate_state(engine)
    begun = time.perf_counter()
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    seconds = time.perf_counter() - begun
    assert all(len(answer["output_ids"]) == tokens for answer in answers)
    after = engines.gate_state(engine)
    counted = {name: after[name] - before[name] for name in COUNTED} if after and before else {}
    return {"seconds": seconds, **counted}


def flush(engine: Any) -> None:
    """Empty the radix tree, once the last batch is gone."""
    for _ in range(100):
        if engine.flush_cache().success:
            return
        time.sleep(0.05)


def serve(args: argparse.Namespace) -> None:
    """Start one engine, then measure what each line of stdin asks for."""
    engine = engines.start(args.model, args.kv_tokens, max(args.batches), **options(args, args.one))
    engines.serve(engine, partial(generate, context=args.context))
    engine.shutdown()


def measure(workers: list[engines.Worker], batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step and the gate's counts, by mode; engines that ended are left out."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {
        worker.mode: {SHORT: [], tokens: []} for worker in workers
    }
    for worker in workers:
        worker.ask(batch, SHORT)  # kernels are compiled and tuned
    for _ in range(rounds):
        for worker in workers:
            for length, runs in found[worker.mode].items():
                if (run := worker.ask(batch, length)) is not None:
                    runs.append(run)
    return {
        mode: summary(runs[SHORT], runs[tokens], tokens)
        for mode, runs in found.items()
        if runs[tokens]
    }


def summary(short: list[dict[str, Any]], long: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """The best runs' milliseconds a step, and the shares that the last long run had."""
    brief, full = (min(run["seconds"] for run in runs) for runs in (short, long))
    counts = {name: value for name, value in long[-1].items() if name != "seconds"}
    return {
        "step_ms": (full - brief) / (tokens - SHORT) * 1e3,
        "whole_ms": full / tokens * 1e3,
        "runs_s": [run["seconds"] for run in long],
        **counts,
        **({"trigger_rate": counts["flagged"] / counts["steps"]} if counts else {}),
    }


def compare(found: dict[str, Any]) -> None:
    """Add to each mode its increment over stock, and how many times smaller than always's it is."""
    base = found.get(STOCK, {}).get("step_ms")
    for each in found.values():
        each["increment_ms"] = None if base is None else each["step_ms"] - base
    most = found.get(ALWAYS, {}).get("increment_ms")
    for mode, each in found.items():
        if mode.startswith(MARGIN) and most is not None and each["increment_ms"] > 0:
            each["always_over_this"] = most / each["increment_ms"]


def show(batch: int, found: dict[str, Any]) -> None:
    for mode, each in found.items():
        cells = [f"batch {batch:3}  {mode:14} {each['step_ms']:8.3f} ms"]
        if each["increment_ms"] is not None:
            cells.append(f"{each['increment_ms']:+8.3f}")
        if "passes" in each:
            rows = each["verified"] / max(each["passes"], 1)
            cells.append(f"flagged {each['trigger_rate']:6.1%}  passes {each['passes']:5}")
            cells.append(f"rows a pass {rows:5.1f}  flips {each['flips']:4}")
        if "always_over_this" in each:
            cells.append(f"always / this {each['always_over_this']:.2f}")
        print("  ".join(cells), flush=True)


def main() -> None:
    args = arguments()
    if args.one:
        serve(args)
        return
    begun = time.monotonic()
    workers = engines.all_up(args.modes, args.out)
    results: list[dict[str, Any]] = []
    for batch in args.batches:
        if 1.25 * batch * (args.context + args.tokens) > args.kv_tokens:  # SGLang keeps some
            print(f"batch {batch} is left out: it needs more --kv-tokens")
            continue
        if time.monotonic() - begun > args.budget_s:
            print("out of time before batch", batch)
            continue
        found = measure(workers, batch, args.tokens, args.rounds)
        compare(found)
        show(batch, found)
        results.append({"batch": batch, "modes": found})
        engines.write(args.out, results)
    for worker in workers:
        worker.end()


if __name__ == "__main__":
    main()
