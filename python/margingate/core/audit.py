"""Which finished requests are replayed when nothing else runs, and what the replays have shown."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from margingate.core.chance import chosen

MOST_TOKENS = 1 << 20  # of all that wait; 8 bytes each
MOST_STARTS = 8  # of one replay


@dataclass(frozen=True, slots=True)
class Recorded:
    """An answer as its client got it, and what it is replayed from. Holds no K/V."""

    rid: str
    prompt: array[int]
    output: array[int]  # at least one token
    draw: Any = None  # how its tokens are drawn; None: greedy
    generation: int = 0  # of the weights it was computed with
    starts: int = 1  # of its replay, the next one included

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.prompt) + len(self.output)


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

    def compared(self, tokens: int, *, mismatch: bool) -> None:
        """A replay ended after so many tokens, the mismatch included if it found one."""
        self.audited += 1
        self.tokens += tokens
        self.mismatches += mismatch
