"""Triton bodies of `extend_attention` for few rows with many keys: the segments, and their sum.

Their arithmetic is that of attention_triton.py. A program sums up some segments for a block of
rows, as decode does it for one row; a second launch adds them to those before.
"""

import triton
import triton.language as tl

from margingate_kernels.attention_decode_triton import UNROLLED, keep_sums, sums_of, with_sums
from margingate_kernels.attention_triton import NEG_INF, PAGED, power_of_two, sum_tiles, with_sink


@triton.jit(do_not_specialize=["table_stride", "first", "count", "per", "tokens"])
def sum_segments(  # noqa: PLR0917
    q: tl.tensor,  # [tokens, heads, head_size]
    k_buffer: tl.tensor,  # [slots, K/V heads, head_size], the new keys included
    v_buffer: tl.tensor,  # as k_buffer
    page_table: tl.tensor,  # int32 [requests, positions]: slots
    table_stride: tl.tensor,
    table_rows: tl.tensor,  # int64 [sequences]: rows of the page table
    starts: tl.tensor,  # [sequences + 1]: first token of each in q
    prefix_lens: tl.tensor,  # [sequences]: positions before the first of these tokens
    tops: tl.tensor,  # float32 [segments, tokens, heads, 2]: written; top and total
    means: tl.tensor,  # float32 [segments, tokens, heads, head_size]: written
    first: tl.tensor,  # segment of those that are summed up
    count: tl.tensor,  # of those
    per: tl.tensor,  # of a program
    tokens: tl.tensor,
    scale: tl.float32,
    squeeze: tl.tensor,
    stride_q: tl.tensor,  # elements from token to token
    stride_k: tl.constexpr,  # from slot to slot
    stride_v: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,  # heads per K/V head
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
) -> None:
    """A program sums up some segments in a block of rows: tokens in all heads of a group.

    What a row does not see is not read by `add_segments`, whatever is written there.
    """
    groups: tl.constexpr = heads // group
    block, of = tl.program_id(0) // groups, tl.program_id(0) % groups
    part, sequence = tl.program_id(1) * per, tl.program_id(2)
    start = tl.load(starts + sequence)
    length = (tl.load(starts + sequence + 1) - start).to(tl.int32)
    if block * BLOCK_M >= length * group:
        return
    prefix = tl.load(prefix_lens + sequence).to(tl.int32)
    slots = page_table + tl.load(table_rows + sequence).to(tl.int64) * table_stride
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    its_tokens, its_heads = rows // group, of * group + rows % group
    real = its_tokens < length
    lanes = tl.arange(0, head_size)
    at_token = start.to(tl.int64) + its_tokens
    queries = tl.load(
        q + (at_token * stride_q + its_heads * head_size)[:, None] + lanes[None, :],
        mask=real[:, None],
        other=0.0,
    )
    end = prefix + tl.minimum(length, (block * BLOCK_M + BLOCK_M - 1) // group + 1)
    last = tl.minimum((end + SEGMENT - 1) // SEGMENT - first, tl.minimum(part + per, count))
    whole = tl.minimum(prefix // SEGMENT - first, last)
    k_at, v_at = k_buffer + of * head_size, v_buffer + of * head_size
    for i in range(part, whole):
        begins = (first + i) * SEGMENT
        top, total, mean = sum_tiles(
            *(queries, prefix + its_tokens, begins, begins + SEGMENT, end, slots, k_at, v_at),
            *(0, 0, 0, scale, squeeze, stride_k, stride_v, head_size, head_size),
            *(BLOCK_M, BLOCK_N, None, PAGED, False),
        )
        at = (i * tokens + at_token) * heads + its_heads
        keep_sums(tops, means, at, real, top, total, mean, head_size)
    for i in range(tl.maximum(part, whole), last):
        begins = (first + i) * SEGMENT
        top, total, mean = sum_tiles(
            *(queries, prefix + its_tokens, begins, tl.minimum(begins + SEGMENT, end), end, slots),
            *(k_at, v_at, 0, 0, 0, scale, squeeze, stride_k, stride_v, head_size, head_size),
            *(BLOCK_M, BLOCK_N, None, PAGED, True),
        )
        at = (i * tokens + at_token) * heads + its_heads
        keep_sums(tops, means, at, real, top, total, mean, head_size)


@triton.jit(do_not_specialize=["first", "count", "before", "tokens"])
def add_segments(  # noqa: PLR0917
    out: tl.tensor,  # [tokens, heads, head_size]
    starts: tl.tensor,  # as `sum_segments`
    prefix_lens: tl.tensor,
    tops: tl.tensor,
    means: tl.tensor,
    sinks: tl.tensor,  # [heads], or None
    first: tl.tensor,  # segment of those that are added
    count: tl.tensor,  # of those
    before: tl.tensor,  # where the sums of all before lie, as a segment
    tokens: tl.tensor,
    stride_o: tl.tensor,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    SEGMENT: tl.constexpr,  # noqa: N803
    BEGINS: tl.constexpr,  # noqa: N803 - whether there are none before
    ENDS: tl.constexpr,  # noqa: N803 - whether these are the last; the others write their sums
) -> None:
    """A program a token and head: its segments, from the first to the last.

    A token of more keys than there were said to be becomes NaN.
    """
    row, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + sequence)
    if row >= (tl.load(starts + sequence + 1) - start).to(tl.int32):
        return
    keys = tl.load(prefix_lens + sequence).to(tl.int32) + row + 1
    seen = (keys + SEGMENT - 1) // SEGMENT - first
    last = tl.minimum(seen, count)
    lanes = tl.arange(0, head_size)
    token = start.to(tl.int64) + row
    at_before = (before * tokens + token) * heads + head
    top = tl.full([], NEG_INF, tl.float32)
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([head_size], tl.float32)
    if not BEGINS:
        top, total = tl.load(tops + at_before * 2), tl.load(tops + at_before * 2 + 1)
        mean = tl.load(means + at_before * head_size + lanes)
    for i in range(0, last, UNROLLED):
        sums = sums_of(token, tokens, i, last, head, tops, means, heads, head_size)
        higher = top
        for j in tl.static_range(UNROLLED):
            higher = tl.maximum(higher, sums[j][0])
        carry = power_of_two(top - higher)
        top, total, mean = higher, total * carry, mean * carry
        total, mean = with_sums(sums, top, total, mean)
    if ENDS:
        if sinks is not None:
            total = with_sink(total, top, tl.load(sinks + head))
        found = tl.where(seen > count, float("nan"), mean / total)
        target = out + token * stride_o + head * head_size + lanes
        tl.store(target, found.to(out.dtype.element_ty))
    else:
        tl.store(tops + at_before * 2, top)
        tl.store(tops + at_before * 2 + 1, total)
        tl.store(means + at_before * head_size + lanes, mean)
