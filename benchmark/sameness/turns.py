"""Multi-turn chats on a running server: is a turn's answer the same with its history cached?

    python -m benchmark.sameness.turns --base-url URL --model MODEL --prompts DATA/*.jsonl

Each conversation has some turns; the user's part of each is a prompt of the files. Every turn is
asked cold (alone, the radix tree empty), hot (alone, right behind the turn before) and, with all
conversations at once, crowded. The history of a turn is what the cold run answered. Counted are the
turns with the same tokens and log-probs as cold, and the tokens that were found in the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import requests

from margingate.harness.client import Answer, Client, Prompt, read_prompts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


class Chats:
    """Conversations whose every turn is a prompt of its own: history and question, as token ids."""

    def __init__(self, tokenizer: Any, questions: Sequence[Sequence[str]]) -> None:
        self._tokenizer, self._questions = tokenizer, questions
        self._history: list[list[int]] = [[] for _ in questions]

    def prompts(self, turn: int) -> list[Prompt]:
        """This turn's prompts, one a conversation."""
        found = []
        for i, (history, asked) in enumerate(zip(self._history, self._questions, strict=True)):
            ids = history + self._ask(asked[turn], first=turn == 0)
            found.append(Prompt(f"{i}.{turn}", tuple(ids)))
        return found

    def _ask(self, text: str, first: bool) -> list[int]:
        message = [{"role": "user", "content": text}]
        template = self._tokenizer.apply_chat_template
        asked = template(message, add_generation_prompt=True, tokenize=False)
        if not first:  # the template opens a chat; this goes on with one
            asked = asked[asked.index(text) - len("<|im_start|>user\n") :]
            asked = "<|im_end|>\n" + asked
        ids: list[int] = self._tokenizer(asked, add_special_tokens=False)["input_ids"]
        return ids

    def answered(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """What was answered becomes history, without the token that ended it."""
        end = self._tokenizer.eos_token_id
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens = [token for token in answer.tokens if token != end]
            self._history[i] = [*prompt.input_ids, *tokens]


def logprobs(answer: Answer) -> list[float]:
    return [value for value, *_ in answer.meta["output_token_logprobs"]]


def same(cold: Sequence[Answer], other: Sequence[Answer]) -> dict[str, int]:
    """Of the turns: same tokens, same log-probs too, and cached tokens of `other`."""
    pairs = list(zip(cold, other, strict=True))
    return {
        "turns": len(pairs),
        "tokens": sum(a.tokens == b.tokens for a, b in pairs),
        "logprobs": sum(logprobs(a) == logprobs(b) for a, b in pairs),
        "cached": sum(b.meta["cached_tokens"] for b in other),
    }


def read(args: argparse.Namespace) -> Chats:
    """The conversations; ends with one sentence where a file or the tokenizer cannot be used."""
    each = -(-args.conversations * args.turns // len(args.prompts))
    try:
        texts = [text for path in args.prompts for _, text in read_prompts(path, each)]
    except OSError as error:
        sys.exit(f"--prompts {error.filename} cannot be read ({error.strerror}): check the path.")
    except ValueError as error:
        sys.exit(f"--prompts: {error}")
    if len(texts) < args.conversations * args.turns:
        sys.exit(
            f"--prompts have {len(texts)} lines, and {args.conversations} conversations of "
            f"{args.turns} turns take {args.conversations * args.turns}: give more files."
        )
    questions = [texts[i :: args.conversations][: args.turns] for i in range(args.conversations)]
    from transformers import AutoTokenizer  # takes seconds, so last

    try:
        return Chats(AutoTokenizer.from_pretrained(args.model), questions)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        sys.exit(f"--model {args.model} has no tokenizer that loads ({said}): give its folder.")


def main() -> None:
    args = arguments()
    chats = read(args)
    try:
        result = measure(args, chats)
    except (requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        sys.exit(f"{args.base_url} does not answer ({said}): start a server, or name another.")
    for name, counts in result.items():
        print(name, counts)
    if args.out:
        args.out.write_text(json.dumps({"command": sys.argv, **result}, indent=1))


def measure(args: argparse.Namespace, chats: Chats) -> dict[str, dict[str, int]]:
    """What is the same as cold, by way of asking."""
    client = Client(args.base_url, args.tokens)
    asked: list[list[Prompt]] = []
    cold: list[list[Answer]] = []
    for turn in range(args.turns):
        asked.append(chats.prompts(turn))
        answers = []
        for prompt in asked[-1]:
            client.flush()
            answers += client.alone([prompt], return_logprob=True)
        cold.append(answers)
        chats.answered(asked[-1], answers)
    client.flush()
    rows = [[turn[i] for turn in asked] for i in range(args.conversations)]
    hot = [client.alone(row, return_logprob=True) for row in rows]
    client.flush()
    crowded = [client.together(prompts, return_logprob=True) for prompts in asked]
    flat = [answer for turn in cold for answer in turn]
    return {
        "hot": same(flat, [row[turn] for turn in range(args.turns) for row in hot]),
        "crowded": same(flat, [answer for turn in crowded for answer in turn]),
    }


if __name__ == "__main__":
    main()
