"""A walk: answers alone, then forced along them in batches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from margingate.errors import CliError
from margingate.harness.defaults import SEED
from margingate.harness.progress import Bar
from margingate.study.journal import Journal
from margingate.study.steps_of_walk import ALONE, Walk

if TYPE_CHECKING:
    from margingate.harness.client import Answer, Client, Prompt

TIMEOUT_S = 3600


def ask(client: Client, prompts: Sequence[Prompt], params: Sequence[dict[str, Any]]) -> list[Any]:
    """One request for all prompts, with sampling parameters each; answers in their order.

    The server gets them in one message, so the same prompts always make the same batches.
    Raises CliError with what the server says when it refuses them.
    """
    import requests

    from margingate.harness.client import Answer

    body: dict[str, Any] = {
        "input_ids": [prompt.input_ids for prompt in prompts],
        "sampling_params": [{**client.params, **one} for one in params],
    }
    try:
        reply = requests.post(f"{client.base_url}/generate", json=body, timeout=TIMEOUT_S)
        answers = reply.json()
    except (requests.RequestException, ValueError) as err:
        raise CliError(
            f"the server stopped answering ({type(err).__name__}): see its log beside --out, and "
            "start again to go on."
        ) from err
    if reply.status_code != 200:
        said = answers.get("error", answers) if isinstance(answers, dict) else answers
        raise CliError(f"the server refused {prompts[0].name} or one sent with it: {said}")
    return [
        Answer(prompt.name, tuple(one["output_ids"]), one["text"], one["meta_info"])
        for prompt, one in zip(prompts, answers, strict=True)
    ]


def measure(
    client: Client, prompts: Sequence[Prompt], sizes: Sequence[int], journal: Journal, bar: Bar
) -> None:
    """Walk every prompt alone and at each batch size, but for what the journal holds.

    The server keeps no radix tree, so a walk finds nothing of those before it.
    """
    bar.say("alone")
    for prompt in prompts:
        if (ALONE, prompt.name) not in journal.walks:
            journal.add([_walk(ALONE, ask(client, [prompt], [{}])[0])])
        bar.tick()
    for size in sizes:
        bar.say(f"batches of {size}")
        for group in groups(prompts, size):
            if any((size, prompt.name) not in journal.walks for prompt in group):
                params = [along(journal.walks[ALONE, prompt.name]) for prompt in group]
                journal.add([_walk(size, answer) for answer in ask(client, group, params)])
            for _ in group:
                bar.tick()


def groups(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of `size`, in an order of their own; the last may be smaller."""
    order = random.Random(SEED + size).sample(list(prompts), len(prompts))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def along(walk: Walk, **custom: Any) -> dict[str, Any]:
    """Sampling parameters that force a request along what it answered alone."""
    length = len(walk.tokens)
    custom = {"gate_forced_ids": list(walk.tokens), **custom}
    return {"max_new_tokens": length, "ignore_eos": True, "custom_params": custom}


def _walk(size: int, answer: Answer) -> Walk:
    choices = answer.meta["gate"]["choices"]
    tokens, margins, rows, routers, *finer = zip(*choices, strict=True)
    # JSON has null where there are no routers, and for a margin that is no number.
    known = any(margin is not None for margin in routers)
    routers = tuple(math.nan if one is None else one for one in routers) if known else ()
    exact = dict(zip(("tops", "exact_tokens", "exact_margins"), finer, strict=False))
    return Walk(size, answer.name, tokens, margins, rows, **exact, routers=routers)


def check_lengths(client: Client, prompts: Sequence[Prompt], tokens: int) -> None:
    """Raises CliError for a prompt that leaves no room for its answer."""
    room = client.get("/server_info")["max_req_input_len"]
    for prompt in prompts:
        if len(prompt.input_ids) + tokens > room:
            raise CliError(
                f"the prompt {prompt.name} has {len(prompt.input_ids)} tokens, and the server "
                f"takes {room} with an answer of {tokens}: drop it, or give the server more "
                "after -- (--context-length, --max-total-tokens)."
            )
