"""How far the gate's attention kernels are from float64, on a made-up sequence around a window.

Needs nothing of SGLang, so that Triton's interpreter runs it in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from margingate_kernels import (
    Chunks,
    Columns,
    Paged,
    Rules,
    attention_reference,
    attention_split,
    decode_attention,
    decode_workspace,
    extend_attention,
    plan_decode,
    segments_of,
    with_window,
)
from margingate_kernels.attention import Segments, blocks_for

SEED = 20261128
TAIL = 140  # rows at the end of the sequence: two blocks of queries, of 128 at most
SLACK = 400  # positions behind the window: a segment, a tile of 128 and some more
FEW = 40  # rows at its end that see as many keys as programs share
NOBODYS = 9  # slots that hold no numbers
Span = tuple[int, int]  # positions from, to


@dataclass(frozen=True)
class LayerKind:
    """What layers that ask for the same have in common."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    rules: Rules

    def __str__(self) -> str:
        rules = self.rules
        said = [f"{self.heads} heads of {self.head_size} lanes, {self.kv_heads} of keys"]
        said += [f"a window of {rules.window} keys before a token"] if rules.window else []
        said += [f"a cap of {rules.cap:g}"] if rules.cap else []
        said += ["sinks"] if rules.sinks is not None else []
        return ", ".join(said)


@dataclass(frozen=True)
class Found:
    """What a kind of layer gives."""

    error: float  # the largest of any row in any head; NaN where a result is none
    same_bits: bool  # in decode and prefill, cut anywhere and in any company


def measure(kind: LayerKind, dtype: torch.dtype, device: Any, longest: int) -> Found:
    """Run both kernels on a made-up sequence of up to `longest` tokens. Allocates what it needs."""
    made = _Sequence(kind, dtype, device, min((kind.rules.window or 0) + SLACK, longest))
    spans = spans_of(kind.rules.window, made.length)
    together = made.extend(spans)
    alone = [made.extend([span])[0] for span in spans]
    (start, end), middle = spans[-1], sum(spans[-1]) // 2
    halves = [(a, b) for a, b in ((start, middle), (middle, end)) if a < b]
    cut = [made.extend([half])[0] for half in halves]
    rows = [position for span in spans for position in range(*span)]
    decoded = made.decode(rows)
    prefilled = torch.cat(together)
    same = torch.equal(decoded, prefilled) and torch.equal(torch.cat(alone), prefilled)
    same = same and torch.equal(torch.cat(cut), together[-1])
    edges = sorted({edge for start, end in spans for edge in (start, end - 1)})
    errors = [made.error(edge, prefilled[rows.index(edge)]) for edge in edges]
    return Found(float(torch.tensor(errors).amax()), same)  # NaN where one of them is


def measure_shared(kind: LayerKind, dtype: torch.dtype, device: Any, longest: int) -> bool | None:
    """Whether a few rows have the bits of one loop where programs share their keys.

    None: on this device no program ever does, in layers of this kind and sequences of up to
    `longest` tokens. Allocates what it needs.
    """
    segment = blocks_for(kind.head_size).segment
    # They begin within a segment and end within the next.
    length = min((attention_split.FEWEST_SEGMENTS + 1) * segment + FEW // 2, longest)
    if kind.rules.window is not None or length <= FEW:
        return None
    span = (length - FEW, length)
    made = _Sequence(kind, dtype, device, length, span[0])
    # At once, and in turns.
    rooms = segments_of(length, kind.head_size), attention_split.LEAST_ROOM
    spaces = [
        decode_workspace(1, segments * FEW, kind.heads, kind.head_size, device)
        for segments in rooms
    ]
    if not all(made.shares_keys(span, space.segments) for space in spaces):
        return None
    loop = made.extend([span])[0]
    return all(torch.equal(made.extend([span], space.segments)[0], loop) for space in spaces)


def spans_of(window: int | None, length: int) -> list[Span]:
    """Positions to look at: the first, those where a window, a tile of 64 or 128 and a segment are
    left behind, and the last."""
    wanted = [(0, 8), (length - TAIL, length)]
    ends = ((window or 0) + left for left in (0, 64, 128, 256))
    wanted += [(end - 2, end + 3) for end in ends]
    spans = {(max(start, 0), min(end, length)) for start, end in wanted}
    return sorted((start, end) for start, end in spans if start < end)


class _Sequence:
    """A made-up sequence in a pool of its own; positions before `first` are not asked for."""

    def __init__(
        self, kind: LayerKind, dtype: torch.dtype, device: Any, length: int, first: int = 0
    ) -> None:
        self._kind, self.length, self._from = kind, length, first
        generator = torch.Generator().manual_seed(SEED)

        def random(tokens: int, heads: int) -> torch.Tensor:
            numbers = torch.randn(tokens, heads, kind.head_size, generator=generator)
            return numbers.to(device, dtype)

        self._q = random(length - first, kind.heads)
        self._k, self._v = (random(length + NOBODYS, kind.kv_heads) for _ in range(2))
        order = torch.randperm(length + NOBODYS, generator=generator).to(device)
        self._slots, others = order[:length], order[length:]
        self._k[others] = self._v[others] = torch.nan
        self._table = self._slots.to(torch.int32)[None]

    def extend(self, spans: Sequence[Span], room: Segments | None = None) -> list[torch.Tensor]:
        """These positions as chunks of prompts in one forward."""
        at = torch.cat([self._positions(range(*span)) for span in spans])
        chunks = self._chunks(spans)
        columns = Columns(self._k, self._v, self._k[self._slots[at]], self._v[self._slots[at]])
        kind, q = self._kind, self._q[at - self._from]
        out = torch.empty_like(q)
        extend_attention(q, columns, chunks, kind.scale, out, kind.rules, room)
        return list(out.split([end - start for start, end in spans]))

    def shares_keys(self, span: Span, room: Segments) -> bool:
        """Whether programs share the keys of these positions as a chunk of their own."""
        q = self._q[self._positions(range(*span)) - self._from]
        return attention_split.shares_keys(q, self._chunks([span]), room, self._kind.rules)

    def _chunks(self, spans: Sequence[Span]) -> Chunks:
        counts, device = [end - start for start, end in spans], self._q.device
        return Chunks(
            self._table,
            torch.zeros(len(spans), dtype=torch.int64, device=device),
            torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32),
            torch.tensor([start for start, _ in spans], device=device, dtype=torch.int32),
            max(counts),
            max(end for _, end in spans),
        )

    def decode(self, rows: Sequence[int]) -> torch.Tensor:
        """These positions as rows of one batch."""
        kind, device = self._kind, self._q.device
        window = kind.rules.window
        most = sum(segments_of(row + 1, kind.head_size, window) for row in rows)
        space = decode_workspace(len(rows), most, kind.heads, kind.head_size, device)
        space = space if window is None else with_window(space, window)
        indptr = torch.tensor([0, *(row + 1 for row in rows)], device=device).cumsum(0)
        slots = torch.cat([self._slots[: row + 1] for row in rows])
        paged = Paged(self._k, self._v, slots, indptr.to(torch.int32))
        plan_decode(paged.indptr, space)
        q = self._q[self._positions(rows)]
        return decode_attention(q, paged, kind.scale, torch.empty_like(q), space, kind.rules)

    def error(self, position: int, got: torch.Tensor) -> float:
        """Of a row [heads, head_size]: the largest of its heads. A K/V head at a time, for room."""
        kind, seen = self._kind, self._slots[: position + 1]
        group = kind.heads // kind.kv_heads
        worst = []
        for i in range(kind.kv_heads):
            part = slice(i * group, (i + 1) * group)
            sinks = None if kind.rules.sinks is None else kind.rules.sinks[part]
            want = attention_reference(
                self._q[position : position + 1, part],
                self._k[seen, i : i + 1],
                self._v[seen, i : i + 1],
                kind.scale,
                kind.rules._replace(sinks=sinks),
            )[0]
            worst.append(((got[part].double() - want).norm(dim=-1) / want.norm(dim=-1)).amax())
        return float(torch.stack(worst).amax())  # which is NaN where one of them is

    def _positions(self, positions: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(positions), device=self._q.device)
