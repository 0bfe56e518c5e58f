"""What the tests of attention kernels attend to, with both kernels and the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton

from margingate_kernels import (
    PLAIN,
    Chunks,
    Columns,
    Paged,
    Rules,
    attention_reference,
    decode_attention,
    decode_workspace,
    extend_attention,
    listed_keys,
    plan_decode,
    with_window,
)
from margingate_kernels.attention import Segments

SHAPE = (2, 1, 64)  # heads, K/V heads, head size, where one is enough
# The interpreter holds bfloat16 as whole numbers and multiplies those: float16 there.
DTYPES = {"cpu": torch.float16, "cuda": torch.bfloat16}
ERROR = {"cpu": 5e-4, "cuda": 4e-3}  # norm of the difference / norm of the oracle


class World:
    """Sequences of random queries, and their keys and values scattered over a pool."""

    def __init__(
        self,
        device: str,
        lengths: Sequence[int],
        shape: tuple[int, int, int] = SHAPE,
        rules: Rules = PLAIN,
    ) -> None:
        heads, kv_heads, self.size = shape
        self.device, self.lengths, self.scale = device, lengths, self.size**-0.5
        self.rules = rules
        self.generator = torch.Generator().manual_seed(sum(lengths))
        slots = sum(lengths) + 9  # the last 9 are nobody's
        self.k, self.v = (self.random(slots, kv_heads, self.size) for _ in range(2))
        self.q = [self.random(length, heads, self.size) for length in lengths]
        self.order = torch.randperm(slots, generator=self.generator).to(device)
        self.k[self.order[-9:]] = self.v[self.order[-9:]] = math.nan
        # Row i + 1 is sequence i's; what no kernel may look up is far outside of the pool.
        self.table = torch.full((len(lengths) + 1, max(lengths) + 3), 1 << 30, dtype=torch.int32)
        self.table = self.table.to(device)
        for i, length in enumerate(lengths):
            self.table[i + 1, :length] = self.slots(i)

    def random(self, *shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self.generator)
        numbers = (numbers * 64).round() / 64  # so that `exact_dot` is exact
        return numbers.to(DTYPES[self.device]).to(self.device)

    def whole(self, sequence: int) -> tuple[int, int, int]:
        return sequence, 0, self.lengths[sequence]

    def slots(self, sequence: int) -> torch.Tensor:
        first = sum(self.lengths[:sequence])
        return self.order[first : first + self.lengths[sequence]]

    def oracle(self, sequence: int) -> torch.Tensor:
        slots = self.slots(sequence)
        return attention_reference(
            self.q[sequence], self.k[slots], self.v[slots], self.scale, self.rules
        )

    def extend(
        self,
        *pieces: tuple[int, int, int],
        longest: int = 0,
        listed: bool = False,
        room: Segments | None = None,
    ) -> list[torch.Tensor]:
        """The positions from a to b of sequences (sequence, a, b), in one forward.

        `listed`: the kernel is told no slots but those of a window and of the chunk. `room`: for
        the sums of programs that share a row's keys.
        """
        counts = [b - a for _, a, b in pieces]
        q = torch.cat([self.q[i][a:b] for i, a, b in pieces] + [self.q[0][:1]])
        chunks = Chunks(
            self.table,
            torch.tensor([i + 1 for i, _, _ in pieces], device=self.device),
            torch.tensor([0, *counts], device=self.device).cumsum(0).to(torch.int32),
            torch.tensor([a for _, a, _ in pieces], device=self.device),
            max(*counts, longest),
            max(b for _, _, b in pieces),
        )
        if listed:
            chunks = self._listed(chunks, pieces)
        out = torch.full_like(q, 7.0)
        slots = torch.cat([self.slots(i)[a:b] for i, a, b in pieces] + [self.order[-1:]])
        columns = Columns(self.k, self.v, self.k[slots], self.v[slots])
        assert extend_attention(q, columns, chunks, self.scale, out, self.rules, room) is out
        assert (out[-1] == 7.0).all()  # behind the last sequence
        return list(out[:-1].split(counts))

    def _listed(self, chunks: Chunks, pieces: Sequence[tuple[int, int, int]]) -> Chunks:
        keys, lists, rows = self._keys(), [], []
        for i, a, b in pieces:
            first = max(a - keys, 0)
            rows.append(sum(map(len, lists)) - first)
            lists.append(self.slots(i)[first:b])
        flat = torch.cat(lists).to(torch.int32)
        table = flat.as_strided((len(flat), 1), (1, 1))
        return chunks._replace(page_table=table, table_rows=torch.tensor(rows, device=self.device))

    def _keys(self) -> int:
        assert self.rules.window is not None
        return listed_keys(self.rules.window, self.size, self.device)

    def decode(
        self,
        rows: Sequence[tuple[int, int]],
        segments: int = 99,
        programs: int = 0,
        *,
        listed: bool = False,
    ) -> torch.Tensor:
        """The rows (sequence, position) in one batch.

        `listed`: the kernel is told no slots but those of a window.
        """
        q = torch.stack([self.q[i][at] for i, at in rows])
        slots = torch.cat([self.slots(i)[: at + 1] for i, at in rows])
        indptr = torch.tensor([0, *(at + 1 for _, at in rows)], device=self.device).cumsum(0)
        space = decode_workspace(len(rows) + 2, segments, q.shape[1], self.size, self.device)
        if self.rules.window is not None:
            space = with_window(space, self.rules.window)
        for buffer in space.segments:  # left by another batch
            buffer.fill_(1 if buffer.dtype == torch.int32 else math.nan)
        space = space._replace(programs=programs or space.programs)
        ends = None
        if listed:
            lists = [self.slots(i)[: at + 1][-self._keys() :] for i, at in rows]
            slots = torch.cat(lists)
            ends = torch.tensor([0, *map(len, lists)], device=self.device).cumsum(0)
            ends = ends.to(torch.int32)
        paged = Paged(self.k, self.v, slots, indptr.to(torch.int32))
        plan_decode(paged.indptr, space, ends)
        out = torch.full_like(q, 7.0)
        assert decode_attention(q, paged, self.scale, out, space, self.rules) is out
        return out


def assert_close(got: torch.Tensor, want: torch.Tensor, note: object = "") -> None:
    error = float((got.double() - want).norm() / want.norm())
    assert error < ERROR[got.device.type], (note, error)


STEP = 16  # of a matrix unit along the sums


def product_of(left: np.ndarray, right: np.ndarray, so_far: np.ndarray) -> np.ndarray:
    """Of matrices, as a matrix unit adds it: steps are exact in float64, then rounded, then added.

    It sums a row alike wherever that is in a tile; numpy's float32 does not.
    """
    for i in range(0, len(right), STEP):
        step = np.matmul(left[:, i : i + STEP], right[i : i + STEP], dtype=np.float64)
        so_far = so_far + step.astype(np.float32)
    return so_far


def exact_dot(_: object, a: Any, b: Any, d: Any, *__: object) -> Any:
    """The interpreter's dot by `product_of`."""
    found = product_of(a.data, b.data, d.data)
    return triton.runtime.interpreter.TensorHandle(found, d.dtype.scalar)
