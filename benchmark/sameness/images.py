"""Answers to images alone, together, shuffled and from the cache: how many change.

    python -m benchmark.sameness.images --model FOLDER --out images.json
    python -m benchmark.sameness.images --model FOLDER --stock --out stock.json

Pictures of several sizes are drawn from a seed. Tokens and log-probs are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from margingate.harness.client import Answer, Client, Prompt
from margingate.harness.pictures import picture_prompts
from margingate.harness.servers import launch

ASK = {"return_logprob": True, "top_logprobs_num": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--stock", action="store_true", help="without the gate")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--rounds", type=int, default=4, help="of shuffles")
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args()
    log = args.out.with_suffix(".log")
    with launch(args.model, log, *rest, gate=not args.stock) as server:
        client = Client(server.base_url, args.tokens)
        found = compared(client, picture_prompts(args.model), args.rounds)
        if not args.stock:
            names = ("images", "canonical_rows", "prefill", "largest_batch", "flips", "missed")
            state = client.gate_state()
            found |= {name: state[name] for name in names}
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def compared(client: Client, prompts: Sequence[Prompt], rounds: int) -> dict[str, Any]:
    """By arrangement: [answers whose tokens changed, whose log-probs did, answers]."""
    alone = []
    for prompt in prompts:
        client.flush()
        alone += client.alone([prompt], **ASK)
    found = {"alone again, cached": differing(alone, client.alone(prompts, **ASK))}
    cached, cold = [], []
    for seed in range(rounds):
        order = random.Random(seed).sample(list(prompts), len(prompts))
        cached += client.together(order, **ASK)
        client.flush()
        cold += client.together(order, **ASK)
    found["together, shuffled, cached"] = differing(alone, cached)
    found["together, shuffled, not cached"] = differing(alone, cold)
    return found


def differing(alone: Sequence[Answer], answers: Sequence[Answer]) -> list[int]:
    of = {answer.name: answer for answer in alone}
    tokens = sum(answer.tokens != of[answer.name].tokens for answer in answers)
    logprobs = sum(_logprobs(answer) != _logprobs(of[answer.name]) for answer in answers)
    return [tokens, logprobs, len(answers)]


def _logprobs(answer: Answer) -> tuple[object, object]:
    return answer.meta["output_token_logprobs"], answer.meta["output_top_logprobs"]


if __name__ == "__main__":
    main()
