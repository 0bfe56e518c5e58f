"""A digest of each K/V column, of the bits that it has in all layers.

A column's digest is the sum of its elements, taken as integers, each times an odd number of its
own, modulo 2^64. So one element that differs always shows, and several hide from each other with a
probability of some 2^-47 or less.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

SEED = 20261128
MOST_ELEMENTS = 1 << 22  # of one layer's keys that are held as int64 at a time
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class ColumnBits:
    """Digests of the columns of SGLang's K/V pool. Nothing here waits for the device."""

    def __init__(self, pool: Any) -> None:
        """`pool` has `start_layer`, `layer_num` and `get_kv_buffer`; its memory is only read."""
        self._pool = pool
        self._weights: dict[int, torch.Tensor] = {}  # by elements of a part, int64, odd

    @property
    def width(self) -> int:
        """Bits of one column."""
        return sum(part[0].numel() * part.element_size() * 8 for part, _ in self._parts())

    @torch.no_grad()
    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """The digests, int64 [columns], of the columns in `slots`, int64 [columns]."""
        widest = max(part[0].numel() for part, _ in self._parts())
        step = max(MOST_ELEMENTS // widest, 1)
        return torch.cat([self._sums(some) for some in slots.split(step)])

    def _sums(self, slots: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(slots)
        for part, odd in self._parts():
            elements = part[slots].flatten(1)
            whole = elements.view(_INTEGERS[part.element_size()])
            total.add_((whole * self._weights_of(whole)).sum(1), alpha=odd)
        return total

    def _parts(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Keys and values of each layer, [slots, ...], and an odd number of its own."""
        draw = random.Random(SEED)
        first, count = self._pool.start_layer, self._pool.layer_num
        for layer in range(first, first + count):
            for part in self._pool.get_kv_buffer(layer):
                yield part, draw.getrandbits(62) * 2 + 1 - (1 << 62)

    def _weights_of(self, elements: torch.Tensor) -> torch.Tensor:
        count = elements.shape[1]
        if count not in self._weights:
            generator = torch.Generator().manual_seed(SEED)
            half = torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator)
            self._weights[count] = (half * 2 + 1).to(elements.device)
        return self._weights[count]
