"""Are log-probs of given tokens the same however they are computed, with any size of chunks?

    python -m benchmark.sameness.scores --prompts DATA/*.jsonl --out scores.json

Starts servers of each mode (the gate, stock, SGLang's own deterministic mode) with several sizes of
prefill chunks. The first of a mode decodes the prompts greedily, one by one; then all of its mode
score prompt and answer in one go: alone, all at once, from the cache, and all at once from it, as
`margingate check --scores` does. Each reading is held to the log-probs of decoding, and to those of
the first server alone: values bit by bit, and the likeliest tokens with theirs. Prompts are lines
of the files, and several lines joined, so that chunks cut them. Ends with status 1 if a reading of
the gate differs from the first one alone, or, where it says that scores are as decoded, from these.

SGLang's own mode cuts prompts at multiples of 4,096 tokens with Triton, so smaller chunks are left
out for it: a prompt that is longer would wait for ever.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.bench.arrangements import GATE
from benchmark.bench.machine import environment
from margingate.harness.client import read_prompts
from margingate.harness.embedded_model import ensure_model
from margingate.harness.servers import Server, ServerError, launch
from margingate.study.batch_check import CheckOptions
from margingate.study.score_check import Decoded, Readings, Scored, differences, hits, read_scores

MODES = {
    "gate": (GATE,),
    "gate-exact": (GATE, "--gate-guarantee", "exact"),
    "stock": (),
    "sglang-deterministic": ("--enable-deterministic-inference",),
}
ALIGNED = ("sglang-deterministic", 4096)  # a mode, and the least chunk it can cut
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Case:
    mode: str
    chunk: int
    server: Server


def arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    modes = ["gate", "stock", "sglang-deterministic"] if gpu else ["gate", "stock"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder; default: the embedded SmolLM2")
    parser.add_argument("--prompts", nargs="+", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="of prompts, evenly of the files")
    parser.add_argument("--join", type=int, default=8, help="lines in the longest prompts")
    parser.add_argument("--tokens", type=int, default=64, help="decoded of each prompt")
    parser.add_argument("--chunks", nargs="+", type=int, default=[4096, 512, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=modes)
    parser.add_argument(
        "--together", type=int, default=99 if gpu else 1, help="servers of a mode that are up"
    )
    parser.add_argument("--gpus", type=int, default=1, help="servers take turns on them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("server_args", nargs="*", help="for every server, after --")
    return parser.parse_args()


def joined(paths: Sequence[Path], count: int, join: int) -> Pairs:
    """`count` prompts, of one line of the files, two lines and so on up to `join`, over and over.

    Raises:
        OSError, ValueError: as `read_prompts` does.
    """
    files = [read_prompts(path) for path in paths]
    made = []
    for i in range(count):
        lines = files[i % len(files)]
        first, many = i // len(files), 1 + i % join
        chosen = [lines[(first + k) % len(lines)] for k in range(many)]
        made.append((f"{i}: {chosen[0][0]}", "\n\n".join(text for _, text in chosen)))
    return made


def cases(args: argparse.Namespace, mode: str, logs: Path) -> list[Case]:
    """The servers of a mode, not started."""
    found = []
    for i, chunk in enumerate(args.chunks):
        if mode == ALIGNED[0] and chunk < ALIGNED[1]:
            print(f"{mode} {chunk}: left out, it cuts at multiples of {ALIGNED[1]}", flush=True)
            continue
        extra = (*MODES[mode], "--chunked-prefill-size", str(chunk), *args.server_args)
        env = {"CUDA_VISIBLE_DEVICES": str(i % args.gpus)} if args.gpus > 1 else {}
        log = logs / f"scores-{mode}-{chunk}.log"
        found.append(Case(mode, chunk, launch(args.model, log, *extra, env=env, start_s=420)))
    return found


def start(case: Case) -> bool:
    """Whether it came up."""
    try:
        case.server.start()
    except ServerError as error:
        print(f"{case.mode} {case.chunk} did not start: {error}", flush=True)
        return False
    return True


class Mode:
    """The servers of one mode, each held to what the first one said."""

    def __init__(self, args: argparse.Namespace, pairs: Pairs) -> None:
        self._args, self._pairs = args, pairs
        self._decoded: list[Decoded] | None = None
        self._alone: list[Scored] = []
        self.record: dict[str, Any] = {}

    def run(self, servers: Sequence[Case]) -> None:
        """So many at a time as may be up; each reads by itself."""
        step = self._args.together
        for group in (servers[i : i + step] for i in range(0, len(servers), step)):
            try:
                with ThreadPoolExecutor(len(group)) as pool:
                    up = list(pool.map(start, group))
                self._read([case for case, came in zip(group, up, strict=True) if came])
            finally:
                for case in group:
                    case.server.stop()

    def _read(self, up: Sequence[Case]) -> None:
        if not up:
            return
        first, others = up[0], up[1:]
        if self._decoded is not None:
            others = up
        else:
            said = self._scores(first)
            self._decoded, self._alone = said.decoded, said.alone
            self._note(first, said)
        with ThreadPoolExecutor(max(len(others), 1)) as pool:
            for case, said in zip(others, pool.map(self._scores, others), strict=True):
                self._note(case, said)

    def _scores(self, case: Case) -> Readings:
        options = CheckOptions(case.server.base_url, "none", None, self._args.tokens)
        return read_scores(options, self._pairs, self._decoded)

    def _note(self, case: Case, said: Readings) -> None:
        names = [name for name, _ in self._pairs]
        answers = [each.answer for each in said.decoded]
        found = {}
        for run, scores in {"alone": said.alone, **said.runs}.items():
            found[run] = {
                "decoded": counted(asdict(differences(names, answers, said.tails(scores)))),
                "first": counted(asdict(differences(names, self._alone, scores))),
                "hits": hits(scores),
            }
            print(f"{case.mode:20} {case.chunk:5} {run:9}", found[run], flush=True)
        self.record[str(case.chunk)] = {**said.server, "runs": found}


def counted(difference: dict[str, Any]) -> dict[str, Any]:
    """With the number of prompts in place of their names."""
    return {**difference, "prompts": len(difference["prompts"])}


def sound(record: dict[str, Any], servers: int) -> bool:
    """Whether a gated mode's servers all came up, and no score depends on how it was computed."""
    for server in record.values():
        held = ["first", "decoded"] if server["scores"] == "as_decoded" else ["first"]
        for found in server["runs"].values():
            if any(found[name]["prompts"] for name in held):
                return False
    return len(record) == servers


def main() -> int:
    args = arguments()
    try:
        pairs = joined(args.prompts, args.count, args.join)
    except (OSError, ValueError) as error:
        sys.exit(f"--prompts: {error}")
    args.model = args.model or str(ensure_model("smollm2"))
    logs = Path(os.environ.get("OUT", tempfile.mkdtemp(prefix="margingate-")))
    record: dict[str, Any] = {}
    try:
        for name in args.modes:
            began, mode = time.monotonic(), Mode(args, pairs)
            record[name] = mode.record
            mode.run(cases(args, name, logs))
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    finally:
        head = {**environment(), "prompts": len(pairs), "tokens": args.tokens}
        args.out.write_text(json.dumps({**head, "modes": record}, indent=1) + "\n")
    gated = [record[name] for name in args.modes if GATE in MODES[name]]
    return int(not all(sound(found, len(args.chunks)) for found in gated))


if __name__ == "__main__":
    sys.exit(main())
