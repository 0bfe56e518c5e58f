"""Calibration's measurements: answers alone, then forced along them in batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margingate.cli.bar import Bar
from margingate.cli.errors import CliError

if TYPE_CHECKING:
    from margingate.client import Answer, Client, Prompt

ALONE = 1  # the batch size of the reference
SEED = 20260530


@dataclass(frozen=True)
class Walk:
    """One request's steps in a batch of one size, along its answer alone."""

    batch_size: int
    name: str
    tokens: tuple[int, ...]  # what the batched run would have chosen, by row
    margins: tuple[float, ...]  # logits, of the batched run


class Journal:
    """Finished walks as JSON lines, behind a line that says what they are walks of."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Raises CliError where `path` holds walks of something else, or cannot be written."""
        self.path = path
        self.walks: dict[tuple[int, str], Walk] = {}
        try:
            if path.exists():
                self._read(dict(identity))
            else:
                path.write_text(json.dumps(identity) + "\n")
        except OSError as err:
            raise CliError(f"{path} cannot be used ({err.strerror}): name another --out.") from err

    def _read(self, identity: dict[str, Any]) -> None:
        first, *lines = self.path.read_text().splitlines() or [""]
        try:
            known = json.loads(first)
        except ValueError:
            known = None
        if known != json.loads(json.dumps(identity)):
            raise CliError(
                f"{self.path} was begun with another model, machine or options: delete it, or name "
                "another --out."
            )
        for line in lines:
            try:
                size, name, tokens, margins = json.loads(line)
            except ValueError:
                continue  # cut off when the run before was ended
            self.walks[size, name] = Walk(size, name, tuple(tokens), tuple(margins))

    def add(self, walks: Sequence[Walk]) -> None:
        """Keep these; they are on the disk when this returns."""
        with self.path.open("a") as out:
            for walk in walks:
                self.walks[walk.batch_size, walk.name] = walk
                entry = [walk.batch_size, walk.name, walk.tokens, walk.margins]
                out.write(json.dumps(entry) + "\n")


def measure(
    client: Client, prompts: Sequence[Prompt], sizes: Sequence[int], journal: Journal, bar: Bar
) -> None:
    """Walk every prompt alone and at each batch size, but for what the journal holds."""
    bar.say("alone")
    for prompt in prompts:
        if (ALONE, prompt.name) not in journal.walks:
            client.flush()
            journal.add([_walk(ALONE, client.alone([prompt])[0])])
        bar.tick()
    for size in sizes:
        bar.say(f"batches of {size}")
        for group in groups(prompts, size):
            if any((size, prompt.name) not in journal.walks for prompt in group):
                client.flush()
                params = {
                    prompt.name: _along(journal.walks[ALONE, prompt.name]) for prompt in group
                }
                answers = client.together(group, params=params)
                journal.add([_walk(size, answer) for answer in answers])
            for _ in group:
                bar.tick()


def groups(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of `size`, in an order of their own; the last may be smaller."""
    order = random.Random(SEED + size).sample(list(prompts), len(prompts))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _along(walk: Walk) -> dict[str, Any]:
    """Sampling parameters that force a request along what it answered alone."""
    length = len(walk.tokens)
    custom = {"gate_forced_ids": list(walk.tokens)}
    return {"max_new_tokens": length, "ignore_eos": True, "custom_params": custom}


def _walk(size: int, answer: Answer) -> Walk:
    tokens, margins = zip(*answer.meta["gate"]["choices"], strict=True)
    return Walk(size, answer.name, tokens, margins)


def flips(walks: Mapping[tuple[int, str], Walk]) -> list[dict[str, Any]]:
    """Every step whose batched run would have chosen another token than the one alone."""
    found = []
    for (size, name), walk in sorted(walks.items()):
        alone = walks[ALONE, name]
        pairs = zip(walk.tokens, alone.tokens, strict=True)
        for row, (token, reference) in enumerate(pairs, 1):
            if token != reference:
                margin = walk.margins[row - 1]
                found.append({"prompt": name, "row": row, "batch_size": size, "margin": margin})
    return found
