"""Determinism on a real server: the same prompts alone, batched, shuffled, cached, retracted.

    python -m benchmark.sameness.arrangements --prompts DATA/*.jsonl \
        --cases stock margin \
        --out benchmark/results/determinism.json

Every case starts its own server, takes the answers of one request at a time as its reference and
counts the sequences that are identical, token id by token id, in each other arrangement. With
`--answers`, gated cases are held to one set of answers instead, across cases and runs. Sequences
that agree in all arrangements of a case, whatever they were alone, are counted as `agree`. Works
with any SGLang server arguments (after `--`), on a GPU or on a CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.bench.arrangements import (
    ARRANGEMENTS,
    GATE,
    HOPEFUL,
    STOCK_PATH,
    Sampler,
    agreeing,
    arrange,
    counters,
)
from benchmark.bench.machine import environment
from margingate.harness.answers import identical
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.servers import launch

THRESHOLDS = (0.13, 0.26, 0.51, 1.01, 2.01)
CASES: dict[str, tuple[str, ...]] = {
    "stock": (),
    "sglang-deterministic": ("--enable-deterministic-inference",),
    "margin": (GATE,),
    "exact": (GATE, "--gate-guarantee", "exact"),
    "stock-path": STOCK_PATH,
    "exact-stock": (*STOCK_PATH, "--gate-guarantee", "exact"),
    "always-stock": (*STOCK_PATH, "--gate-policy", "always"),
    "delay8-stock": (*STOCK_PATH, "--gate-max-delay", "8"),
    **{f"span-{t}": (*STOCK_PATH, "--gate-threshold", str(t)) for t in THRESHOLDS},
    **{
        f"column-{t}": (*STOCK_PATH, "--gate-repair", "column", "--gate-threshold", str(t))
        for t in THRESHOLDS
    },
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--per-file", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["stock", "margin"])
    parser.add_argument("--arrangements", nargs="*", choices=ARRANGEMENTS, default=ARRANGEMENTS)
    parser.add_argument(
        "--answers",
        type=Path,
        help="what gated requests answered alone: read where it is there, written where it is not;"
        " without it each case is held to its own",
    )
    parser.add_argument(
        "--sampling",
        type=json.loads,
        help='sampling parameters as JSON, say \'{"temperature": 0.8, "top_p": 0.95}\'; each prompt'
        " gets a seed of its own; without it: greedy",
    )
    parser.add_argument("--at-once", type=int, default=0, help="requests in flight; 0: all")
    parser.add_argument(
        "--retract-tokens",
        type=int,
        default=0,
        help="also batch on a server whose K/V pool holds this many tokens; 0: do not",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


def answers_alone(
    args: argparse.Namespace, client: Client, prompts: list[Prompt], gated: bool
) -> tuple[list[Answer], bool]:
    """What the requests of a case are held to, and whether it comes from --answers."""
    if not gated or args.answers is None:
        return client.alone(prompts), False
    if args.answers.exists():
        known = json.loads(args.answers.read_text())
        return [Answer(p.name, tuple(known[p.name][: args.tokens]), "", {}) for p in prompts], True
    alone = client.alone(prompts)
    args.answers.write_text(json.dumps({answer.name: answer.tokens for answer in alone}))
    return alone, False


def run_case(args: argparse.Namespace, case: str, prompts: list[Prompt]) -> dict[str, Any]:
    model = args.model
    extra = (*CASES[case], *args.server_args)
    record: dict[str, Any] = {"case": case, "server_args": extra, "prompts": len(prompts)}
    identical_in: dict[str, int] = {}
    seconds: dict[str, float] = {}
    runs: list[list[Answer]] = []
    logs = Path(tempfile.mkdtemp(prefix="margingate-"))
    with launch(model, logs / f"{case}.log", *extra) as server:
        client = Sampler(server.base_url, args.tokens, args.sampling)
        client.together(prompts[:2])  # warm
        client.flush()
        start = time.monotonic()
        alone, given = answers_alone(args, client, prompts, GATE in CASES[case])
        seconds["alone"] = time.monotonic() - start
        for name in args.arrangements:
            start = time.monotonic()
            answers = arrange(client, prompts, name, args.at_once)
            seconds[name] = time.monotonic() - start
            runs.append(answers)
            identical_in[name] = identical(alone, answers)
            print(f"{case:22} {name:10} {identical_in[name]:4} of {len(prompts)}", flush=True)
            if name == "cached":
                record["cached_tokens"] = sum(a.meta["cached_tokens"] for a in answers)
        record["gate"] = counters(client)
    record |= {"answers_given": given, "agree": agreeing(runs)}
    if args.retract_tokens:
        # SGLang admits requests by what it expects them to grow to: expect little, so that it errs.
        small = (*extra, "--max-total-tokens", str(args.retract_tokens), *HOPEFUL)
        with launch(model, logs / f"{case}-small.log", *small) as server:
            client = Sampler(server.base_url, args.tokens, args.sampling)
            answers = client.together(prompts)
            identical_in["retracted"] = identical(alone, answers)
            record["retractions"] = sum(a.meta["num_retractions"] for a in answers)
            record["gate_retracted"] = counters(client)
            count = f"{identical_in['retracted']:4} of {len(prompts)}"
            print(f"{case:22} retracted  {count}, {record['retractions']} times", flush=True)
    tokens = sum(len(answer.tokens) for answer in alone)
    return record | {"identical": identical_in, "seconds": seconds, "tokens_alone": tokens}


def table(records: Sequence[dict[str, Any]]) -> str:
    names = [*records[0]["identical"]]
    rows = [["case", *names, "agree", "flagged", "flips", "missed"]]
    for record in records:
        gate = record["gate"]
        rate = f"{gate['flagged'] / gate['steps']:.1%}" if gate else "-"
        counts = [str(gate[name]) if gate else "-" for name in ("flips", "missed")]
        same = [str(record["identical"].get(name, "-")) for name in names]
        rows.append([record["case"], *same, str(record["agree"]), rate, *counts])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    )


def main() -> None:
    args = arguments()
    if args.model is None:
        from margingate.harness.embedded_model import ensure_model

        args.model = str(ensure_model("smollm2"))
    pairs = [pair for path in args.prompts for pair in read_prompts(path, args.per_file)]
    prompts = chat_prompts(pairs, args.model)
    records = []
    for case in args.cases:
        records.append(run_case(args, case, prompts))
        result = {"environment": environment(), "tokens": args.tokens, "cases": records}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
