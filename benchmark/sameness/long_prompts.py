"""Long prompts, and short ones beside them, on an 8B shape with dummy weights: do they change?

    python -m benchmark.sameness.long_prompts --model benchmark/models/configs/llama-3.1-8b \
        --gate --out long.json

Prompts of up to 32,000 tokens and two dozen short ones are answered one at a time and then all at
once, on one engine. Dummy weights have near-ties everywhere, so a bit that differs soon shows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (32_000, 16_000, 9_000, 4_097, *range(20, 1_300, 53))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def ask(engine: Any, prompts: list[list[int]], tokens: int) -> list[tuple[int, ...]]:
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts, sampling_params=params)
    return [tuple(answer["output_ids"]) for answer in answers]


def main() -> None:
    args = arguments()
    import sglang

    began = time.monotonic()
    engine = sglang.Engine(
        model_path=args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        context_length=40_000,
        max_total_tokens=120_000,
        mem_fraction_static=0.9,
        cuda_graph_max_bs_decode=64,
        cuda_graph_backend_prefill="disabled",
        **({"deterministic_gate": True} if args.gate else {}),
    )
    started = time.monotonic() - began
    rng = random.Random(1)
    prompts = [[rng.randrange(10, 30_000) for _ in range(length)] for length in LENGTHS]
    engine.flush_cache()
    alone = [ask(engine, [prompt], args.tokens)[0] for prompt in prompts]
    engine.flush_cache()
    together = ask(engine, prompts, args.tokens)
    cached = ask(engine, prompts, args.tokens)
    result = {
        "command": sys.argv,
        "start_s": started,
        "prompts": len(prompts),
        "together": sum(a == b for a, b in zip(alone, together, strict=True)),
        "cached": sum(a == b for a, b in zip(alone, cached, strict=True)),
        "different answers": len(set(alone)),
    }
    if args.gate:
        state = engine.get_server_info()["internal_states"][0]["margingate"]
        result |= {name: state[name] for name in ("prefill", "steps", "flagged", "integrity")}
    print(result)
    args.out.write_text(json.dumps(result, indent=1))
    engine.shutdown()


if __name__ == "__main__":
    main()
