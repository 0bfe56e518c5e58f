"""`sglang.Engine` with the gate: prompts one by one, then as one batch, and choices with a seed.

No server. Runs on a GPU, or on a CPU where there is none. Status 1 if answers differ.

python examples/engine.py --model-path MODEL
"""

import argparse
import sys

import sglang
import torch

PROMPTS = (
    "The three largest rivers of Europe are",
    "A short story about a lighthouse: ",
    "def fibonacci(n):",
    "To bake bread, you need",
    "The difference between a frog and a toad is",
)
ON_A_CPU = {"device": "cpu", "mem_fraction_static": 0.3, "max_total_tokens": 65536}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--fast-path", default="invariant", help="stock: flips to see and repair")
    args = parser.parse_args()

    engine = sglang.Engine(
        model_path=args.model_path,
        deterministic_gate=True,
        gate_fast_path=args.fast_path,
        log_level="error",
        **({} if torch.cuda.is_available() else ON_A_CPU),
    )
    params = {"temperature": 0, "max_new_tokens": args.tokens}
    alone = [engine.generate(prompt, params) for prompt in PROMPTS]
    batch = engine.generate(list(PROMPTS), params)
    choices = alone_and_together(engine, args.tokens)
    ungated = engine.generate(PROMPTS[0], {**params, "deterministic": False})
    engine.shutdown()

    same = [one["output_ids"] == other["output_ids"] for one, other in zip(alone, batch)]
    for prompt, reply, agrees in zip(PROMPTS, batch, same):
        print(f"{'same' if agrees else 'CHANGED':8}{prompt}{reply['text']!r}")
    gates = [reply["meta_info"]["gate"] for reply in (*alone, *batch)]
    for name in ("steps", "flagged", "verified", "flips", "missed"):
        print(f"{name}: {sum(gate[name] for gate in gates)}")
    print("fingerprints:", *{gate["fingerprint"] for gate in gates})
    print("opted out:", ungated["meta_info"]["gate"])
    print("choices:", *choices)
    return int(not all(same) or "CHANGED" in choices)


def alone_and_together(engine: sglang.Engine, tokens: int) -> list[str]:
    """Of each choice with a seed, whether it is what its own seed gives alone, and the seed."""
    params = {"temperature": 0.8, "max_new_tokens": tokens, "sampling_seed": 7}
    said = []
    for choice in engine.generate(PROMPTS[0], {**params, "n": 3}):
        seed = choice["meta_info"]["gate"]["seed"]
        single = engine.generate(PROMPTS[0], {**params, "sampling_seed": seed})
        same = single["output_ids"] == choice["output_ids"]
        said += ["same" if same else "CHANGED", f"with seed {seed};"]
    return said


if __name__ == "__main__":
    sys.exit(main())
