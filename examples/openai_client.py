"""OpenAI's client on a gated server: one question alone, then in a batch, then as a stream.

Needs a server with --deterministic-gate, and the package openai, which comes with sglang. Status 1
if the answers differ, 2 if they could not be had.

python examples/openai_client.py --base-url http://127.0.0.1:30000
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

QUESTION = "What is the capital of France, and what is it known for?"
COMPANY = ("bread", "ants", "glass", "rivers", "chess", "the moon", "tea")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--tokens", type=int, default=48)
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
    def ask(text: str, **more):
        messages = [{"role": "user", "content": text}]
        options = {"model": "default", "temperature": 0, "max_tokens": args.tokens, **more}
        return client.chat.completions.create(messages=messages, **options)

    alone = ask(QUESTION)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(ask, f"Tell me about {topic}.") for topic in COMPANY]
        in_company = ask(QUESTION)
        for other in others:
            other.result()

    text, gate = "", None
    for chunk in ask(QUESTION, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
        gate = (chunk.model_extra or {}).get("metadata", {}).get("gate", gate)
    ungated = ask(QUESTION, extra_body={"deterministic": False})

    answers = [alone.choices[0].message.content, in_company.choices[0].message.content, text]
    if "gate" not in ((in_company.model_extra or {}).get("metadata") or {}):
        print(f"{args.base_url} has no gate: start it with --deterministic-gate.", file=sys.stderr)
        return 2
    record = in_company.metadata["gate"][0]
    print(f"Q: {QUESTION}\nA: {answers[0]}")
    print("alone, in a batch, streamed:", "the same" if len(set(answers)) == 1 else "NOT the same")
    print("rows verified:", record["verified"], " flips repaired:", record["flips"])
    print(
        "system_fingerprint:", in_company.system_fingerprint, " streamed:", gate[0]["fingerprint"]
    )
    print("opted out:", ungated.metadata["gate"][0])
    return int(len(set(answers)) != 1)


if __name__ == "__main__":
    sys.exit(main())
