"""Gluon body of `extend_attention` for Hopper; its arithmetic is that of attention_triton.py.

A program has three parts that run at once. One brings tiles of keys and values to rings in shared
memory: new keys by the device's own copies of whole tiles; cached ones, and a sequence's last, row
by row and by slot. Two attend 64 rows each: the same rows of two heads that share keys, or rows of
one head. While one weighs a tile, the other may multiply.

Bits do not depend on any of that: tiles of 128 keys are added to segments and segments to each
other as `add_tile` and `_segment` do it, operation by operation.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import tma

from margingate_kernels.attention_gluon import (
    NEG_INF,
    ONES,
    ROWS,
    WARPS,
    add_segment,
    add_tile,
    room_for_ones,
    with_sink,
)
from margingate_kernels.gluon_rings import (
    READERS,
    TILE,
    Ring,
    bring,
    first_tile,
    ring,
    rows_layout,
)


@gluon.jit
def places(  # noqa: PLR0917
    start: gl.tensor,  # the sequence's first token
    length: gl.tensor,
    row: gl.tensor,  # the first
    column: gl.tensor,  # of the head
    stride: gl.constexpr,
    head_size: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Where a head's rows are in a tensor [tokens, heads, head_size]; and if they exist."""
    layout: gl.constexpr = rows_layout(head_size, WARPS)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    lanes = gl.arange(0, head_size, gl.SliceLayout(0, layout))
    tokens = start.to(gl.int64) + rows
    return (tokens * stride + column)[:, None] + lanes[None, :], (rows < length)[:, None]


@gluon.jit
def attend(  # noqa: PLR0917
    q: gl.tensor,
    out: gl.tensor,
    place: gl.shared_memory_descriptor,  # shared memory of the queries
    ones: gl.shared_memory_descriptor,  # as `add_tile`
    keys: Ring,
    values: Ring,
    start: gl.tensor,
    prefix: gl.tensor,
    length: gl.tensor,
    row: gl.tensor,  # the first
    earliest: gl.tensor,  # position of the program's first row
    ends: gl.tensor,  # keys from here on are not needed
    column: gl.tensor,  # of the head
    scale: gl.tensor,
    sink: gl.tensor,  # of the head, with SINKS
    stride_q: gl.constexpr,
    stride_o: gl.constexpr,
    head_size: gl.constexpr,
    SEGMENT: gl.constexpr,  # noqa: N803
    STAGES: gl.constexpr,  # noqa: N803
    WINDOW: gl.constexpr,  # noqa: N803
    SINKS: gl.constexpr,  # noqa: N803
) -> None:
    """Attend rows of one head to their keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, head_size, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    per: gl.constexpr = SEGMENT // TILE
    last = gl.cdiv(ends, TILE)
    half: gl.constexpr = TILE // 2
    at, exists = places(start, length, row, column, stride_q, head_size)
    place.store(gl.load(q + at, mask=exists, other=0.0))
    hopper.fence_async_shared()
    gl.barrier()
    positions = prefix + row + gl.arange(0, ROWS, row_layout)
    own_top = gl.full([ROWS], NEG_INF, gl.float32, row_layout)
    total_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ONES, 16])
    own_total = gl.zeros([ROWS, ONES], gl.float32, total_layout)
    own = gl.zeros([ROWS, head_size], gl.float32, layout)
    top, total, mean = own_top, own_total, own
    # What no row sees of the last tile adds nothing: a half of it may be left out.
    small = ends <= (last - 1) * TILE + half
    entire = last - small.to(gl.int32)
    inside = 0  # the tile from which on each row sees all keys up to its own
    if WINDOW is not None:
        latest = prefix + row + ROWS - 1
        inside = gl.minimum(gl.cdiv(gl.maximum(latest - WINDOW, 0), TILE), entire)
        for tile in range(first_tile(earliest, WINDOW), inside):
            own_top, own_total, own, top, total, mean = add_tile(
                *(own_top, own_total, own, top, total, mean, place, ones, keys, values),
                *(positions, tile, earliest, scale, layout, per, TILE, STAGES, WINDOW, True),
            )
    whole = gl.maximum(gl.minimum((prefix + row + 1) // TILE, entire), inside)
    for tile in range(inside, whole):
        own_top, own_total, own, top, total, mean = add_tile(
            *(own_top, own_total, own, top, total, mean, place, ones, keys, values),
            *(positions, tile, earliest, scale, layout, per, TILE, STAGES, WINDOW, False),
        )
    for tile in range(whole, entire):
        own_top, own_total, own, top, total, mean = add_tile(
            *(own_top, own_total, own, top, total, mean, place, ones, keys, values),
            *(positions, tile, earliest, scale, layout, per, TILE, STAGES, WINDOW, True),
        )
    if small:
        own_top, own_total, own, top, total, mean = add_tile(
            *(own_top, own_total, own, top, total, mean, place, ones, keys, values),
            *(positions, last - 1, earliest, scale, layout, per, half, STAGES, WINDOW, True),
        )
    top, sums, mean = add_segment(top, total, mean, own_top, own_total, own)
    total = gl.convert_layout(gl.max(sums, 1), row_layout, assert_trivial=True)
    if SINKS:
        total = with_sink(total, top, sink, row_layout)
    place.store((mean / total[:, None]).to(out.dtype.element_ty))
    gl.barrier()
    at, exists = places(start, length, row, column, stride_o, head_size)
    gl.store(out + at, place.load(rows_layout(head_size, WARPS)), mask=exists)


@gluon.jit(do_not_specialize=["table_stride"])
def extend(  # noqa: PLR0917
    q: gl.tensor,  # [tokens, heads, head_size]
    out: gl.tensor,  # as q
    k_buffer: gl.tensor,  # [slots, K/V heads, head_size]
    v_buffer: gl.tensor,  # as k_buffer
    k_tiles: tma.tensor_descriptor,  # the new keys [tokens, K/V heads * head_size] as a descriptor
    v_tiles: tma.tensor_descriptor,
    page_table: gl.tensor,  # int32 [requests, positions]: slots
    table_stride: gl.tensor,
    table_rows: gl.tensor,  # int64 [sequences]: rows of the page table
    starts: gl.tensor,  # [sequences + 1]: first token of each in q
    prefix_lens: gl.tensor,  # [sequences]: positions before the first of these tokens
    sinks: gl.tensor,  # [heads], or None
    scale: gl.tensor,  # of the scores times log2(e)
    stride_q: gl.constexpr,  # elements from token to token
    stride_o: gl.constexpr,
    stride_k: gl.constexpr,  # from slot to slot
    stride_v: gl.constexpr,
    group: gl.constexpr,  # heads per K/V head
    head_size: gl.constexpr,
    SEGMENT: gl.constexpr,  # noqa: N803
    HEADS: gl.constexpr,  # noqa: N803 - of a program: 1, or 2 that share keys
    STAGES: gl.constexpr,  # noqa: N803
    WINDOW: gl.constexpr,  # noqa: N803 - keys before its own that a row sees; None: all
) -> None:
    """A program attends two blocks of one request's rows: the same in two heads, or in one."""
    # The last blocks have most keys: they go first, those of all heads.
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    head, sequence = gl.program_id(0) * HEADS, gl.program_id(2)
    start = gl.load(starts + sequence).to(gl.int32)
    length = gl.load(starts + sequence + 1).to(gl.int32) - start
    rows: gl.constexpr = READERS * ROWS // HEADS
    row = block * rows
    if row >= length:
        return
    prefix = gl.load(prefix_lens + sequence).to(gl.int32)
    slots = page_table + gl.load(table_rows + sequence).to(gl.int64) * table_stride
    of = (head // group) * head_size
    dtype: gl.constexpr = q.dtype.element_ty
    keys, values = ring(dtype, head_size, STAGES), ring(dtype, head_size, STAGES)
    ones = room_for_ones(dtype)
    hopper.fence_async_shared()
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, head_size], dtype)
    first = gl.allocate_shared_memory(dtype, [ROWS, head_size], layout)
    second = gl.allocate_shared_memory(dtype, [ROWS, head_size], layout)
    ends = prefix + gl.minimum(length, row + rows)
    next_row, next_head = row + rows - ROWS, head + HEADS - 1
    with_sinks: gl.constexpr = sinks is not None
    sink, next_sink = 0.0, 0.0
    if with_sinks:
        sink = gl.load(sinks + head).to(gl.float32)
        next_sink = gl.load(sinks + next_head).to(gl.float32)
    k_at, v_at = k_buffer + of, v_buffer + of
    gl.warp_specialize(
        [
            (
                attend,
                (
                    q,
                    out,
                    first,
                    ones,
                    keys,
                    values,
                    start,
                    prefix,
                    length,
                    row,
                    prefix + row,
                    ends,
                    head * head_size,
                    scale,
                    sink,
                    stride_q,
                    stride_o,
                    head_size,
                    SEGMENT,
                    STAGES,
                    WINDOW,
                    with_sinks,
                ),
            ),
            (
                attend,
                (
                    q,
                    out,
                    second,
                    ones,
                    keys,
                    values,
                    start,
                    prefix,
                    length,
                    next_row,
                    prefix + row,
                    ends,
                    next_head * head_size,
                    scale,
                    next_sink,
                    stride_q,
                    stride_o,
                    head_size,
                    SEGMENT,
                    STAGES,
                    WINDOW,
                    with_sinks,
                ),
            ),
            (
                bring,
                (
                    keys,
                    values,
                    k_tiles,
                    v_tiles,
                    k_at,
                    v_at,
                    slots,
                    start,
                    prefix,
                    length,
                    prefix + row,
                    gl.cdiv(ends, TILE),
                    of,
                    stride_k,
                    stride_v,
                    head_size,
                    STAGES,
                    WINDOW,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )
