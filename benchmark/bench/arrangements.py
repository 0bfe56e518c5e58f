"""One set of prompts, sent to a server in several ways, and what is counted of the answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

from margingate.harness.client import Answer, Client, Prompt

GATE = "--deterministic-gate"
STOCK_PATH = (GATE, "--gate-fast-path", "stock")
HOPEFUL = ("--schedule-conservativeness", "0.05")
ARRANGEMENTS = ("batched", "shuffled1", "shuffled2", "shuffled3", "arriving", "cached")
AT_ONCE = ("batched", "shuffled1", "shuffled2", "cached")  # where none waits
COUNTERS = (
    *("steps", "flagged", "verified", "flips", "missed", "rolled_back", "passes"),
    "merged_passes",
)


class Sampler(Client):
    """Sends each prompt with the same parameters, and a seed made from its name."""

    def __init__(self, base_url: str, tokens: int, sampling: dict[str, Any] | None) -> None:
        super().__init__(base_url, tokens)
        self.sampling = sampling

    async def _post(self, session: Any, prompt: Prompt, **extra: Any) -> Answer:
        if self.sampling is not None:
            seed = zlib.crc32(prompt.name.encode())
            own = {**self.sampling, "sampling_seed": seed, **extra.get("sampling_params", {})}
            extra["sampling_params"] = own
        return await super()._post(session, prompt, **extra)


class WithLogprobs(Client):
    """Asks for the log-probs of every token."""

    async def _post(self, session: Any, prompt: Prompt, **extra: Any) -> Answer:
        return await super()._post(session, prompt, return_logprob=True, **extra)


def arrange(client: Client, prompts: Sequence[Prompt], name: str, at_once: int) -> list[Answer]:
    """Send the prompts in one arrangement; all but `cached` start from an empty radix tree."""
    if name != "cached":
        client.flush()
    if name.startswith("shuffled"):
        prompts = random.Random(int(name[-1])).sample(prompts, len(prompts))
    if name == "arriving":
        rng = random.Random(17)
        return client.together(prompts, delays_s=[rng.uniform(0, 20) for _ in prompts])
    step = at_once or len(prompts)
    groups = [prompts[i : i + step] for i in range(0, len(prompts), step)]
    return [answer for group in groups for answer in client.together(group)]


def counters(client: Client) -> dict[str, Any]:
    try:
        state = client.gate_state()
    except KeyError:
        return {}
    return {name: state[name] for name in COUNTERS} | {"integrity": state["integrity"]}


def agreeing(runs: Sequence[Sequence[Answer]]) -> int:
    """Prompts whose tokens are the same in every run, whatever they were alone."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for answer in (answer for run in runs for answer in run):
        seen.setdefault(answer.name, set()).add(answer.tokens)
    return sum(len(tokens) == 1 for tokens in seen.values())


def values(answer: Answer) -> list[float]:
    return [value for value, *_ in answer.meta["output_token_logprobs"]]


def compare(reference: dict[str, Answer], answers: Sequence[Answer]) -> dict[str, int]:
    """Answers with the same tokens, and with the same log-probs too; cached tokens."""
    pairs = [(reference[answer.name], answer) for answer in answers]
    return {
        "of": len(pairs),
        "tokens": sum(a.tokens == b.tokens for a, b in pairs),
        "logprobs": sum(values(a) == values(b) for a, b in pairs),
        "cached": sum(b.meta["cached_tokens"] for _, b in pairs),
        "retractions": sum(b.meta.get("num_retractions", 0) for _, b in pairs),
    }
