"""Several GPUs: does an answer depend on its batch with `--tp-size N`?

    python -m benchmark.sameness.tensor_parallel --model benchmark/models/configs/llama-3.1-8b \
        --tp-size 2 --out ranks.json

Dummy weights, whose margins are tiny: without the gate many answers change. Each server answers
random prompts one at a time, then all at once, and all at once in another order. Counted are
answers with the same token ids, and of these those whose log-probs have the same bits.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmark.bench import engines
from benchmark.bench.arrangements import (
    GATE,
    STOCK_PATH,
    WithLogprobs,
    arrange,
    compare,
    counters,
)
from benchmark.bench.load import make_tokenizer, vocabulary
from benchmark.bench.machine import environment
from margingate.harness.client import Prompt
from margingate.harness.servers import ServerError, launch

SERVERS: dict[str, tuple[str, ...]] = {
    "stock-default": (),
    "stock": ("--attention-backend", "flashinfer"),
    "sglang-deterministic-default": ("--enable-deterministic-inference",),
    "gate": (GATE,),
    "exact": (GATE, "--gate-guarantee", "exact"),
    "gate-stock-path": (*STOCK_PATH, "--gate-threshold", "0.5"),
    "exact-stock-path": (*STOCK_PATH, "--gate-guarantee", "exact", "--gate-threshold", "0.5"),
}
SHOWN = ("canonical_rows", "prefill", "integrity")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=engines.model_folder)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=["stock-default", "gate"])
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--start-s", type=float, default=300, help="for a server to come up")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


def made_up(count: int) -> list[Prompt]:
    """Random token ids, 20 to 600 of them."""
    rng = random.Random(11)
    lengths = [rng.randrange(20, 600) for _ in range(count)]
    return [
        Prompt(f"p{i}", tuple(rng.randrange(10, 30000) for _ in range(length)))
        for i, length in enumerate(lengths)
    ]


def run(args: argparse.Namespace, name: str, tokenizer: Path) -> dict[str, Any]:
    """One server: what of its answers is the same."""
    load = "auto" if engines.has_weights(args.model) else "dummy"
    gpu = ("--tp-size", str(args.tp_size), "--load-format", load)
    gpu += ("--tokenizer-path", str(tokenizer), "--grammar-backend", "none", *args.server_args)
    prompts, log = made_up(args.prompts), args.logs / f"ranks-{name}.log"
    found: dict[str, Any] = {"server": name, "server_args": [*SERVERS[name], *gpu]}
    with launch(args.model, log, *SERVERS[name], *gpu, start_s=args.start_s) as server:
        client = WithLogprobs(server.base_url, args.tokens)
        client.params |= {"ignore_eos": True}
        client.together(prompts[:2])  # warm
        client.flush()
        alone = {answer.name: answer for answer in client.alone(prompts)}
        for arrangement in ("batched", "shuffled1"):
            found[arrangement] = compare(alone, arrange(client, prompts, arrangement, 0))
            print(name, arrangement, found[arrangement], flush=True)
        if found_by_gate := counters(client):
            state = client.gate_state()
            found["gate"] = found_by_gate | {key: state[key] for key in SHOWN if key in state}
    return found


def main() -> None:
    args = arguments()
    args.logs = args.logs or args.out.parent
    args.logs.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), vocabulary(args.model))
        for name in args.servers:
            try:
                results.append(run(args, name, Path(folder)))
            except (ServerError, RuntimeError) as error:
                print(name, error, flush=True)
                continue
            record = {"environment": environment(), "tokens": args.tokens, "servers": results}
            args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
