"""What verification adds to a decode step, by the share of rows that are flagged.

    python -m benchmark.speed.verification_overhead \
        --model benchmark/models/configs/llama-3.1-8b --out inc.json

Dummy weights. A stock engine and gated ones with `--gate-fast-path stock`, each with the attention
that it chooses (stock on Hopper: FlashAttention 3) or all with that of `--attention-backend`.
`always` verifies every row at every step, in passes of their own (`--gate-max-delay 0`) that are as
small as the largest batch. `margin-RATE` has the gate's defaults, its flags simulated at that rate:
its passes share the forwards of decode steps. In each of them a share `--flip-rate` of all rows is
rolled back.
`margin-RATE:DELAY` and `margin-RATE:DELAY:ROWS` set `--gate-max-delay` and `--gate-rows`,
`always::ROWS` the latter alone.

Two times a token are told. Each is that of a generation, less that of a short one, divided by the
tokens between them: prefill and the end cancel out.

- `step_ms`, of the whole batch: from the call to the last settled token of its slowest request.
  That is the one that was rolled back most.
- `request_ms`, of the mean request: each from its receipt to its own last settled token (SGLang's
  `e2e_latency`).

The figure of merit of either is the increment of `always` over stock, divided by that of `margin`.
The best of some rounds counts; each round does the same work. Where not all engines fit into the
GPU's memory, each group has a stock one of its own (bench/engines.py).
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from typing import Any

from benchmark.bench import engines

STOCK, ALWAYS, MARGIN = "stock", "always", "margin-"
USUAL = (STOCK, ALWAYS, "margin-0.1856", "margin-0.05", "margin-0.5")
FLIPS = 0.0035  # per row, as SmolLM2 had (results/h200-2026-11-24, span-0.51)
SHORT = 16  # tokens of the generation that is taken off
TIMES = ("step_ms", "request_ms")  # see above
COUNTED = ("steps", "flagged", "verified", "passes", "flips", "rolled_back")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    engines.add_options(parser, budget_s=400, kv_tokens=32_768)
    parser.add_argument(
        "--modes",
        nargs="+",
        type=mode,
        default=USUAL,
        help=f"{STOCK}, {ALWAYS}, {MARGIN}RATE, the last two with :DELAY:ROWS or without",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=512, help="of the long generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flip-rate", type=float, default=FLIPS, help="of all rows")
    parser.add_argument("--attention-backend", help="of all engines, as flashinfer")
    return parser.parse_args()


def mode(text: str) -> str:
    """One of the modes; ValueError, which argparse turns into a message, for anything else."""
    if text != STOCK:
        gate_options(text, 0.0, 1)
    return text


def gate_options(mode: str, flip_rate: float, largest: int) -> dict[str, Any]:
    """A gated mode's options for `sglang.Engine`; ValueError for anything else.

    Args:
        flip_rate: flips of all rows, 0 to 1; a mode that flags fewer flips all that it flags.
        largest: batch; the rows of a pass of ALWAYS that does not say how many.
    """
    name, *numbers = mode.split(":")
    delay, rows = (*(int(each) if each else None for each in numbers), None, None)[:2]
    if name == ALWAYS:
        policy: dict[str, Any] = {"gate_policy": "always", "gate_simulate_flip_rate": flip_rate}
        delay, rows = delay or 0, rows or largest
    else:
        rate = float(name.removeprefix(MARGIN))
        flips = min(1.0, flip_rate / rate) if rate else 0.0
        policy = {"gate_simulate_trigger_rate": rate, "gate_simulate_flip_rate": flips}
    given = {"gate_max_delay": delay, "gate_rows": rows}
    policy |= {name: value for name, value in given.items() if value is not None}
    return {"deterministic_gate": True, "gate_fast_path": "stock", **policy}


def options(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """For `sglang.Engine`."""
    attention = {"attention_backend": args.attention_backend} if args.attention_backend else {}
    if mode == STOCK:
        return attention
    return attention | gate_options(mode, args.flip_rate, max(args.batches))


def generate(engine: Any, batch: int, tokens: int, context: int) -> dict[str, Any]:
    """Seconds of one generation of `batch` requests, of the mean one (`request_s`), and what the
    gate counted meanwhile.
    """
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
    own = [answer["meta_info"]["e2e_latency"] for answer in answers]
    return {"seconds": seconds, "request_s": sum(own) / batch, **counted}


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
    """Milliseconds a token and the gate's counts, by mode; engines that ended are left out."""
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
        if runs[SHORT] and runs[tokens]
    }


def summary(short: list[dict[str, Any]], long: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """The best runs' milliseconds a token, and the counts that the last long run had."""
    counts = {name: value for name, value in long[-1].items() if name in COUNTED}
    best = {key: min(run[key] for run in long) for key in ("seconds", "request_s")}
    brief = {key: min(run[key] for run in short) for key in best}
    step, request = ((best[key] - brief[key]) / (tokens - SHORT) * 1e3 for key in best)
    return {
        "step_ms": step,
        "request_ms": request,
        "whole_ms": best["seconds"] / tokens * 1e3,
        "runs_s": [run["seconds"] for run in long],
        "requests_s": [run["request_s"] for run in long],
        **counts,
        **({"trigger_rate": counts["flagged"] / counts["steps"]} if counts else {}),
    }


def compare(found: dict[str, Any], before: dict[str, Any]) -> None:
    """Add to each mode its increments over the stock engine of its group, in milliseconds: of
    `step_ms` as `increment_ms`, of `request_ms` as `request_increment_ms`.

    Args:
        found: this group's modes, mutated.
        before: modes of earlier groups at the same batch; their stock counts if `found` has none.
    """
    stock = found.get(STOCK) or before.get(STOCK)
    for each in found.values():
        for time_ms in TIMES:
            each[_stock(time_ms)] = stock and stock[time_ms]
            each[_increment(time_ms)] = stock and each[time_ms] - stock[time_ms]


def _stock(time_ms: str) -> str:
    return "stock_" + time_ms.removeprefix("step_")


def _increment(time_ms: str) -> str:
    return time_ms.removeprefix("step_").replace("ms", "increment_ms")


def merit(modes: dict[str, Any], each: dict[str, Any], time_ms: str) -> float | None:
    """How many times smaller a mode's increment is than that of ALWAYS, with the rows it has."""
    most = next((found for mode, found in modes.items() if mode.startswith(ALWAYS)), None)
    key = _increment(time_ms)
    return most[key] / each[key] if most and most[key] and each[key] else None


HEAD = (
    f"{'':28} {'whole batch':^29} {'mean request':^29}\n{'batch':>5} {'mode':22}"
    + f" {'ms/token':>8} {'over stock':>10} {'always/it':>9}" * 2
    + f" {'flagged':>8} {'passes/step':>11} {'rows/pass':>9} {'flips':>5} {'lost':>5}"
)


def line(batch: int, mode: str, each: dict[str, Any], modes: dict[str, Any], tokens: int) -> str:
    """A row of the table."""
    text = f"{batch:5} {mode:22}"
    for time_ms in TIMES:
        ratio = None if mode == STOCK else merit(modes, each, time_ms)
        text += f" {each[time_ms]:8.3f} {_cell(each[_increment(time_ms)], '+10.3f')}"
        text += f" {_cell(ratio, '9.2f')}"
    if "passes" not in each:
        return text
    rows = each["verified"] / max(each["passes"], 1)
    return (
        f"{text} {each['trigger_rate']:8.1%} {each['passes'] / tokens:11.3f} {rows:9.1f}"
        f" {each['flips']:5} {each['rolled_back']:5}"
    )


def _cell(value: float | None, form: str) -> str:
    """`value` in this form, or a dash that is as wide."""
    return "-".rjust(len(format(0.0, form))) if value is None else format(value, form)


def table(results: dict[int, dict[str, Any]], tokens: int) -> str:
    """All that was measured; `results` by batch and mode."""
    lines = [
        line(batch, mode, each, modes, tokens)
        for batch, modes in results.items()
        for mode, each in modes.items()
    ]
    return "\n".join([HEAD, *lines])


def run_group(
    args: argparse.Namespace,
    modes: list[str],
    results: dict[int, dict[str, Any]],
    seconds: float,
) -> None:
    """Start these engines, measure every batch, add to `results` and write them."""
    workers = engines.all_up(modes, args)
    deadline = time.monotonic() + seconds
    for batch in args.batches:
        if 1.25 * batch * (args.context + args.tokens) > args.kv_tokens:  # SGLang keeps some
            print(f"batch {batch} is left out: it needs more --kv-tokens")
        elif time.monotonic() > deadline:
            print("out of time before batch", batch, *modes)
        else:
            found = measure(workers, batch, args.tokens, args.rounds)
            known = results.setdefault(batch, {})
            compare(found, known)
            known |= {mode: each for mode, each in found.items() if mode not in known}
            engines.write(args.out, results)
            steps = (
                f"{mode} {each['step_ms']:.3f} ({each['request_ms']:.3f})"
                for mode, each in found.items()
            )
            print(f"batch {batch}:", *steps, flush=True)
    for worker in workers:
        worker.end()


def main() -> None:
    args = arguments()
    if args.one:
        serve(args)
        return
    results: dict[int, dict[str, Any]] = {}
    for modes, seconds in engines.turns(args, args.modes):
        run_group(args, modes, results, seconds)
    print(table(results, args.tokens))


if __name__ == "__main__":
    main()
