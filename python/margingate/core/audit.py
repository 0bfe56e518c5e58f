"""Which finished requests are replayed when nothing else runs, and what the replays have shown."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from margingate.core.chance import chosen, generator

MOST_TOKENS = 1 << 20  # of all that wait; 8 bytes each, and 8 bytes a column on the device
MOST_STARTS = 8  # of one replay


@dataclass(frozen=True, slots=True)
class Recorded:
    """An answer as its client got it, and what it is replayed from. Holds no K/V, but digests."""

    rid: str
    prompt: array[int]
    output: array[int]  # at least one token
    draw: Any = None  # how its tokens are drawn; None: greedy
    generation: int = 0  # of the weights it was computed with
    starts: int = 1  # of its replay, the next one included
    margins: array[float] = field(default_factory=lambda: array("f"))  # by row, logits
    promised: bytes = b""  # by row: 1 where the margin promises its bits
    logprobs: array[float] = field(default_factory=lambda: array("f"))  # of canonical rows
    columns: Any = field(default=None, compare=False)  # int64 [canonical columns], a digest each

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.prompt) + len(self.output)


@dataclass(slots=True)
class Bits:
    """What one replay, or all of them, compared besides tokens."""

    margins: int = 0
    logprobs: int = 0
    columns: int = 0  # of K and V, in all layers
    bits: int = 0  # of these three

    def add(self, other: Bits) -> None:
        """Add another record's numbers to this one's."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward of a replayed prompt: its tokens from `start` up to `end`."""

    start: int
    end: int
    others: int = 0  # rows of another, made-up prompt before its own


def pieces(name: str, length: int, most: int) -> list[Piece]:
    """How a prompt of `length` tokens is cut, drawn by `name`: never into one forward if it has
    more than one token. No forward has more than `most` rows, the others included.
    """
    draw, found, start = generator(name), [], 0
    while start < length:
        size = min(draw.randint(1, max(min(most, length - 1), 1)), length - start)
        others = draw.randint(0, max(min(most - size, size), 0))
        found.append(Piece(start, start + size, others))
        start += size
    return found


def grid(length: int, step: int) -> list[Piece]:
    """A prompt of `length` tokens in chunks of `step`, each alone."""
    return [Piece(start, min(start + step, length)) for start in range(0, length, step)]


KINDS = ("margin", "log-prob", "column")  # of what is compared besides tokens


class Audits:
    """The requests that wait to be replayed, and the sums of what was found."""

    def __init__(self, rate: float, seed: int = 0, most_tokens: int = MOST_TOKENS) -> None:
        """
        Args:
            rate: share of the finished requests, 0 to 1.
            seed: the server's own; clients who do not know it cannot tell what is chosen.
            most_tokens: that wait; one request waits whatever its size.
        """
        self.rate, self.seed, self.most_tokens = rate, seed, most_tokens
        self.audited = 0  # requests compared to their end, or to their first mismatch
        self.tokens = 0  # output tokens compared
        self.mismatches = 0  # requests with one
        self.bits = Bits()
        self.bit_mismatches = 0  # requests with bits that differ and no token that does
        self.by_kind = dict.fromkeys(KINDS, 0)  # requests with such a mismatch, whatever the tokens
        self.dropped = 0  # requests that were chosen and never compared
        self._waiting: deque[Recorded] = deque()
        self._size = 0  # tokens that wait

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def chooses(self, rid: str) -> bool:
        """Whether this request is audited: a function of its id and the seed, and nothing else."""
        return chosen(f"{self.seed}:{rid}", self.rate)

    def add(self, recorded: Recorded) -> None:
        """Let a request wait; where there are too many tokens the oldest requests are dropped."""
        self._waiting.append(recorded)
        self._size += recorded.size
        while self._size > self.most_tokens and len(self._waiting) > 1:
            self._pop()
            self.dropped += 1

    def take(self, generation: int) -> Recorded | None:
        """The oldest one that was computed with these weights; older weights' are dropped."""
        while self._waiting:
            recorded = self._pop()
            if recorded.generation == generation:
                return recorded
            self.dropped += 1
        return None

    def _pop(self) -> Recorded:
        recorded = self._waiting.popleft()
        self._size -= recorded.size
        return recorded

    def interrupted(self, recorded: Recorded) -> None:
        """A replay had to give way: it starts anew behind the others, MOST_STARTS times in all."""
        if recorded.starts == MOST_STARTS:
            self.dropped += 1
        else:
            self.add(replace(recorded, starts=recorded.starts + 1))

    def compared(
        self, tokens: int, *, mismatch: bool, bits: Bits | None = None, kinds: Iterable[str] = ()
    ) -> None:
        """A replay ended after so many tokens, the mismatch included if it found one.

        Args:
            mismatch: whether a token differs.
            bits: what else was compared; None: nothing.
            kinds: those of KINDS that differ.
        """
        kinds = set(kinds)
        self.audited += 1
        self.tokens += tokens
        self.mismatches += mismatch
        self.bit_mismatches += bool(kinds) and not mismatch
        for kind in kinds:
            self.by_kind[kind] += 1
        if bits is not None:
            self.bits.add(bits)
