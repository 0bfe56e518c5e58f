"""A file of long prompts, made of the short ones of others, for `benchmark.sameness.servers`.

    python -m benchmark.sameness.long_texts --model MODEL --prompts DATA/*.jsonl \
        --count 60 --tokens 1500 3000 --out long.jsonl

Each begins with another prompt, so that none is the prefix of another. Lengths in tokens are drawn
evenly; they are the tokenizer's of MODEL.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from margingate.harness.client import read_prompts

SEED = 21
Count = Callable[[str], int]  # tokens of a text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--tokens", nargs=2, type=int, default=(1500, 3000), help="from, to")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def joined(
    texts: Sequence[str], count: int, wanted: tuple[int, int], tokens: Count
) -> list[tuple[str, str]]:
    """Names and texts of `count` prompts, of about so many tokens each.

    Raises:
        SystemExit: the texts are too few or too short.
    """
    draw = random.Random(SEED)
    texts = draw.sample(list(texts), len(texts))
    lengths = [tokens(text) + 1 for text in texts]  # a line break behind each
    if len(texts) < count or sum(lengths) < wanted[1]:
        raise SystemExit(
            f"--prompts hold {len(texts)} prompts of {sum(lengths)} tokens, too few for {count} "
            f"of {wanted[1]} tokens: name more files."
        )
    found = []
    for i in range(count):
        length, parts, size = draw.randint(*wanted), [], 0
        for at in (each % len(texts) for each in range(i, i + 4 * len(texts))):
            if size < length and size + lengths[at] <= wanted[1]:
                parts.append(texts[at])
                size += lengths[at]
        found.append((f"long-{i}-{length}", "\n".join(parts)))
    return found


def main() -> None:
    from transformers import AutoTokenizer

    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [text for path in args.prompts for _, text in read_prompts(path)]

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    made = joined(texts, args.count, tuple(args.tokens), tokens)
    lines = [json.dumps({"id": name, "prompt": text}) for name, text in made]
    args.out.write_text("\n".join(lines) + "\n")
    lengths = sorted(tokens(text) for _, text in made)
    print(f"{args.out}: {len(made)} prompts of {lengths[0]} to {lengths[-1]} tokens")


if __name__ == "__main__":
    main()
