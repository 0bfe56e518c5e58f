"""The steps of walks: which are distinct, which moved, which flipped. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from margingate.study.threshold import widest_gap

ALONE = 1  # the batch size of the reference
FIRST = 2  # row of the first decode step; row 1 is the prefill's, and the gate prefills alone


@dataclass(frozen=True)
class Walk:
    """One request's steps in a batch of one size, along its answer alone.

    The three from `tops` on are empty where the server cannot compute exact products, and `routers`
    where the model has none. All have a number per row, and row 1 is the prefill's.
    """

    batch_size: int
    name: str
    tokens: tuple[int, ...]  # what the batched run would have chosen, by row
    margins: tuple[float, ...]  # logits, of the batched run
    rows: tuple[int, ...] = ()  # requests in the forward; fewer than batch_size as others end
    tops: tuple[float, ...] = ()  # the best logit
    exact_tokens: tuple[int, ...] = ()  # best by exact products of the same hidden states
    exact_margins: tuple[float, ...] = ()  # logits, of those
    routers: tuple[float, ...] = ()  # the least router margin, in the units of the scores

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Walk:
        """From what `asdict` and JSON make of a walk."""
        lists = {key: tuple(value) for key, value in record.items() if isinstance(value, list)}
        return cls(**{**record, **lists})


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
