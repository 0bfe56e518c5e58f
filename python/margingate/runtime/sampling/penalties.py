"""Penalties for tokens that came before (frequency, presence, repetition), and least lengths.

SGLang keeps running sums, a row for each request of a batch. With overlap these leave out the
newest token, and a retracted request's start anew: what a row is given depends on scheduling. So
the gate takes the parameters off its requests and does it by itself. The fast path counts on the
device, by the request's row of the page table: each decode step its own input token. A verified row
is counted from its request's tokens. Both then do the same arithmetic, element by element, so the
same bits come out in any batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from margingate.runtime.compat.kv import columns
from margingate.runtime.request import guard
from margingate.runtime.request.sampling_params import NONE, Penalties

FEW = 8  # rows of the table, once it has any


def penalize(
    logits: torch.Tensor, counts: torch.Tensor, values: torch.Tensor, barred: torch.Tensor
) -> None:
    """Change logits in place. Rows do not depend on each other, nor on what batch they are in.

    Args:
        logits: any floating dtype [rows, vocab]; the arithmetic is in float32.
        counts: int32 [rows, vocab], how often each token came.
        values: float32 [rows, 3], as `Penalties.values`; NONE leaves a row's bits as they are.
        barred: bool [rows, vocab], tokens that may not come.
    """
    frequency, presence, repetition = (values[:, i : i + 1] for i in range(3))
    came = counts > 0
    changed = logits.float() - frequency * counts - presence * came
    repeated = torch.where(changed < 0, changed * repetition, changed / repetition)
    changed = torch.where(came, repeated, changed)
    logits.copy_(changed.masked_fill_(barred, -torch.inf))


def ends_of(req: Any) -> list[int]:
    """The token ids that end an answer of this request."""
    found = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        found |= set(getattr(req.tokenizer, "additional_stop_token_ids", None) or ())
        found |= {req.tokenizer.eos_token_id} - {None}
    return sorted(token for token in found if 0 <= token < req.vocab_size)


@dataclass(frozen=True, slots=True)
class RowPenalty:
    """What a verified row's logits are given."""

    penalties: Penalties
    tokens: Sequence[int]  # output tokens before it
    ends: Sequence[int]  # that may not come; empty where they may

    def apply(self, logits: torch.Tensor) -> None:
        """Change one row of logits, [1, vocab], in place, as the fast path does."""
        device = logits.device
        counts = torch.zeros(logits.shape, dtype=torch.int32, device=device)
        _count(counts[0], self.tokens)
        barred = torch.zeros(logits.shape, dtype=torch.bool, device=device)
        barred[0, torch.tensor(self.ends, dtype=torch.int64, device=device)] = True
        penalize(logits, counts, _floats([self.penalties.values]).to(device), barred)


def of_row(req: Any, row: int) -> RowPenalty | None:
    """Of a row (from 1) that is verified; None without penalties."""
    found: Penalties | None = req.gate.penalties
    if found is None:
        return None
    ends = ends_of(req) if row <= found.min_new_tokens else ()
    return RowPenalty(found, req.output_ids[: row - 1], ends)


def _count(counts: torch.Tensor, tokens: Iterable[int]) -> None:
    ids = torch.tensor(list(tokens), dtype=torch.int64).to(counts.device)
    counts.index_put_((ids,), torch.ones_like(ids, dtype=counts.dtype), accumulate=True)


def _floats(numbers: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a new row of the table is filled with."""

    row: int
    values: tuple[float, float, float]
    ends: list[int]
    until: int  # input positions below this one are too early for those


class Table:
    """What the fast path knows of the requests with penalties, by row; on the device.

    It is written where forwards are: behind the one in flight, which may hold a request that has
    ended, and whose row of the page table is another's by now. Row 0 is that of all other requests
    and changes nothing, whatever is counted there.
    """

    def __init__(self, requests: int, vocabulary: int, device: Any) -> None:
        """
        Args:
            requests: rows of the page table.
        """
        self._row_of = torch.zeros(requests, dtype=torch.int64, device=device)  # by page-table row
        self._vocabulary, self._device = vocabulary, device
        self._counts = torch.zeros((1, vocabulary), dtype=torch.int32, device=device)
        self._values = _floats([NONE]).to(device)
        self._barred = torch.zeros((1, vocabulary), dtype=torch.bool, device=device)
        self._until = torch.zeros(1, dtype=torch.int64, device=device)
        self._size = 1
        self._free: list[int] = []
        self._rows: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._new: list[_Entry] = []
        self._moved: list[tuple[list[int], list[int]]] = []  # rows of the page table, and ours
        # Counts to be made anew; a request that is gone drops out, and its row is another's.
        self._recounts: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        self._stale = False  # prompts were admitted while nobody had penalties

    def admit(self, batch: Any) -> None:
        """Before a prefill forward: its requests have rows of the page table, perhaps new ones."""
        rows = [0 if _of(req) is None else self._admitted(req) for req in batch.reqs]
        if self._rows:
            self._moved.append(([columns.row(req) for req in batch.reqs], rows))
        else:
            self._stale = True
            self._new, self._moved = [], []  # of requests that are gone

    def recount(self, req: Any) -> None:
        """The output was changed: before the next forward, count it but for its last token.

        That one is the next decode step's input, which counts it. Nothing is written here: a
        forward in flight, on its own stream, may still read and count the request's row.
        """
        if req in self._rows:
            self._recounts[req] = list(req.output_ids[:-1])

    def apply(self, logits: torch.Tensor, batch: Any) -> None:
        """Change the logits of a forward, [rows, vocab], in place.

        Args:
            batch: SGLang's ForwardBatch.
        """
        if not self._rows:
            return
        self._write()
        rows = self._row_of[batch.req_pool_indices]
        decode = batch.forward_mode.is_decode()
        if decode:
            tokens = batch.input_ids.to(torch.int64)
            ones = torch.ones_like(tokens, dtype=torch.int32)
            self._counts.index_put_((rows, tokens), ones, accumulate=True)
        positions = batch.positions if decode else batch.seq_lens - 1
        early = (positions < self._until[rows]).unsqueeze(1)
        penalize(logits, self._counts[rows], self._values[rows], self._barred[rows] & early)

    def _admitted(self, req: Any) -> int:
        """The request's row; that of all others where it raises, which ends the request."""
        with guard.request(req, "penalties"):
            return self._row(req)
        return 0

    def _row(self, req: Any) -> int:
        """The request's row; a new one, to be written, if it has none yet."""
        row = self._rows.get(req)
        if row is None:
            if not self._free:
                size = max(2 * self._size, FEW)
                self._free += range(self._size, size)
                self._size = size
            row = self._rows[req] = self._free.pop()
            weakref.finalize(req, self._free.append, row).atexit = False
            penalties: Penalties = req.gate.penalties
            until = len(req.origin_input_ids) - 1 + penalties.min_new_tokens
            ends = ends_of(req) if penalties.min_new_tokens else []
            self._new.append(_Entry(row, penalties.values, ends, until))
        return row

    def _write(self) -> None:
        """Bring what was admitted since to the device."""
        if self._size > len(self._values):
            self._grow()
        for entry in self._new:
            self._counts[entry.row].zero_()
            self._values[entry.row] = _floats(entry.values).to(self._device)
            self._barred[entry.row] = False
            self._barred[entry.row, self._ids(entry.ends)] = True
            self._until[entry.row] = entry.until
        if self._moved and self._stale:
            self._row_of.zero_()
            self._stale = False
        for pool, rows in self._moved:
            self._row_of[self._ids(pool)] = self._ids(rows)
        self._new, self._moved = [], []
        for req, tokens in self._recounts.items():
            self._counts[self._rows[req]].zero_()
            _count(self._counts[self._rows[req]], tokens)
        self._recounts.clear()

    def _ids(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)

    def _grow(self) -> None:
        old, wide = len(self._values), (self._size, self._vocabulary)
        grown = (
            torch.zeros(wide, dtype=torch.int32, device=self._device),
            _floats([NONE]).to(self._device).repeat(self._size, 1),
            torch.zeros(wide, dtype=torch.bool, device=self._device),
            torch.zeros(self._size, dtype=torch.int64, device=self._device),
        )
        kept = (self._counts, self._values, self._barred, self._until)
        for new, before in zip(grown, kept, strict=True):
            new[:old] = before
        self._counts, self._values, self._barred, self._until = grown


def _of(req: Any) -> Penalties | None:
    found: Penalties | None = getattr(getattr(req, "gate", None), "penalties", None)
    return found
