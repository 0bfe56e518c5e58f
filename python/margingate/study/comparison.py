"""The demo's measurements: the same prompts against the stock server and the gated one."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.harness.defaults import SEED
from margingate.harness.progress import Bar, progress

if TYPE_CHECKING:
    from margingate.harness.client import Answer, Client, Prompt
    from margingate.harness.servers import Server
    from margingate.study.plots import Margins

SIDES = ("stock", "gated")
TOGETHER = {
    "batched": "all at once",
    "shuffled": "all at once, shuffled",
    "cached": "all at once, prefixes cached",
}
RUNS = ("alone", *TOGETHER)
COUNTERS = ("steps", "canonical", "flagged", "replayed", "flips", "missed", "rolled_back", "passes")


@dataclass(frozen=True)
class Run:
    """All prompts, once, against one server."""

    answers: list[Answer]
    wall_s: float
    gate: dict[str, int]  # the gate's counters, this run's alone; empty on the stock server

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


@dataclass(frozen=True)
class Side:
    """One server's runs by name."""

    runs: dict[str, Run]
    margins: Margins | None  # of the decode steps of all its runs; None on the stock server
    threshold: float | None  # logits; None on the stock server


def measure(
    model: Path,
    pairs: Sequence[tuple[str, str]],
    tokens: int,
    out: Path,
    extra: Mapping[str, Sequence[str]],
) -> dict[str, Side]:
    """Start one server after the other and send everything; raises CliError if one fails.

    `extra`: more arguments for SGLang, by side.
    """
    from margingate.harness.client import Client, chat_prompts
    from margingate.harness.servers import ServerError, launch

    prompts = chat_prompts(pairs, model)
    sides = {}
    with progress(len(SIDES) * len(RUNS) * len(prompts)) as bar:
        for side in SIDES:
            bar.say(f"{side}: starting the server")
            try:
                gate = side == "gated"
                with launch(model, log_path(out, side), *extra[side], gate=gate) as server:
                    client = Client(server.base_url, tokens)
                    sides[side] = _one_side(client, server, prompts, side, bar)
            except ServerError as err:
                raise CliError(f"{side}: {err}") from err
    return sides


def _one_side(
    client: Client, server: Server, prompts: Sequence[Prompt], side: str, bar: Bar
) -> Side:
    """All runs against one healthy server; raises ServerError if it stops answering."""
    import aiohttp
    import requests

    try:
        client.together(prompts[:4], sampling_params={"max_new_tokens": 4})  # not measured: warm-up
        before = _gate_state(client, side)
        runs = {}
        for name in RUNS:
            bar.say(f"{side}: {TOGETHER.get(name, 'one by one')}")
            runs[name] = _one_run(client, prompts, name, side, bar)
        return _side(runs, before, _gate_state(client, side))
    except (aiohttp.ClientError, requests.RequestException, TimeoutError, RuntimeError) as err:
        raise server.error(f"failed a request with {str(err) or type(err).__name__!r}") from err


def _one_run(client: Client, prompts: Sequence[Prompt], name: str, side: str, bar: Bar) -> Run:
    """One run of RUNS: `cached` keeps the prefixes of the run before, the others start empty."""
    if name != "cached":
        client.flush()
    order = list(prompts)
    if name == "shuffled":
        random.Random(SEED).shuffle(order)
    send = client.alone if name == "alone" else client.together
    before = _counters(_gate_state(client, side))
    start = time.perf_counter()
    answers = send(order, bar.tick)
    wall_s = time.perf_counter() - start
    after = _counters(_gate_state(client, side))
    return Run(answers, wall_s, {key: after[key] - before[key] for key in after})


def _gate_state(client: Client, side: str) -> dict[str, Any]:
    return client.gate_state() if side == "gated" else {}


def _counters(state: dict[str, Any]) -> dict[str, int]:
    if not state:
        return {}
    counted = {**state, "canonical": state["reasons"].get("canonical", 0)}
    return {name: counted[name] for name in COUNTERS}


def _side(runs: dict[str, Run], before: dict[str, Any], after: dict[str, Any]) -> Side:
    from margingate.study.plots import Margins

    if not after:
        return Side(runs, None, None)
    margins = Margins.from_record(after["margins"]).since(Margins.from_record(before["margins"]))
    return Side(runs, margins, runs["alone"].answers[0].meta["gate"]["threshold"])


def log_path(out: Path, side: str) -> Path:
    """Where a side's server writes."""
    return out / f"{side}.log"
