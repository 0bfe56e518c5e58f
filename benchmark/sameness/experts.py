"""Are the experts of each token the same alone, batched, shuffled, cached and scored?

    python -m benchmark.sameness.experts --model MODEL --prompts DATA/*.jsonl \
        --out experts.json

Starts servers of a mixture of experts with `--enable-return-routed-experts`, one after the other:
a gated one, one that verifies every row on stock kernels, and a stock one. Each answers the prompts
one by one, and then in each arrangement; last it scores prompts and answers, all at once. Held to
the first answers are the tokens, and the experts of each token up to the first that differs. Ends
with status 1 if a gated server changed tokens or experts, or returned other rows than tokens.
Scores may differ where the server says `as_prefilled`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmark.bench.arrangements import AT_ONCE, GATE, STOCK_PATH, arrange, counters
from benchmark.bench.machine import environment
from margingate.harness.client import Answer, Client, Prompt, chat_prompts, read_prompts
from margingate.harness.servers import launch
from margingate.harness.tiny_models import FAMILIES, tiny_model

ENTRY = 4  # bytes of an expert's number
MODES = {
    "gate": (GATE,),
    "exact-stock-path": (*STOCK_PATH, "--gate-guarantee", "exact"),
    "stock": (),
}


class Asking(Client):
    """Asks for the experts of every token."""

    async def _post(self, session: Any, prompt: Prompt, **extra: Any) -> Answer:
        return await super()._post(session, prompt, return_routed_experts=True, **extra)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or tiny-FAMILY")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--per-file", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=0, help="requests in flight; 0: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


def experts(answer: Answer, tokens: int) -> list[bytes]:
    """Of each of `tokens` tokens; raises ValueError if the data are none of so many."""
    data = base64.b64decode(answer.meta["routed_experts"])
    row, rest = divmod(len(data), tokens)
    if rest or row % ENTRY:
        raise ValueError(f"{answer.name}: {len(data)} bytes are no rows of {tokens} tokens")
    return [data[start : start + row] for start in range(0, len(data), row)]


def rows_of(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, list[bytes]]:
    """By name, the experts of all tokens but the last."""
    lengths = {prompt.name: len(prompt.input_ids) for prompt in prompts}
    return {a.name: experts(a, lengths[a.name] + len(a.tokens) - 1) for a in answers}


def compare(
    prompts: Sequence[Prompt], first: Sequence[Answer], answers: Sequence[Answer]
) -> dict[str, int]:
    """Answers and rows that differ from the first ones."""
    lengths = {prompt.name: len(prompt.input_ids) for prompt in prompts}
    wanted, found = rows_of(prompts, first), rows_of(prompts, answers)
    reference = {answer.name: answer.tokens for answer in first}
    counts = dict.fromkeys(("answers", "other_tokens", "other_experts", "rows", "other_rows"), 0)
    for answer in answers:
        pairs = zip(answer.tokens, reference[answer.name], strict=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        upto = lengths[answer.name] + max(alike - 1, 0)
        rows = list(zip(wanted[answer.name][:upto], found[answer.name][:upto], strict=True))
        other = sum(one != two for one, two in rows)
        counts["answers"] += 1
        counts["other_tokens"] += answer.tokens != reference[answer.name]
        counts["other_experts"] += other > 0
        counts["rows"] += len(rows)
        counts["other_rows"] += other
    return counts


def scored(client: Client, prompts: Sequence[Prompt], first: Sequence[Answer]) -> dict[str, int]:
    """Rows of prompt and answer as one prompt, held to those of the first answers."""
    given = zip(prompts, first, strict=True)
    whole = [Prompt(p.name, (*p.input_ids, *a.tokens)) for p, a in given]
    client.flush()
    answers = client.together(whole, sampling_params={"max_new_tokens": 0})
    lengths = {prompt.name: len(prompt.input_ids) - 1 for prompt in whole}
    wanted = rows_of(prompts, first)
    found = {answer.name: experts(answer, lengths[answer.name]) for answer in answers}
    pairs = [pair for name in wanted for pair in zip(wanted[name], found[name], strict=True)]
    return {"rows": len(pairs), "other_rows": sum(one != two for one, two in pairs)}


def run(args: argparse.Namespace, mode: str, prompts: Sequence[Prompt], logs: Path) -> Any:
    """What a server of this mode gave."""
    extra = (*MODES[mode], "--enable-return-routed-experts", *args.server_args)
    server = launch(args.model, logs / f"experts-{mode}.log", *extra, start_s=420)
    found: dict[str, Any] = {}
    try:
        server.start()
        client = Asking(server.base_url, args.tokens)
        client.flush()
        first = client.alone(prompts)
        for name in AT_ONCE:
            found[name] = compare(prompts, first, arrange(client, prompts, name, args.at_once))
            print(f"{mode:17} {name:10}", found[name], flush=True)
        found["scored"] = scored(client, prompts, first)
        print(f"{mode:17} {'scored':10}", found["scored"], flush=True)
        found["gate"] = counters(client)
        print(f"{mode:17} {'gate':10}", found["gate"], flush=True)
    finally:
        server.stop()
    return found


def main() -> int:
    args = arguments()
    family = args.model.removeprefix("tiny-")
    if args.model.startswith("tiny-") and family in FAMILIES:
        args.model = str(tiny_model(family, Path(tempfile.gettempdir()) / "margingate-tiny"))
    pairs = [pair for path in args.prompts for pair in read_prompts(path, args.per_file)]
    prompts = chat_prompts(pairs, args.model)
    logs = Path(os.environ.get("OUT", tempfile.mkdtemp(prefix="margingate-")))
    record: dict[str, Any] = {}
    try:
        for mode in args.modes:
            record[mode] = run(args, mode, prompts, logs)
    finally:
        head = {"environment": environment(), "tokens": args.tokens, "prompts": len(prompts)}
        args.out.write_text(json.dumps({**head, "modes": record}, indent=1) + "\n")
    gated = [record[mode] for mode in args.modes if GATE in MODES[mode]]
    compared = [found[name] for found in gated for name in AT_ONCE]
    return int(any(each["other_tokens"] or each["other_experts"] for each in compared))


if __name__ == "__main__":
    sys.exit(main())
