"""A finished request computed again, canonically, forward by forward; for audits.

The prompt is prefilled from position 0, past the radix tree and into slots of its own. Where a
prompt's bits were found not to depend on the forward, it is cut at places, and put beside made-up
rows, that its id draws: so a row count that gives other bits shows, whichever of the two forwards
had it. Then verify passes run over the recorded output.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from margingate.core.audit import Piece, Recorded, grid, pieces
from margingate.core.chance import generator
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.kv import columns, tree
from margingate.runtime.probe.startup_checks import StartupChecks
from margingate.runtime.verify import rollback
from margingate.runtime.verify.internal_prefill import extend, internal_request, release
from margingate.runtime.verify.verifier import RowInput, RowResult


@dataclass(frozen=True, slots=True)
class Part:
    """What one forward of a replay gave."""

    rows: Sequence[RowResult] = ()  # of the answer's tokens
    first: int = 0  # the first column's position
    columns: torch.Tensor | None = None  # int64 [columns], digests; None: none were asked for


class Replay:
    """One replay; `parts` runs it."""

    def __init__(
        self, scheduler: Any, checks: StartupChecks, chunk: int, recorded: Recorded, columns: Any
    ) -> None:
        """
        Args:
            chunk: tokens of a forward on the grid, where prompts are prefilled alone.
            columns: a `ColumnBits`.
        """
        self._scheduler, self._checks, self._chunk = scheduler, checks, chunk
        self._recorded, self._columns = recorded, columns
        self._wants = (0, None) if recorded.logprobs else None
        self.plan = self._plan()

    def parts(self) -> Generator[Part]:
        """Yields after each forward. Frees its slots when closed."""
        req = internal_request(f"audit-{self._recorded.rid}", self._recorded.prompt)
        try:
            yield from self._prefill(req)
            yield from self._decode(req)
        finally:
            release(self._scheduler, req)

    def rows_of(self) -> str:
        """The row counts of its prefill forwards, for a log: its own and those beside them."""
        return ", ".join(
            f"{piece.end - piece.start}+{piece.others}"
            if piece.others
            else f"{piece.end - piece.start}"
            for piece in self.plan
        )

    def _plan(self) -> list[Piece]:
        length = len(self._recorded.prompt)
        if not self._checks.prefill.together:
            return grid(length, self._chunk)
        args = settings.view(self._scheduler.server_args)
        chunk = args.chunked_prefill_size or -1
        drawn = pieces(self._recorded.rid, length, chunk if chunk > 0 else args.max_prefill_tokens)
        room = self._room_for_company()
        return [replace(piece, others=min(piece.others, room)) for piece in drawn]

    def _room_for_company(self) -> int:
        """Slots that the replay itself leaves."""
        if self._scheduler.req_to_token_pool.available_size() < 2:
            return 0
        return max(tree.room(self._scheduler) - self._recorded.size, 0)

    def _prefill(self, req: Any) -> Iterator[Part]:
        recorded, draw = self._recorded, generator(self._recorded.rid)
        length = len(recorded.prompt)
        for piece in self.plan:
            logits = self._extend(req, piece, draw)
            rows: list[RowResult] = []
            if piece.end == length:
                last = self._row(req, length - 1, recorded.prompt[-1])
                rows = self._checks.verifier.choose(logits, [last])
            yield self._part(req, rows, piece.start, piece.end)

    def _extend(self, req: Any, piece: Piece, draw: Any) -> torch.Tensor:
        """The logits [1, vocab] of the piece's last row."""
        own = (req, piece.start, piece.end)
        if not piece.others:
            return extend(self._scheduler, [own])
        vocabulary = self._scheduler.model_config.vocab_size
        tokens = draw.choices(range(vocabulary), k=piece.others)
        other = internal_request(f"audit-beside-{self._recorded.rid}", tokens)
        try:
            return extend(self._scheduler, [(other, 0, piece.others), own])[-1:]
        finally:
            release(self._scheduler, other)

    def _decode(self, req: Any) -> Iterator[Part]:
        """Rows 2 to the last, as verify passes."""
        recorded, verifier = self._recorded, self._checks.verifier
        length, count = len(recorded.prompt), len(recorded.output) - 1
        if count == 0:
            return
        found = rollback.extend_columns(self._scheduler, req, count)
        assert found, "an audit ran out of the memory that was there for it"
        rows = [self._row(req, length + i, token) for i, token in enumerate(recorded.output[:-1])]
        for start in range(0, count, verifier.rows):
            some = rows[start : start + verifier.rows]
            results = verifier.run(some)
            yield self._part(req, results, length + start, length + start + len(some))

    def _row(self, req: Any, position: int, token: int) -> RowInput:
        draw = self._recorded.draw
        return RowInput(columns.row(req), position, token, self._wants, draw=draw)

    def _part(self, req: Any, rows: Sequence[RowResult], start: int, end: int) -> Part:
        known = 0 if self._recorded.columns is None else len(self._recorded.columns)
        end = min(end, known)
        if start >= end:
            return Part(rows)
        table = self._scheduler.req_to_token_pool.req_to_token
        slots = table[columns.row(req), start:end].to(torch.int64)
        return Part(rows, start, self._columns.of(slots).cpu())
