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

from margingate_kernels.overlap import wait_for_the_kernel_before

NEG_INF = tl.constexpr(float("-inf"))
_GRID = tl.constexpr(96.0)  # float32 from 64 to 128 are multiples of 2**-17
_GRID_BITS = tl.constexpr(0x42C00000)  # of _GRID as a whole number; 1 more is 2**-17 more
PAGED, FLAT, TILES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # see `columns_of`
_PLANNED = tl.constexpr(128)  # segments that `plan` writes at a time
_UNROLLED = tl.constexpr(8)  # segments that `add_up` reads at a time


@triton.jit
def power_of_two(x: tl.tensor) -> tl.tensor:
    """2**x for whole x <= 0, exactly; 0 below -126 and for -inf."""
    exponent = tl.maximum(x, -127.0).to(tl.int32) + 127
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def columns_of(  # noqa: PLR0917
    tile: tl.tensor,  # its first key
    end: tl.tensor,  # keys from here on do not exist
    slots: tl.tensor,  # PAGED: pointer to the slot of key 0
    k_at: tl.tensor,  # pointer to slot 0 (PAGED) or key 0 (FLAT) of this K/V head, or a descriptor
    v_at: tl.tensor,
    row: tl.tensor,  # TILES: of key 0
    column: tl.tensor,  # TILES: of this K/V head
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK_N: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor]:
    """A tile's keys [head_size, BLOCK_N] and values [BLOCK_N, head_size]; 0 where none exist."""
    if KIND == TILES:
        k, v = k_at.load([row + tile, column]).T, v_at.load([row + tile, column])
    else:
        lanes = tl.arange(0, head_size)
        rows = tile + tl.arange(0, BLOCK_N)
        exists = rows < end
        if KIND == PAGED:
            rows = tl.load(slots + rows, mask=exists, other=0) if MASKED else tl.load(slots + rows)
        rows = rows.to(tl.int64)
        k_from = k_at + rows[None, :] * stride_k + lanes[:, None]
        v_from = v_at + rows[:, None] * stride_v + lanes[None, :]
        if MASKED:
            k = tl.load(k_from, mask=exists[None, :], other=0.0)
            v = tl.load(v_from, mask=exists[:, None], other=0.0)
        else:
            k, v = tl.load(k_from), tl.load(v_from)
    return k, v


@triton.jit
def add_tile(  # noqa: PLR0917
    top: tl.tensor,  # float32 [rows]: what the scores so far were held against; whole, or -inf
    total: tl.tensor,  # float32 [rows]: sum of the weights
    mean: tl.tensor,  # float32 [rows, head_size]: sum of the weighted values
    queries: tl.tensor,  # [rows, head_size]
    positions: tl.tensor,  # int32 [rows]: the last key that each sees
    tile: tl.tensor,  # the first key
    k: tl.tensor,  # [head_size, BLOCK_N]
    v: tl.tensor,  # [BLOCK_N, head_size]
    scale: tl.float32,  # above 0
    BLOCK_N: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile of keys to a segment's sums; not MASKED: all rows see all of it."""
    scores = tl.dot(queries, k)
    if MASKED:
        keys = tile + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] <= positions[:, None], scores, NEG_INF)
    higher = tl.maximum(top, tl.ceil(tl.max(scores, 1) * scale))
    base = tl.where(higher == NEG_INF, 0.0, higher)
    # The compiler may not choose between one rounding and two: it would differ from loop to loop.
    scales = tl.full(scores.shape, 0.0, tl.float32) + scale
    weights = tl.exp2(tl.fma(scores, scales, tl.broadcast_to(-base[:, None], scores.shape)))
    carry = power_of_two(top - base)
    # Rounded to multiples of 2**-17, up to 128 weights sum exactly, in any order: as whole numbers,
    # modulo 2**32.
    bits = (weights + _GRID).to(tl.int32, bitcast=True)
    zeros: tl.constexpr = (BLOCK_N * _GRID_BITS + 2**31) % 2**32 - 2**31
    total = total * carry + (tl.sum(bits, 1) - zeros).to(tl.float32) * (2.0**-17)
    mean = tl.dot(weights.to(v.dtype), v, mean * carry[:, None])
    return higher, total, mean


@triton.jit
def sum_tiles(  # noqa: PLR0917
    queries: tl.tensor,  # as `add_tile`
    positions: tl.tensor,
    first: tl.tensor,  # tile
    last: tl.tensor,  # tiles from here on are not summed
    end: tl.tensor,  # as `columns_of`
    slots: tl.tensor,
    k_at: tl.tensor,
    v_at: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    scale: tl.float32,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A segment's sums, tile by tile from nothing."""
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, head_size], tl.float32)
    # With one tile less in flight two programs fit an SM; FLAT segments are mostly the last ones.
    for tile in tl.range(first, last, BLOCK_N, num_stages=2 if KIND == FLAT else None):
        k, v = columns_of(
            *(tile, end, slots, k_at, v_at, row, column),
            *(stride_k, stride_v, head_size, BLOCK_N, KIND, MASKED),
        )
        top, total, mean = add_tile(
            *(top, total, mean, queries, positions, tile, k, v, scale, BLOCK_N, MASKED)
        )
    return top, total, mean


@triton.jit(do_not_specialize=["rows", "capacity"])
def plan(  # noqa: PLR0917
    indptr: tl.tensor,  # int32 [rows + 1]: where each row's slots start
    firsts: tl.tensor,  # int32 [rows + 1]: written; segments before each row's first
    records: tl.tensor,  # int32 [capacity, 4]: written; see `decode`
    rows: tl.tensor,
    capacity: tl.tensor,
    SEGMENT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    overlap: tl.constexpr,
) -> None:
    """A program a row: number its segments behind those of the rows before it."""
    wait_for_the_kernel_before(overlap)
    row = tl.program_id(0)
    every = tl.arange(0, BLOCK)
    starts = tl.load(indptr + every, mask=every <= row, other=0)
    lengths = tl.load(indptr + every + 1, mask=every <= row, other=0) - starts
    counts = (lengths + SEGMENT - 1) // SEGMENT
    behind = tl.sum(tl.where(every <= row, counts, 0), 0)
    start = tl.sum(tl.where(every == row, starts, 0), 0)
    length = tl.sum(tl.where(every == row, lengths, 0), 0)
    count = (length + SEGMENT - 1) // SEGMENT
    first = behind - count
    tl.store(firsts + row, first)
    if row == rows - 1:
        tl.store(firsts + rows, behind)
    for i in range(0, count, _PLANNED):
        at = i + tl.arange(0, _PLANNED)
        fits = (at < count) & (first + at < capacity)
        record = records + (first + at) * 4
        tl.store(record, row, mask=fits)
        tl.store(record + 1, at * SEGMENT, mask=fits)
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
    stride_q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    heads: tl.constexpr,
    group: tl.constexpr,
    head_size: tl.constexpr,
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SEGMENT: tl.constexpr,  # noqa: N803
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
        end = tl.minimum(first + SEGMENT, length)
        top, total, mean = sum_tiles(
            *(queries, positions, first, end, end, slots + start.to(tl.int64)),
            *(k_buffer + of * head_size, v_buffer + of * head_size, 0, 0, scale),
            *(stride_k, stride_v, head_size, BLOCK_M, BLOCK_N, PAGED, True),
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
    sums = _sums(first, last, head, tops, means, heads, head_size)
    top = tl.full([], NEG_INF, tl.float32)
    for j in tl.static_range(_UNROLLED):
        top = tl.maximum(top, sums[j][0])
    for i in range(first + _UNROLLED, last, BLOCK):
        at = ((i + tl.arange(0, BLOCK)) * heads + head).to(tl.int64)
        inside = i + tl.arange(0, BLOCK) < last
        top = tl.maximum(top, tl.max(tl.load(tops + at * 2, mask=inside, other=NEG_INF), 0))
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([head_size], tl.float32)
    for j in tl.static_range(_UNROLLED):
        now = power_of_two(sums[j][0] - top)
        total += now * sums[j][1]
        mean += now * sums[j][2]
    for i in range(first + _UNROLLED, last, _UNROLLED):
        sums = _sums(i, last, head, tops, means, heads, head_size)
        for j in tl.static_range(_UNROLLED):
            now = power_of_two(sums[j][0] - top)
            total += now * sums[j][1]
            mean += now * sums[j][2]
    tl.store(target, (mean / total).to(out.dtype.element_ty))


@triton.jit
def _sums(  # noqa: PLR0917
    first: tl.tensor,
    last: tl.tensor,
    head: tl.tensor,
    tops: tl.tensor,
    means: tl.tensor,
    heads: tl.constexpr,
    head_size: tl.constexpr,
) -> tl.tuple:
    """(top, total, mean) of _UNROLLED segments from `first` on; nothing from `last` on."""
    lanes = tl.arange(0, head_size)
    found: tl.tuple = ()
    for j in tl.static_range(_UNROLLED):
        at = ((first + j) * heads + head).to(tl.int64)
        inside = first + j < last
        top = tl.load(tops + at * 2, mask=inside, other=NEG_INF)
        total = tl.load(tops + at * 2 + 1, mask=inside, other=0.0)
        mean = tl.load(means + at * head_size + lanes, mask=inside, other=0.0)
        found += ((top, total, mean),)
    return found
