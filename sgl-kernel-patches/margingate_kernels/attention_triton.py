"""Triton bodies of `decode_attention` and `extend_attention`: one arithmetic for both.

The keys of a row are cut into segments at multiples of SEGMENT, and each segment into tiles of
BLOCK_N, both counted from position 0. A segment is summed tile by tile from nothing; then the
segments are added up from the first to the last. Decode gives each segment to a program of its own
and adds them up in a second launch; extend does all of it in one loop. What makes both the same is
that the maximum which scores are held against is rounded up to a whole number (scores are in powers
of two): rescaling then multiplies by a power of two, which is exact, so it does not matter when it
is done. What is masked is multiplied in as exactly 1 and added as exactly 0.
"""

import triton
import triton.language as tl

_NEG_INF = tl.constexpr(float("-inf"))
_GRID = tl.constexpr(96.0)  # float32 from 64 to 128 are multiples of 2**-17
_OWNERS = tl.constexpr(128)  # segments that `plan` writes at a time
_UNROLLED = tl.constexpr(8)  # segments that `add_up` reads at a time


@triton.jit
def _power_of_two(x: tl.tensor) -> tl.tensor:
    """2**x for whole x <= 0, exactly; 0 below -126 and for -inf."""
    exponent = tl.maximum(x, -127.0).to(tl.int32) + 127
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _tile(  # noqa: PLR0917
    top: tl.tensor,  # float32 [rows]: what the scores so far were held against; whole, or -inf
    total: tl.tensor,  # float32 [rows]: sum of the weights
    mean: tl.tensor,  # float32 [rows, head_size]: sum of the weighted values
    queries: tl.tensor,  # [rows, head_size]
    positions: tl.tensor,  # int32 [rows]: the last key that each sees
    tile: tl.tensor,  # its first key
    end: tl.tensor,  # keys from here on do not exist
    slots: tl.tensor,  # pointer to the slot of key 0
    k_head: tl.tensor,  # pointers to slot 0 of this K/V head
    v_head: tl.tensor,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    scale: tl.float32,
    head_size: tl.constexpr,
    BLOCK_N: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile of keys to a segment's sums."""
    lanes = tl.arange(0, head_size)
    keys = tile + tl.arange(0, BLOCK_N)
    exists = keys < end
    slot = tl.load(slots + keys, mask=exists, other=0).to(tl.int64)
    k = tl.load(k_head + slot[None, :] * stride_k + lanes[:, None], mask=exists[None, :], other=0.0)
    scores = tl.dot(queries, k) * scale
    scores = tl.where(keys[None, :] <= positions[:, None], scores, _NEG_INF)
    higher = tl.maximum(top, tl.ceil(tl.max(scores, 1)))
    base = tl.where(higher == _NEG_INF, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    carry = _power_of_two(top - base)
    # Rounded to multiples of 2**-17, up to 128 weights sum exactly, in any order.
    total = total * carry + tl.sum((weights + _GRID) - _GRID, 1)
    v = tl.load(v_head + slot[:, None] * stride_v + lanes[None, :], mask=exists[:, None], other=0.0)
    mean = tl.dot(weights.to(v.dtype), v, mean * carry[:, None])
    return higher, total, mean


@triton.jit(do_not_specialize=["table_stride"])
def extend(  # noqa: PLR0917
    q: tl.tensor,  # [tokens, heads, head_size]
    out: tl.tensor,  # as q
    k_buffer: tl.tensor,  # [slots, K/V heads, head_size]
    v_buffer: tl.tensor,  # as k_buffer
    page_table: tl.tensor,  # int32 [requests, positions]: slots
    table_stride: tl.tensor,
    table_rows: tl.tensor,  # int64 [sequences]: rows of the page table
    starts: tl.tensor,  # [sequences + 1]: first token of each in q
    prefix_lens: tl.tensor,  # [sequences]: positions before the first of these tokens
    scale: tl.float32,  # of the scores, times log2(e)
    stride_q: tl.constexpr,  # elements from token to token
    stride_o: tl.constexpr,
    stride_k: tl.constexpr,  # from slot to slot
    stride_v: tl.constexpr,
    group: tl.constexpr,  # heads per K/V head
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
) -> None:
    """A program attends a block of one request's rows in one head."""
    # The last blocks have most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2)
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
    offset = (head // group) * head_size
    end = prefix + tl.minimum(length, (block + 1) * BLOCK_M)

    top = tl.full([BLOCK_M], _NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, head_size], tl.float32)
    for segment in range(0, end, SEGMENT):
        own_top = tl.full([BLOCK_M], _NEG_INF, tl.float32)
        own_total = tl.zeros([BLOCK_M], tl.float32)
        own_mean = tl.zeros([BLOCK_M, head_size], tl.float32)
        for tile in range(segment, tl.minimum(segment + SEGMENT, end), BLOCK_N):
            own_top, own_total, own_mean = _tile(
                own_top,
                own_total,
                own_mean,
                queries,
                positions,
                tile,
                end,
                slots,
                k_buffer + offset,
                v_buffer + offset,
                stride_k,
                stride_v,
                scale,
                head_size,
                BLOCK_N,
            )
        higher = tl.maximum(top, own_top)
        before, now = _power_of_two(top - higher), _power_of_two(own_top - higher)
        total = total * before + own_total * now
        mean = mean * before[:, None] + own_mean * now[:, None]
        top = higher
    tl.store(
        out + tokens * stride_o + columns,
        (mean / total[:, None]).to(out.dtype.element_ty),
        mask=rows[:, None] < length,
    )


@triton.jit(do_not_specialize=["rows", "capacity"])
def plan(  # noqa: PLR0917
    indptr: tl.tensor,  # int32 [rows + 1]: where each row's slots start
    firsts: tl.tensor,  # int32 [rows + 1]: written; segments before each row's first
    owners: tl.tensor,  # int32 [capacity]: written; the row of each segment
    rows: tl.tensor,
    capacity: tl.tensor,
    SEGMENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """A program a row: number its segments behind those of the rows before it."""
    row = tl.program_id(0)
    every = tl.arange(0, BLOCK)
    lengths = tl.load(indptr + every + 1, mask=every <= row, other=0) - tl.load(
        indptr + every, mask=every <= row, other=0
    )
    counts = (lengths + SEGMENT - 1) // SEGMENT
    behind = tl.sum(tl.where(every <= row, counts, 0), 0)
    count = tl.sum(tl.where(every == row, counts, 0), 0)
    first = behind - count
    tl.store(firsts + row, first)
    if row == rows - 1:
        tl.store(firsts + rows, behind)
    for i in range(0, count, _OWNERS):
        at = i + tl.arange(0, _OWNERS)
        tl.store(owners + first + at, row, mask=(at < count) & (first + at < capacity))


@triton.jit(do_not_specialize=["rows", "capacity"])
def decode(  # noqa: PLR0917
    q: tl.tensor,  # [rows, heads, head_size]
    k_buffer: tl.tensor,  # [slots, K/V heads, head_size]
    v_buffer: tl.tensor,
    slots: tl.tensor,  # flat
    indptr: tl.tensor,  # int32 [rows + 1]: where each row's slots start
    firsts: tl.tensor,  # int32 [rows + 1]
    owners: tl.tensor,  # int32 [capacity]
    tops: tl.tensor,  # float32 [capacity, heads, 2]: written; top and total
    means: tl.tensor,  # float32 [capacity, heads, head_size]: written
    rows: tl.tensor,
    capacity: tl.tensor,
    scale: tl.float32,
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
) -> None:
    """Programs take turns: a segment of one row in the heads of one group each."""
    groups: tl.constexpr = heads // group
    work = tl.minimum(tl.load(firsts + rows), capacity) * groups
    lanes = tl.arange(0, head_size)
    of_group = tl.arange(0, BLOCK_M)
    real = of_group < group
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        segment, of = item // groups, item % groups
        row = tl.load(owners + segment)
        start = tl.load(indptr + row).to(tl.int64)
        length = (tl.load(indptr + row + 1) - start).to(tl.int32)
        first = (segment - tl.load(firsts + row)) * SEGMENT
        end = tl.minimum(first + SEGMENT, length)
        its_heads = of * group + of_group
        queries = tl.load(
            q + row.to(tl.int64) * stride_q + its_heads[:, None] * head_size + lanes[None, :],
            mask=real[:, None],
            other=0.0,
        )
        positions = tl.full([BLOCK_M], length - 1, tl.int32)
        top = tl.full([BLOCK_M], _NEG_INF, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M, head_size], tl.float32)
        for tile in range(first, end, BLOCK_N):
            top, total, mean = _tile(
                top,
                total,
                mean,
                queries,
                positions,
                tile,
                end,
                slots + start,
                k_buffer + of * head_size,
                v_buffer + of * head_size,
                stride_k,
                stride_v,
                scale,
                head_size,
                BLOCK_N,
            )
        at = (segment * heads + its_heads).to(tl.int64)
        tl.store(tops + at * 2, top, mask=real)
        tl.store(tops + at * 2 + 1, total, mask=real)
        tl.store(means + at[:, None] * head_size + lanes[None, :], mean, mask=real[:, None])


@triton.jit(do_not_specialize=["capacity"])
def add_up(  # noqa: PLR0917
    out: tl.tensor,  # [rows, heads, head_size]
    firsts: tl.tensor,
    tops: tl.tensor,
    means: tl.tensor,
    capacity: tl.tensor,
    stride_o: tl.constexpr,
    heads: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """A program a row and head: its segments, from the first to the last.

    A row whose segments did not all fit into the workspace becomes NaN.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, head_size)
    first, last = tl.load(firsts + row), tl.load(firsts + row + 1)
    target = out + row.to(tl.int64) * stride_o + head * head_size + lanes
    if last > capacity:
        tl.store(target, tl.full([head_size], float("nan"), tl.float32).to(out.dtype.element_ty))
        return
    top = tl.full([], _NEG_INF, tl.float32)
    for i in range(first, last, BLOCK):
        at = ((i + tl.arange(0, BLOCK)) * heads + head).to(tl.int64)
        inside = i + tl.arange(0, BLOCK) < last
        top = tl.maximum(top, tl.max(tl.load(tops + at * 2, mask=inside, other=_NEG_INF), 0))
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([head_size], tl.float32)
    for i in range(first, last, _UNROLLED):
        for j in tl.static_range(_UNROLLED):
            at = ((i + j) * heads + head).to(tl.int64)
            inside = i + j < last
            now = _power_of_two(tl.load(tops + at * 2, mask=inside, other=_NEG_INF) - top)
            total += now * tl.load(tops + at * 2 + 1, mask=inside, other=0.0)
            mean += now * tl.load(means + at * head_size + lanes, mask=inside, other=0.0)
    tl.store(target, (mean / total).to(out.dtype.element_ty))
