"""Triton bodies of `decode_attention`: a plan, the segments, and their sum.

Their arithmetic is that of attention_triton.py.
"""

import triton
import triton.language as tl

from margingate_kernels.attention_triton import NEG_INF, PAGED, power_of_two, sum_tiles, with_sink
from margingate_kernels.overlap import wait_for_the_kernel_before

_PLANNED = tl.constexpr(128)  # segments that `plan` writes at a time
UNROLLED = tl.constexpr(8)  # segments that are read at a time to be added up


@triton.jit(do_not_specialize=["rows", "capacity"])
def plan(  # noqa: PLR0917
    indptr: tl.tensor,  # int32 [rows + 1]: between two, a row's keys; where its slots start
    ends: tl.tensor,  # int32 [rows + 1]: where each row's slots end, from the second on; or None
    firsts: tl.tensor,  # int32 [rows + 1]: written; segments before each row's first
    records: tl.tensor,  # int32 [capacity, 4]: written; see `decode`
    rows: tl.tensor,
    capacity: tl.tensor,
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803 - keys before its own that a row sees; None: all
    BLOCK: tl.constexpr,  # noqa: N803
    overlap: tl.constexpr,
) -> None:
    """A program a row: number its segments behind those of the rows before it.

    With a window the first begins with the tile of the first key that the row sees.
    """
    wait_for_the_kernel_before(overlap)
    row = tl.program_id(0)
    every = tl.arange(0, BLOCK)
    starts = tl.load(indptr + every, mask=every <= row, other=0)
    lengths = tl.load(indptr + every + 1, mask=every <= row, other=0) - starts
    counts = (lengths + SEGMENT - 1) // SEGMENT
    if WINDOW is not None:
        counts -= tl.maximum(lengths - 1 - WINDOW, 0) // SEGMENT
    behind = tl.sum(tl.where(every <= row, counts, 0), 0)
    start = tl.sum(tl.where(every == row, starts, 0), 0)
    length = tl.sum(tl.where(every == row, lengths, 0), 0)
    if ends is not None:  # of a window's keys alone: key 0 would be as far before them
        start = tl.load(ends + row + 1) - length
    count = (length + SEGMENT - 1) // SEGMENT
    if WINDOW is not None:
        seen = tl.maximum(length - 1 - WINDOW, 0)
        count -= seen // SEGMENT
    first = behind - count
    tl.store(firsts + row, first)
    if row == rows - 1:
        tl.store(firsts + rows, behind)
    for i in range(0, count, _PLANNED):
        at = i + tl.arange(0, _PLANNED)
        fits = (at < count) & (first + at < capacity)
        record = records + (first + at) * 4
        tl.store(record, row, mask=fits)
        if WINDOW is None:
            tl.store(record + 1, at * SEGMENT, mask=fits)
        else:
            begins = (seen // SEGMENT + at) * SEGMENT
            tl.store(record + 1, tl.maximum(begins, seen // BLOCK_N * BLOCK_N), mask=fits)
        tl.store(record + 2, length, mask=fits)
        tl.store(record + 3, start, mask=fits)


@triton.jit(do_not_specialize=["rows", "capacity"])
def decode(  # noqa: PLR0917
    q: tl.tensor,  # [rows, heads, head_size]
    k_buffer: tl.tensor,  # [slots, K/V heads, head_size]
    v_buffer: tl.tensor,
    slots: tl.tensor,  # flat
    firsts: tl.tensor,  # int32 [rows + 1]
    records: tl.tensor,  # int32 [capacity, 4]: a segment's row and first key; the row's keys and
    # where its slots start
    tops: tl.tensor,  # float32 [capacity, heads, 2]: written; top and total
    means: tl.tensor,  # float32 [capacity, heads, head_size]: written
    rows: tl.tensor,
    capacity: tl.tensor,
    scale: tl.float32,
    squeeze: tl.tensor,
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    overlap: tl.constexpr,
) -> None:
    """Programs take turns: a segment of one row in the heads of one group each."""
    wait_for_the_kernel_before(overlap)
    groups: tl.constexpr = heads // group
    lanes = tl.arange(0, head_size)
    of_group = tl.arange(0, BLOCK_M)
    real = of_group < group
    work = tl.minimum(tl.load(firsts + rows), capacity) * groups
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        segment, of = item // groups, item % groups
        record = records + segment * 4
        row, first = tl.load(record), tl.load(record + 1)
        length, start = tl.load(record + 2), tl.load(record + 3)
        its_heads = of * group + of_group
        queries = tl.load(
            q + row.to(tl.int64) * stride_q + its_heads[:, None] * head_size + lanes[None, :],
            mask=real[:, None],
            other=0.0,
        )
        positions = tl.full([BLOCK_M], length - 1, tl.int32)
        if WINDOW is None:
            end = tl.minimum(first + SEGMENT, length)
        else:
            end = tl.minimum((first // SEGMENT + 1) * SEGMENT, length)
        top, total, mean = sum_tiles(
            *(queries, positions, first, end, end, slots + start.to(tl.int64)),
            *(k_buffer + of * head_size, v_buffer + of * head_size, 0, 0, 0, scale, squeeze),
            *(stride_k, stride_v, head_size, head_size, BLOCK_M, BLOCK_N, WINDOW, PAGED, True),
        )
        at = (segment * heads + its_heads).to(tl.int64)
        keep_sums(tops, means, at, real, top, total, mean, head_size)


@triton.jit(do_not_specialize=["capacity"])
def add_up(  # noqa: PLR0917
    out: tl.tensor,  # [rows, heads, head_size]
    firsts: tl.tensor,
    tops: tl.tensor,
    means: tl.tensor,
    sinks: tl.tensor,  # [heads], or None
    capacity: tl.tensor,
    stride_o: tl.constexpr,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
    overlap: tl.constexpr,
) -> None:
    """A program a row and head: its segments, from the first to the last.

    A row whose segments did not all fit into the workspace becomes NaN.
    """
    wait_for_the_kernel_before(overlap)
    row, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, head_size)
    first, last = tl.load(firsts + row), tl.load(firsts + row + 1)
    target = out + row.to(tl.int64) * stride_o + head * head_size + lanes
    if last > capacity:
        tl.store(target, tl.full([head_size], float("nan"), tl.float32).to(out.dtype.element_ty))
        return
    # Short rows have these alone, and all of them are on their way at once.
    sums = sums_of(0, 1, first, last, head, tops, means, heads, head_size)
    top = tl.full([], NEG_INF, tl.float32)
    for j in tl.static_range(UNROLLED):
        top = tl.maximum(top, sums[j][0])
    for i in range(first + UNROLLED, last, BLOCK):
        at = ((i + tl.arange(0, BLOCK)) * heads + head).to(tl.int64)
        inside = i + tl.arange(0, BLOCK) < last
        top = tl.maximum(top, tl.max(tl.load(tops + at * 2, mask=inside, other=NEG_INF), 0))
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([head_size], tl.float32)
    total, mean = with_sums(sums, top, total, mean)
    for i in range(first + UNROLLED, last, UNROLLED):
        sums = sums_of(0, 1, i, last, head, tops, means, heads, head_size)
        total, mean = with_sums(sums, top, total, mean)
    if sinks is not None:
        total = with_sink(total, top, tl.load(sinks + head))
    tl.store(target, (mean / total).to(out.dtype.element_ty))


@triton.jit
def sums_of(  # noqa: PLR0917
    begins: tl.tensor,  # where segment 0 lies, and each one `step` behind the one before
    step: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    head: tl.tensor,
    tops: tl.tensor,
    means: tl.tensor,
    heads: tl.constexpr,
    head_size: tl.constexpr,
) -> tl.tuple:
    """(top, total, mean) of UNROLLED segments from `first` on; nothing from `last` on."""
    lanes = tl.arange(0, head_size)
    found: tl.tuple = ()
    for j in tl.static_range(UNROLLED):
        at = (begins + (first + j) * step).to(tl.int64) * heads + head
        inside = first + j < last
        top = tl.load(tops + at * 2, mask=inside, other=NEG_INF)
        total = tl.load(tops + at * 2 + 1, mask=inside, other=0.0)
        mean = tl.load(means + at * head_size + lanes, mask=inside, other=0.0)
        found += ((top, total, mean),)
    return found


@triton.jit
def with_sums(
    sums: tl.tuple,  # as `sums_of` returns them
    top: tl.tensor,  # at least theirs: what total and mean are held against
    total: tl.tensor,
    mean: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Total and mean with those of UNROLLED segments, from the first to the last."""
    for j in tl.static_range(UNROLLED):
        now = power_of_two(sums[j][0] - top)
        total += now * sums[j][1]
        mean += now * sums[j][2]
    return total, mean


@triton.jit
def keep_sums(  # noqa: PLR0917
    tops: tl.tensor,
    means: tl.tensor,
    at: tl.tensor,  # int64 [rows]: where each row's head lies in that segment
    real: tl.tensor,  # [rows]: whether it is kept
    top: tl.tensor,
    total: tl.tensor,
    mean: tl.tensor,
    head_size: tl.constexpr,
) -> None:
    """Write a segment's sums of some rows, for `sums_of`."""
    lanes = tl.arange(0, head_size)
    tl.store(tops + at * 2, top, mask=real)
    tl.store(tops + at * 2 + 1, total, mask=real)
    tl.store(means + at[:, None] * head_size + lanes[None, :], mean, mask=real[:, None])
