"""A small evaluation, twice: question by question, and all at once in another order.

On a gated server, both give the same score and the same answers, to the letter; else status 1.
Status 2 if there was no answer. Needs the package openai, which comes with sglang.

python examples/evaluation.py --base-url http://127.0.0.1:30000
"""

import argparse
import hashlib
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

STORY = "{name} has {a} apples and buys {b} more. How many apples does {name} have?"
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")


def questions(count: int) -> list[tuple[str, int]]:
    """Word problems in the manner of GSM8K, with their results."""
    rng = random.Random(20260530)
    numbers = [(rng.choice(NAMES), rng.randint(2, 9), rng.randint(2, 9)) for _ in range(count)]
    return [(STORY.format(name=name, a=a, b=b), a + b) for name, a, b in numbers]


def is_right(answer: str, result: int) -> bool:
    """Whether the last number of the answer is the result."""
    return re.findall(r"\d+", answer)[-1:] == [str(result)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.base_url}/v1", api_key="none")
    try:
        return compare(client, args)
    except openai.APIConnectionError:
        why = f"no server answers at {args.base_url}: start one with --deterministic-gate"
    except openai.APIStatusError as error:
        why = f"{args.base_url} answered {error.status_code}: start a server with OpenAI's chat API"
    parser.exit(2, f"{why}, or name another with --base-url.\n")


def compare(client: openai.OpenAI, args: argparse.Namespace) -> int:
    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        options = {"model": "default", "temperature": 0, "max_tokens": args.tokens}
        reply = client.chat.completions.create(messages=messages, **options)
        return reply.choices[0].message.content

    asked = questions(args.questions)
    shuffled = random.Random(1).sample(asked, len(asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = {"one by one": {question: ask(question) for question, _ in asked}}
        said = pool.map(ask, [question for question, _ in shuffled])
        answers["all at once"] = dict(zip([question for question, _ in shuffled], said))

    results = set()
    for run, given in answers.items():
        right = sum(is_right(given[question], result) for question, result in asked)
        digest = hashlib.sha256("\n".join(given[question] for question, _ in asked).encode())
        print(f"{run:12} {right} of {len(asked)} right, answers {digest.hexdigest()[:16]}")
        results.add(digest.digest())
    print("identical" if len(results) == 1 else "NOT identical")
    return int(len(results) != 1)


if __name__ == "__main__":
    sys.exit(main())
