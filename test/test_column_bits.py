"""Digests of K/V columns: each bit is in that of its own column, and in no other."""

from __future__ import annotations

import torch
from audited_server import DTYPES, Pool
from hypothesis import given
from hypothesis import strategies as st

SPOTS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 15), st.integers(0, 7))


@given(st.sampled_from(list(DTYPES)), SPOTS, st.integers(0, 15))
def test_each_bit_of_a_column_is_in_its_digest_and_in_no_other(dtype, spot, bit):
    from margingate.runtime.verify.column_bits import ColumnBits

    pool, slots = Pool(dtype), torch.arange(16)
    columns = ColumnBits(pool)
    before = columns.of(slots)
    layer, part, slot, element = spot
    raw = pool.buffers[layer][part].view(DTYPES[dtype]).view(16, 8)
    raw[slot, element] ^= (1 << bit) if bit < 15 or dtype is torch.float32 else -(1 << 15)
    assert (columns.of(slots) != before).nonzero().flatten().tolist() == [slot]


def test_what_is_swapped_shows_and_pieces_do_not(monkeypatch):
    from margingate.runtime.verify import column_bits

    pool, slots = Pool(), torch.tensor([5, 3, 9, 3])
    columns = column_bits.ColumnBits(pool)
    before = columns.of(slots)
    assert columns.width == 2 * 2 * 8 * 16
    assert before[1] == before[3] and len(set(before.tolist())) == 3
    monkeypatch.setattr(column_bits, "MOST_ELEMENTS", 1)
    assert columns.of(slots).equal(before)
    for one in pool.buffers:
        one.reverse()  # keys are values
    assert not columns.of(slots).eq(before).any()
    for one in pool.buffers:
        one.reverse()
    pool.buffers.reverse()  # a layer is another
    assert not columns.of(slots).eq(before).any()
