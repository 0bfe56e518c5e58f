"""Which requests end a server: 500 bad or odd ones, each beside a good one.

    python -m benchmark.robustness.bad_requests --out result.json --modes gate exact always

Starts a server of each mode and sends the requests one after the other, on SGLang's own, OpenAI's,
Anthropic's and Ollama's routes: listed ones, and pairs of listed values that are drawn by --seed.
Beside each runs a greedy request whose answer must stay what it was. A server that has ended is
started again, and one that keeps the request beside waiting for longer than --stall-s is counted as
stalled; an odd request that asks for a long answer may take what it takes. Ends with
status 1 where the gate's server ended or stalled, or the answer beside changed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from benchmark.bench.machine import environment
from margingate.harness.servers import Server, launch

MODES: dict[str, tuple[bool, tuple[str, ...]]] = {
    "stock": (False, ()),
    "gate": (True, ()),
    "gate-stock": (True, ("--gate-fast-path", "stock")),
    "exact": (True, ("--gate-guarantee", "exact")),
    "always": (
        True,
        ("--gate-fast-path", "stock", "--gate-policy", "always", "--gate-inject-faults"),
    ),
}
HUGE = 1 << 40
GIVES_UP = "(.{1,300}a){1,100}"  # compiles, and is too much for its backend later
# Values of each sampling parameter, beside temperature 0 and 8 new tokens.
SAMPLING: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": ("many", 1.5, -1, HUGE, []),
    "min_new_tokens": ("x", 1.5, -1, HUGE, 2),
    "n": (0, -1, "x", 1.5, None, 3000),
    "stop": (5, [5], [""], "", [None]),
    "stop_regex": ("((", ["(("], 5, "", "(a+)+$b", "(a|aa)+$b", "a*a*a*a*b", "[0-9]{2}"),
    "stop_token_ids": (["x"], 5, [HUGE], [-7], [None]),
    "logit_bias": (
        {"5": "x"},
        {"x": 1},
        [1],
        {"49152": 1},
        {"1.5": 1},
        {"5": None},
        {},
        {"5": True},
        {"28": -100},
        {"28": -100.0},
        {"5": 1e39},
        {"5": 10**400},
        {"5": float("nan")},
    ),
    "frequency_penalty": ("x", 3, True, None, []),
    "presence_penalty": ("x", -3, None),
    "repetition_penalty": ("x", 0, 1e-300, -1),
    "temperature": ("x", None, -1, 1e-300, 1e300, [], 1, 10**400, float("inf")),
    "top_p": ("x", 0, 2, None),
    "top_k": ("5", 0, 1.5, HUGE, -2, None),
    "min_p": ("x", -1, 2),
    "sampling_seed": ("x", 1.5, -1, 1 << 80, True, [1]),
    "regex": ("((", 5, "", "(?<=a)b", "\\1(a)", "a{1,1000000}", GIVES_UP, GIVES_UP),
    "json_schema": ("{", 5, "[]", '{"type": "nonsense"}', {"type": "object"}, '{"$ref": "#/no"}'),
    "ebnf": ("x ::=", "root ::= ", 5, "", "root ::= root", "root ::= root"),
    "structural_tag": ("x", "{}", 5),
    "ignore_eos": ("x", 1),
    "skip_special_tokens": ("x", 1),
    "spaces_between_special_tokens": ("x", 1),
    "no_stop_trim": ("x",),
    "stream_interval": (0, -1, "x"),
    "custom_params": (
        5,
        [1],
        {"gate_fault_rows": 5},
        {"deterministic": None},
        {"x": [{}]},
        {"gate_fault_rows": [1, 2]},
    ),
    "deterministic": (5, "no", None),
    "is_normalized": (True,),
    "max_tokens": (5,),
}
# Values of each other field of /generate's body.
FIELDS: dict[str, tuple[Any, ...]] = {
    "input_ids": ([], [1.5], ["a"], [[1, -2]], [1] * 9000, [49152], [-1], [1 << 30], 5),
    "text": (5, "", ["a", 5]),
    "sampling_params": (5, [], "x"),
    "rid": (5, ["a", "b"], "", "job-1", "job-10", "job-11"),
    "extra_key": (5, "margingate:x", "not-margingate:x"),
    "priority": ("x", HUGE),
    "lora_path": ("x",),
    "session_params": ({}, {"id": "x"}, 5, {"id": ["x"]}, {"id": "x", "replace": True}),
    "custom_labels": ({"x": "y"},),
    "image_data": ("x", []),
    "audio_data": ("x",),
    "input_embeds": ([[0.0]], 5, [], [[]], [[0.0], [0.0, 0.0]]),
    "return_hidden_states": (True, [False], []),
    "return_sampling_mask": (True, [True]),
    "return_logprob": ("x", [True]),
    "token_indices_to_pool": ([5000], [0], []),
    "return_routed_experts": (True,),
    "custom_logit_processor": ("x",),
    "positional_embed_overrides": (5, [[1]]),
    "stream": ("x",),
    "bootstrap_room": (5,),
    "routed_dp_rank": (7,),
    "require_reasoning": (True,),
    "token_type_ids": ([0, 0, 0],),
}
# The same, with log-probs asked for.
LOG_PROBS: dict[str, tuple[Any, ...]] = {
    "top_logprobs_num": (10**6, -1, "x", 1.5, 49153, 49152),
    "token_ids_logprob": ([1 << 30], [-1], ["x"], [], 5, [5], [[5], [6]]),
    "logprob_start_len": (HUGE, -5, "x", 3, [0], []),
}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
SCORE = {
    **{"model": "m", "query": [1, 2], "items": [[3]], "label_token_ids": [5]},
    "embed_override_token_id": 2,
}
ROUTES: tuple[tuple[str, Any], ...] = (
    *(("/v1/chat/completions", {**CHAT, "messages": each}) for each in ([], "x", [{"role": "x"}])),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 10**6}),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_schema"}}),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"99999999": 1}}),
    ("/v1/chat/completions", CHAT | {"n": 0}),
    ("/v1/chat/completions", CHAT | {"stop": [1]}),
    ("/v1/completions", {"model": "m", "prompt": []}),
    ("/v1/completions", {"model": "m", "prompt": [1 << 30]}),
    ("/v1/completions", {"model": "m", "prompt": "x", "logprobs": 10**6, "max_tokens": 4}),
    ("/abort_request", {"rid": "nothing"}),
    ("/abort_request", {"rid": "job-1"}),
    ("/api/chat", {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": False}),
    *(
        ("/api/generate", {"model": "m", "prompt": "hi", "stream": False, "options": options})
        for options in ({"seed": 3}, {"num_predict": -1}, {"num_predict": 1}, {"seed": "x"})
    ),
    ("/v1/messages", {"model": "m", "max_tokens": 4, "messages": CHAT["messages"]}),
    ("/v1/messages", {"model": "m", "max_tokens": "x", "messages": CHAT["messages"]}),
    ("/v1/responses", {"model": "m", "input": "hi", "max_output_tokens": 4}),
    ("/v1/responses", {"model": "m", "input": 5}),
    ("/v1/embeddings", {"model": "m", "input": "x"}),
    *(("/v1/score", SCORE | {"query_embed_overrides": [each]}) for each in ([], [0.0])),
    *(("/generate", each) for each in ([1], "x", 5, {})),
)
GOOD = {
    "input_ids": [5, 6, 7, 8],
    "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
}


def cases() -> Iterator[tuple[str, Any]]:
    """Route and body of each."""
    plain: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8}
    for name, values in SAMPLING.items():
        warm = {"temperature": 0.5} if name in ("top_p", "top_k", "min_p", "sampling_seed") else {}
        room = {"max_new_tokens": 2 * HUGE} if name == "min_new_tokens" else {}
        for value in values:
            yield (
                "/generate",
                {"input_ids": [1, 2, 3], "sampling_params": {**plain, **warm, **room, name: value}},
            )
    for fields, more in ((FIELDS, {}), (LOG_PROBS, {"return_logprob": True})):
        for name, values in fields.items():
            ids = {} if name in ("text", "input_embeds") else {"input_ids": [1, 2, 3]}
            for value in values:
                yield "/generate", {**ids, "sampling_params": plain, **more, name: value}
    yield from ROUTES


def drawn(seed: int, count: int) -> Iterator[tuple[str, Any]]:
    """Requests with two sampling parameters and one field of the lists, log-probs asked or not."""
    rng = random.Random(seed)
    values = [(name, value) for name, several in SAMPLING.items() for value in several]
    fields = [(name, value) for name, several in LOG_PROBS.items() for value in several]
    for _ in range(count):
        params = {"temperature": rng.choice((0, 0.8)), "max_new_tokens": 8}
        params |= dict(rng.sample(values, 2))
        body = {"input_ids": [rng.randrange(9, 999) for _ in range(3)], "sampling_params": params}
        if rng.random() < 0.3:
            body |= {"return_logprob": True} | dict(rng.sample(fields, 1))
        yield "/generate", body


def post(url: str, body: Any, timeout_s: float) -> tuple[Any, Any]:
    """Status and output ids; what went wrong, and None, where there was no answer."""
    try:
        # Not `json=`: it refuses numbers that JSON has not, which servers take.
        text, kind = json.dumps(body), {"Content-Type": "application/json"}
        reply = requests.post(url, data=text, headers=kind, timeout=timeout_s)
        answer = reply.json() if reply.status_code == 200 else {}
    except (requests.RequestException, ValueError) as error:
        return type(error).__name__, None
    return reply.status_code, answer.get("output_ids") if isinstance(answer, dict) else None


class Run:
    """One mode's server, started again whenever it has ended."""

    def __init__(self, mode: str, model: str, folder: Path) -> None:
        self.mode, self.model, self.folder = mode, model, folder
        self.ended: list[Any] = []
        self.changed: list[Any] = []
        self.stalled: list[Any] = []
        self.statuses: Counter[str] = Counter()
        self.server = self.start()
        self.wanted = post(self.server.base_url + "/generate", GOOD, 120)

    def start(self) -> Server:
        gate, extra = MODES[self.mode]
        log = self.folder / f"{self.mode}-{len(self.ended)}.log"
        server = launch(self.model, log, *extra, gate=gate)
        server.start()
        return server

    def case(self, route: str, body: Any, stall_s: float) -> None:
        url = self.server.base_url

        def answered() -> tuple[Any, float]:
            begun = time.monotonic()
            return post(url + "/generate", GOOD, 120), time.monotonic() - begun

        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(answered)
            time.sleep(0.15)  # it decodes by now
            status, _ = post(url + route, body, 25)
            good, seconds = beside.result()
        self.statuses[str(status)] += 1
        if seconds > stall_s:
            self.stalled.append([route, body])
        if not self.server.healthy(20):
            self.ended.append([route, body])
            self.server.stop()
            self.server = self.start()
        elif good != self.wanted:
            self.changed.append([route, body])

    def found(self) -> dict[str, Any]:
        return {
            "statuses": self.statuses,
            "ended": self.ended,
            "changed_beside": self.changed,
            "stalled": self.stalled,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model folder; default: the embedded SmolLM2")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["stock", "gate"])
    parser.add_argument("--requests", type=int, default=500, help="to each mode's server")
    parser.add_argument("--first", type=int, default=0, help="leave out those before it")
    parser.add_argument("--seed", type=int, default=1, help="of those that are drawn")
    parser.add_argument("--stall-s", type=float, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.model is None:
        from margingate.harness.embedded_model import ensure_model

        args.model = str(ensure_model("smollm2"))
    record: dict[str, Any] = {"environment": environment(), "modes": {}}
    folder = Path(tempfile.mkdtemp(prefix="margingate-"))
    bad = False
    for mode in args.modes:
        run = Run(mode, args.model, folder)
        try:
            known = list(cases())
            asked = [*known, *drawn(args.seed, max(args.requests - len(known), 0))]
            for route, body in asked[args.first : args.requests]:
                run.case(route, body, args.stall_s)
                record["modes"][mode] = run.found()  # what was asked before an interruption counts
                args.out.write_text(json.dumps(record, indent=1))
        finally:
            run.server.stop()
        print(f"{mode}: {run.statuses.total()} requests, {dict(run.statuses)}; ", end="")
        print(f"{len(run.ended)} ended the server, {len(run.stalled)} stalled it, ", end="")
        print(f"{len(run.changed)} changed the answer beside", flush=True)
        bad |= mode != "stock" and bool(run.ended or run.stalled or run.changed)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
