"""Calibration's measurements: answers alone, then forced along them in batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from margingate.calibration import widest_gap
from margingate.cli.bar import Bar
from margingate.cli.errors import CliError

if TYPE_CHECKING:
    from margingate.client import Answer, Client, Prompt

ALONE = 1  # the batch size of the reference
FIRST = 2  # row of the first decode step; row 1 is the prefill's, and the gate prefills alone
SEED = 20260530
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Walk:
    """One request's steps in a batch of one size, along its answer alone.

    The last three are empty where the server cannot compute exact products. All have a number per
    row, and row 1 is the prefill's.
    """

    batch_size: int
    name: str
    tokens: tuple[int, ...]  # what the batched run would have chosen, by row
    margins: tuple[float, ...]  # logits, of the batched run
    rows: tuple[int, ...] = ()  # requests in the forward; fewer than batch_size as others end
    tops: tuple[float, ...] = ()  # the best logit
    exact_tokens: tuple[int, ...] = ()  # best by exact products of the same hidden states
    exact_margins: tuple[float, ...] = ()  # logits, of those

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Walk:
        """From what `asdict` and JSON make of a walk."""
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists})


class Journal:
    """Finished work as JSON lines, behind a line that says what it is work on.

    Raises:
        CliError: from all methods, where the file holds something else or cannot be used.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.walks: dict[tuple[int, str], Walk] = {}
        self.notes: dict[str, Any] = {}  # results other than walks
        known = json.loads(json.dumps(identity))
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, UnicodeDecodeError) as err:
            raise self._unusable(err) from err
        entries = [_parsed(line) for line in text.splitlines()]
        if not any(entries):
            self._write([known], "w")
            return
        self._read(known, entries)
        if not text.endswith("\n"):
            self._write([None], "a")  # ends the line that was cut off

    def _read(self, identity: dict[str, Any], entries: list[dict[str, Any] | None]) -> None:
        if entries[0] != identity:
            raise CliError(
                f"{self.path} was begun with another model, machine or options: delete it, or name "
                "another --out."
            )
        for entry in filter(None, entries[1:]):
            if "note" in entry:
                self.notes[entry["note"]] = entry["result"]
            else:
                walk = Walk.from_record(entry)
                self.walks[walk.batch_size, walk.name] = walk

    def add(self, walks: Sequence[Walk]) -> None:
        """Keep these; they are on the disk when this returns."""
        self.walks.update({(walk.batch_size, walk.name): walk for walk in walks})
        self._write([asdict(walk) for walk in walks], "a")

    def note(self, name: str, result: Any) -> None:
        """Keep another result."""
        self.notes[name] = result
        self._write([{"note": name, "result": result}], "a")

    def _write(self, entries: Sequence[Any], mode: str) -> None:
        try:
            with self.path.open(mode) as out:
                out.writelines(json.dumps(entry) + "\n" for entry in entries)
        except OSError as err:
            raise self._unusable(err) from err

    def _unusable(self, err: Exception) -> CliError:
        return CliError(
            f"{self.path} cannot be used ({getattr(err, 'strerror', None) or err}): make room, or "
            "name another --out; what is in it is kept."
        )


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a line that was cut off when the run before was ended."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def ask(client: Client, prompts: Sequence[Prompt], params: Sequence[dict[str, Any]]) -> list[Any]:
    """One request for all prompts, with sampling parameters each; answers in their order.

    The server gets them in one message, so the same prompts always make the same batches.
    Raises CliError with what the server says when it refuses them.
    """
    import requests

    from margingate.client import Answer

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
    tokens, margins, rows, *finer = zip(*answer.meta["gate"]["choices"], strict=True)
    return Walk(size, answer.name, tokens, margins, rows, *finer)


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


class Step(NamedTuple):
    """A decode step with its numbers: what two batches that give it the same bits agree on."""

    prompt: str
    row: int
    token: int  # what the batched run would have chosen
    margin: float  # logits
    finer: tuple[float, ...]  # best logit, exact token and margin; empty where there are none

    def gap(self, dtype: str) -> float:
        """Logits: the margin, with what rounding to `dtype` may have taken from it."""
        return widest_gap(self.margin, self.finer[0], dtype) if self.finer else self.margin


def steps_of(walk: Walk) -> Iterator[Step]:
    """The decode steps of a walk, with all that is known of their logits."""
    finer = [each for each in (walk.tops, walk.exact_tokens, walk.exact_margins) if each]
    for i in range(FIRST - 1, len(walk.tokens)):
        numbers = tuple(each[i] for each in finer)
        yield Step(walk.name, i + 1, walk.tokens[i], walk.margins[i], numbers)


def distinct(walks: Iterable[Walk]) -> list[Step]:
    """Decode steps, less those whose numbers another batch gave the same step.

    Steps with the same numbers are one trial: a bound on a rate may count them once.
    """
    return list(dict.fromkeys(step for walk in walks for step in steps_of(walk)))


def moved(alone: Iterable[Walk], batched: Iterable[Walk]) -> list[Step]:
    """The batched decode steps that have other numbers than alone, and so could have flipped.

    All of them where no exact margins are known: rounded logits say too little.
    """
    same = {step for walk in alone if walk.exact_margins for step in steps_of(walk)}
    return [step for walk in batched for step in steps_of(walk) if step not in same]


def flips(walks: Mapping[tuple[int, str], Walk]) -> list[dict[str, Any]]:
    """Every decode step whose batched run would have chosen another token than the one alone."""
    found = []
    for (size, name), walk in sorted(walks.items()):
        alone = walks[ALONE, name]
        pairs = zip(walk.tokens, alone.tokens, strict=True)
        for row, (token, reference) in enumerate(pairs, 1):
            if row >= FIRST and token != reference:
                margin = walk.margins[row - 1]
                found.append({"prompt": name, "row": row, "batch_size": size, "margin": margin})
    return found
