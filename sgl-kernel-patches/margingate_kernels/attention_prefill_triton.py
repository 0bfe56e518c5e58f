"""Triton body of `extend_attention`. Its arithmetic is that of attention_triton.py."""

import triton
import triton.language as tl

from margingate_kernels.attention_triton import (
    FLAT,
    NEG_INF,
    PAGED,
    TILES,
    power_of_two,
    sum_tiles,
    with_sink,
)


@triton.jit
def _segment(  # noqa: PLR0917
    top: tl.tensor,  # of the segments before, as `add_tile`
    total: tl.tensor,
    mean: tl.tensor,
    queries: tl.tensor,
    positions: tl.tensor,
    first: tl.tensor,  # key
    seen: tl.tensor,  # the tile from which on some row sees keys; of a WINDOW
    end: tl.tensor,
    slots: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    v_column: tl.tensor,
    scale: tl.float32,
    squeeze: tl.tensor,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    head_size: tl.constexpr,
    V_LANES: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sum a segment up and add it to those before; not MASKED: all exists, none is after a row."""
    last = first + SEGMENT
    if MASKED:
        last = tl.minimum(last, end)
    if WINDOW is not None:
        first = tl.maximum(first, seen)
    own_top, own_total, own_mean = sum_tiles(
        *(queries, positions, first, last, end, slots, k_at, v_at, row, column, v_column, scale),
        *(squeeze, stride_k, stride_v, head_size, V_LANES, BLOCK_M, BLOCK_N, WINDOW, KIND, MASKED),
    )
    higher = tl.maximum(top, own_top)
    base = higher
    if WINDOW is not None:  # a row may have seen nothing yet: -inf - -inf is no number
        base = tl.where(higher == NEG_INF, 0.0, higher)
    before, now = power_of_two(top - base), power_of_two(own_top - base)
    total = total * before + own_total * now
    return higher, total, mean * before[:, None] + own_mean * now[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def extend(  # noqa: PLR0917
    q: tl.tensor,  # [tokens, heads, head_size]
    out: tl.tensor,  # as q
    k_buffer: tl.tensor,  # [slots, K/V heads, head_size]
    v_buffer: tl.tensor,  # as k_buffer
    k_new: tl.tensor,  # [tokens, K/V heads, head_size]: what the pool has of these tokens
    v_new: tl.tensor,  # as k_new
    k_tiles: tl.tensor,  # k_new [tokens, K/V heads * head_size] as a descriptor, if KIND is TILES
    v_tiles: tl.tensor,
    page_table: tl.tensor,  # int32 [requests, positions]: slots
    table_stride: tl.tensor,
    table_rows: tl.tensor,  # int64 [sequences]: rows of the page table
    starts: tl.tensor,  # [sequences + 1]: first token of each in q
    prefix_lens: tl.tensor,  # [sequences]: positions before the first of these tokens
    sinks: tl.tensor,  # [heads], or None
    scale: tl.float32,  # of the scores, or of what `capped` leaves of them, times log2(e)
    squeeze: tl.tensor,  # float32, see `capped`; None: no cap
    stride_q: tl.constexpr,  # elements from token to token
    stride_o: tl.constexpr,
    stride_k: tl.constexpr,  # from slot to slot
    stride_v: tl.constexpr,
    stride_k_new: tl.constexpr,
    stride_v_new: tl.constexpr,
    group: tl.constexpr,  # heads per K/V head
    head_size: tl.constexpr,
    PARTS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
) -> None:
    """A program attends a block of one request's rows in one head, and makes a part of its lanes.

    Segments of old keys come from the pool by slot; those of new keys alone from `k_new`, which
    takes neither slots nor an address a key. Only the last ones need a mask, or all with a window.
    """
    # The last blocks have most keys: they go first, those of all heads.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    head, sequence = tl.program_id(0), tl.program_id(2)
    lanes_each: tl.constexpr = head_size // PARTS
    part = 0
    if PARTS > 1:
        head, part = head // PARTS, head % PARTS * lanes_each
    start = tl.load(starts + sequence)
    length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    if block * BLOCK_M >= length:
        return
    prefix = tl.load(prefix_lens + sequence).to(tl.int32)
    slots = page_table + tl.load(table_rows + sequence).to(tl.int64) * table_stride
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = prefix + rows
    lanes = tl.arange(0, head_size)
    tokens = (start.to(tl.int64) + rows)[:, None]
    columns = head * head_size + lanes[None, :]
    queries = tl.load(q + tokens * stride_q + columns, mask=rows[:, None] < length, other=0.0)
    of = (head // group) * head_size
    v_of = of + part
    end = prefix + tl.minimum(length, (block + 1) * BLOCK_M)
    row = start.to(tl.int32) - prefix
    k_flat = k_new + row.to(tl.int64) * stride_k_new + of
    v_flat = v_new + row.to(tl.int64) * stride_v_new + v_of

    count = (end + SEGMENT - 1) // SEGMENT
    cached = prefix // SEGMENT
    new = tl.minimum((prefix + SEGMENT - 1) // SEGMENT, count)
    seen = tl.maximum((prefix + block * BLOCK_M + 1) // SEGMENT, new)
    visible, first, mixed, whole, last = 0, 0, cached, new, seen
    if WINDOW is not None:  # of the earliest row; the others see none of it before theirs
        visible = tl.maximum(prefix + block * BLOCK_M - WINDOW, 0) // BLOCK_N * BLOCK_N
        first = visible // SEGMENT
        mixed, whole, last = (
            tl.maximum(mixed, first),
            tl.maximum(new, first),
            tl.maximum(seen, first),
        )
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, lanes_each], tl.float32)
    for i in range(first, cached):
        top, total, mean = _segment(
            *(top, total, mean, queries, positions, i * SEGMENT, visible, end, slots),
            *(k_buffer + of, v_buffer + v_of),
            *(row, of, v_of, scale, squeeze, stride_k, stride_v),
            *(head_size, lanes_each, BLOCK_M, BLOCK_N, SEGMENT, WINDOW, PAGED, False),
        )
    for i in range(mixed, new):
        top, total, mean = _segment(
            *(top, total, mean, queries, positions, i * SEGMENT, visible, end, slots),
            *(k_buffer + of, v_buffer + v_of),
            *(row, of, v_of, scale, squeeze, stride_k, stride_v),
            *(head_size, lanes_each, BLOCK_M, BLOCK_N, SEGMENT, WINDOW, PAGED, True),
        )
    for i in range(whole, seen):
        top, total, mean = _segment(
            *(top, total, mean, queries, positions, i * SEGMENT, visible, end, slots),
            *(k_tiles if KIND == TILES else k_flat, v_tiles if KIND == TILES else v_flat),
            *(row, of, v_of, scale, squeeze, stride_k_new, stride_v_new),
            *(head_size, lanes_each, BLOCK_M, BLOCK_N, SEGMENT, WINDOW, KIND, False),
        )
    for i in range(last, count):
        top, total, mean = _segment(
            *(top, total, mean, queries, positions, i * SEGMENT, visible, end, slots),
            *(k_flat, v_flat),
            *(row, of, v_of, scale, squeeze, stride_k_new, stride_v_new),
            *(head_size, lanes_each, BLOCK_M, BLOCK_N, SEGMENT, WINDOW, FLAT, True),
        )
    if sinks is not None:
        total = with_sink(total, top, tl.load(sinks + head))
    made = head * head_size + part + tl.arange(0, lanes_each)
    tl.store(
        out + tokens * stride_o + made[None, :],
        (mean / total[:, None]).to(out.dtype.element_ty),
        mask=rows[:, None] < length,
    )
