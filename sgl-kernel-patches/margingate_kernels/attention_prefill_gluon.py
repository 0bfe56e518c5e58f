"""Gluon body of `extend_attention` for Hopper; its arithmetic is that of attention_triton.py.

A program has two parts that run at once. One brings tiles of keys and values to rings in shared
memory: new keys by the device's own copies of whole tiles; cached ones, and a sequence's last, row
by row and by slot. The other attends 128 rows, 64 a group of four warps: the same rows of two heads
that share keys, or rows of one head. It weighs a tile while the values of the tile before are
multiplied, and rescales the sums while the scores of the next are.

Bits do not depend on any of that: tiles of 64 keys are added to segments and segments to each other
as `add_tile` and `_segment` do it, operation by operation.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from margingate_kernels import attention_triton

ROWS = gl.constexpr(64)  # that a part attends, of the two of a program
WARPS = gl.constexpr(4)  # of a part
TILE = gl.constexpr(64)  # keys
_NEG_INF = gl.constexpr(float("-inf"))
_GRID = gl.constexpr(attention_triton._GRID.value)
_ZEROS = gl.constexpr((64 * attention_triton._GRID_BITS.value + 2**31) % 2**32 - 2**31)

power_of_two = gluon.jit(attention_triton.power_of_two.fn)


@gluon.constexpr_function
def rows_layout(head_size: int, warps: int) -> gl.BlockedLayout:
    """Of rows that are read or written 16 bytes a lane."""
    lanes = head_size // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.aggregate
class Ring:
    """Tiles in shared memory [stages, TILE, head_size], and barriers of each stage."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.jit
    def wait_full(
        self,
        tile: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.wait(self.full.index(tile % STAGES), tile // STAGES & 1)

    @gluon.jit
    def wait_free(
        self,
        tile: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.wait(self.free.index(tile % STAGES), tile // STAGES & 1 ^ 1)

    @gluon.jit
    def release(
        self,
        tile: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.arrive(self.free.index(tile % STAGES), count=1)


@gluon.jit
def ring(
    dtype: gl.constexpr,
    head_size: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
) -> Ring:
    """A ring whose stages are all free."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, head_size], dtype)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, head_size], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both that attend
    return Ring(tiles, full, free)  # type: ignore[call-arg]  # `aggregate` makes the constructor


@gluon.jit
def copy_tile(  # noqa: PLR0917
    ring: Ring,
    descriptor: tma.tensor_descriptor,
    row: gl.tensor,
    column: gl.tensor,
    tile: gl.tensor,
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Let the device copy a tile of new keys or values."""
    ring.wait_free(tile, STAGES)
    full = ring.full.index(tile % STAGES)
    mbarrier.expect(full, descriptor.nbytes_per_cta)
    tma.async_load(descriptor, [row, column], full, ring.tiles.index(tile % STAGES))


@gluon.jit
def gather_tile(
    ring: Ring,
    pointers: gl.tensor,
    exists: gl.tensor,
    tile: gl.tensor,
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Copy a tile's rows from where each of them is; 0 where none exist."""
    ring.wait_free(tile, STAGES)
    full = ring.full.index(tile % STAGES)
    async_copy.async_load(ring.tiles.index(tile % STAGES), pointers, mask=exists[:, None])
    async_copy.mbarrier_arrive(full, increment_count=True)
    mbarrier.arrive(full, count=1)  # after a barrier: all threads count before the phase may end


@gluon.jit
def bring(  # noqa: PLR0917
    keys: Ring,
    values: Ring,
    k_tiles: tma.tensor_descriptor,
    v_tiles: tma.tensor_descriptor,
    k_at: gl.tensor,  # pointer to slot 0 of this K/V head
    v_at: gl.tensor,
    slots: gl.tensor,  # pointer to the slot of key 0
    start: gl.tensor,  # the sequence's first token
    prefix: gl.tensor,
    length: gl.tensor,
    last: gl.tensor,  # tiles from here on are not needed
    column: gl.tensor,  # of this K/V head
    stride_k: gl.constexpr,
    stride_v: gl.constexpr,
    head_size: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Bring all tiles to the rings, as stages become free."""
    layout: gl.constexpr = rows_layout(head_size, gl.num_warps())
    end = prefix + length
    rows = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    lanes = gl.arange(0, head_size, gl.SliceLayout(0, layout))[None, :]
    slot = gl.load(slots + rows, mask=rows < end, other=0)
    for tile in range(last):
        first = tile * TILE
        if first >= prefix and first + TILE <= end:
            copy_tile(keys, k_tiles, start - prefix + first, column, tile, STAGES)
            copy_tile(values, v_tiles, start - prefix + first, column, tile, STAGES)
        else:
            at = slot.to(gl.int64)[:, None]
            exists = first + rows < end
            gather_tile(keys, k_at + at * stride_k + lanes, exists, tile, STAGES)
            gather_tile(values, v_at + at * stride_v + lanes, exists, tile, STAGES)
        ahead = first + TILE + rows
        slot = gl.load(slots + ahead, mask=(ahead < end) & (tile + 1 < last), other=0)


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
def weigh(  # noqa: PLR0917
    scores: gl.tensor,  # float32 [ROWS, TILE]
    top: gl.tensor,  # float32 [ROWS], as `add_tile`
    total: gl.tensor,  # as top
    positions: gl.tensor,  # int32 [ROWS]
    first: gl.tensor,  # key
    scale: gl.tensor,
    layout: gl.constexpr,
    MASKED: gl.constexpr,  # noqa: N803
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """A tile's weights, what the sums so far are multiplied by, and the new top and total."""
    if MASKED:
        keys = first + gl.arange(0, TILE, gl.SliceLayout(0, layout))
        scores = gl.where(keys[None, :] <= positions[:, None], scores, _NEG_INF)
    higher = gl.maximum(top, gl.ceil(gl.max(scores, 1) * scale))
    base = gl.where(higher == _NEG_INF, 0.0, higher)
    scales = gl.full([ROWS, TILE], scale, gl.float32, layout)
    bases, scores = gl.broadcast((-base)[:, None], scores)
    weights = gl.exp2(gl.fma(scores, scales, bases))
    carry = power_of_two(top - base)
    bits = (weights + _GRID).to(gl.int32, bitcast=True)
    total = total * carry + (gl.sum(bits, 1) - _ZEROS).to(gl.float32) * (2.0**-17)
    return weights, carry, higher, total


@gluon.jit
def multiply_keys(
    queries: gl.shared_memory_descriptor,
    keys: Ring,
    tile: gl.tensor,
    layout: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
) -> hopper.warpgroup_mma_accumulator:
    """Start the scores of a tile."""
    k = keys.tiles.index(tile % STAGES).permute((1, 0))
    empty = gl.zeros([ROWS, TILE], gl.float32, layout)
    return warpgroup_mma(queries, k, empty, use_acc=False, is_async=True)


@gluon.jit
def add_segment(  # noqa: PLR0917
    top: gl.tensor,
    total: gl.tensor,
    mean: gl.tensor,
    own_top: gl.tensor,
    own_total: gl.tensor,
    own: gl.tensor,
    row_layout: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Add a segment's sums to those before it."""
    higher = gl.maximum(top, own_top)
    base = gl.where(higher == _NEG_INF, 0.0, higher)  # before the first
    before, now = power_of_two(top - base), power_of_two(own_top - base)
    total = total * before + own_total * now
    before = gl.convert_layout(before, row_layout, assert_trivial=True)
    now = gl.convert_layout(now, row_layout, assert_trivial=True)
    return higher, total, mean * before[:, None] + own * now[:, None]


@gluon.jit
def add_values(  # noqa: PLR0917
    weights: gl.tensor,  # of the tile
    carry: gl.tensor,  # of its segment's sums before it
    own_top: gl.tensor,  # of the segment before, if the tile is a segment's first
    own_total: gl.tensor,
    own: gl.tensor,
    top: gl.tensor,  # of the segments before that one
    total: gl.tensor,
    mean: gl.tensor,
    values: Ring,
    tile: gl.tensor,
    row_layout: gl.constexpr,
    per: gl.constexpr,  # tiles of a segment
    STAGES: gl.constexpr,  # noqa: N803
) -> tuple[hopper.warpgroup_mma_accumulator, gl.tensor, gl.tensor, gl.tensor]:
    """Start to add a tile's weighted values; a segment's first is added to nothing."""
    first = tile % per == 0
    if first:
        top, total, mean = add_segment(top, total, mean, own_top, own_total, own, row_layout)
    else:
        own = own * gl.convert_layout(carry, row_layout, assert_trivial=True)[:, None]
    v = values.tiles.index(tile % STAGES)
    own = warpgroup_mma(weights, v, own, use_acc=tile % per != 0, is_async=True)
    return own, top, total, mean


@gluon.jit
def add_tile(  # noqa: PLR0917
    weights: gl.tensor,  # of the tile before, as its own_top, own_total and carry
    carry: gl.tensor,
    own_top: gl.tensor,
    own_total: gl.tensor,
    before_top: gl.tensor,  # of the tile before that one
    before_total: gl.tensor,
    own: gl.tensor,
    top: gl.tensor,
    total: gl.tensor,
    mean: gl.tensor,
    queries: gl.shared_memory_descriptor,
    keys: Ring,
    values: Ring,
    positions: gl.tensor,
    tile: gl.tensor,
    last: gl.tensor,
    scale: gl.tensor,
    layout: gl.constexpr,
    mean_layout: gl.constexpr,
    per: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
    MASKED: gl.constexpr,  # noqa: N803
) -> tuple[gl.tensor, ...]:
    """Weigh a tile while the values of the tile before are multiplied."""
    row_layout: gl.constexpr = gl.SliceLayout(1, mean_layout)
    scores = multiply_keys(queries, keys, tile, layout, STAGES)
    own, top, total, mean = add_values(
        *(weights, carry, before_top, before_total, own, top, total, mean, values, tile - 1),
        *(row_layout, per, STAGES),
    )
    scores = warpgroup_mma_wait(1, [scores])
    keys.release(tile, STAGES)
    first = tile % per == 0
    weights, carry, next_top, next_total = weigh(
        scores,
        gl.where(first, _NEG_INF, own_top),
        gl.where(first, 0.0, own_total),
        *(positions, tile * TILE, scale, layout, MASKED),
    )
    weights = as_operand(weights, values, mean_layout)
    keys.wait_full(gl.minimum(tile + 1, last - 1), STAGES)
    values.wait_full(tile, STAGES)
    hopper.fence_async_shared()
    own, weights, next_total = warpgroup_mma_wait(0, [own, weights, next_total])
    values.release(tile - 1, STAGES)
    return weights, carry, next_top, next_total, own_top, own_total, own, top, total, mean


@gluon.jit
def as_operand(
    weights: gl.tensor,
    values: Ring,
    mean_layout: gl.constexpr,
) -> gl.tensor:
    """Weights as the left side of their product with values, in the same registers."""
    operand: gl.constexpr = gl.DotOperandLayout(0, mean_layout, 2)
    return gl.convert_layout(weights.to(values.tiles.dtype), operand, assert_trivial=True)


@gluon.jit
def attend(  # noqa: PLR0917
    q: gl.tensor,
    out: gl.tensor,
    place: gl.shared_memory_descriptor,  # shared memory of the queries
    keys: Ring,
    values: Ring,
    start: gl.tensor,
    prefix: gl.tensor,
    length: gl.tensor,
    row: gl.tensor,  # the first
    last: gl.tensor,  # tiles from here on are not needed
    column: gl.tensor,  # of the head
    scale: gl.tensor,
    stride_q: gl.constexpr,
    stride_o: gl.constexpr,
    head_size: gl.constexpr,
    SEGMENT: gl.constexpr,  # noqa: N803
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Attend rows of one head to their keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    mean_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, head_size, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, mean_layout)
    per: gl.constexpr = SEGMENT // TILE
    at, exists = places(start, length, row, column, stride_q, head_size)
    place.store(gl.load(q + at, mask=exists, other=0.0))
    hopper.fence_async_shared()
    gl.barrier()
    positions = prefix + row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    own_top = gl.full([ROWS], _NEG_INF, gl.float32, gl.SliceLayout(1, layout))
    own_total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    own = gl.zeros([ROWS, head_size], gl.float32, mean_layout)
    top, total, mean = own_top, own_total, own
    keys.wait_full(0, STAGES)
    hopper.fence_async_shared()
    scores = warpgroup_mma_wait(0, [multiply_keys(place, keys, 0, layout, STAGES)])
    keys.release(0, STAGES)
    before_top, before_total = own_top, own_total
    weights, carry, own_top, own_total = weigh(
        scores, own_top, own_total, positions, 0, scale, layout, True
    )
    weights = as_operand(weights, values, mean_layout)
    keys.wait_full(gl.minimum(1, last - 1), STAGES)
    values.wait_full(0, STAGES)
    hopper.fence_async_shared()
    whole = gl.minimum((prefix + row + 1) // TILE, last)
    for tile in range(1, whole):
        weights, carry, own_top, own_total, before_top, before_total, own, top, total, mean = (
            add_tile(
                *(weights, carry, own_top, own_total, before_top, before_total, own, top, total),
                *(mean, place, keys, values, positions, tile, last, scale),
                *(layout, mean_layout, per, STAGES, False),
            )
        )
    for tile in range(gl.maximum(whole, 1), last):
        weights, carry, own_top, own_total, before_top, before_total, own, top, total, mean = (
            add_tile(
                *(weights, carry, own_top, own_total, before_top, before_total, own, top, total),
                *(mean, place, keys, values, positions, tile, last, scale),
                *(layout, mean_layout, per, STAGES, True),
            )
        )
    own, top, total, mean = add_values(
        *(weights, carry, before_top, before_total, own, top, total, mean, values, last - 1),
        *(row_layout, per, STAGES),
    )
    own = warpgroup_mma_wait(0, [own])
    top, total, mean = add_segment(top, total, mean, own_top, own_total, own, row_layout)
    total = gl.convert_layout(total, row_layout, assert_trivial=True)
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
    BLOCKS_FIRST: gl.constexpr,  # noqa: N803
) -> None:
    """A program attends two blocks of one request's rows: the same in two heads, or in one."""
    axis: gl.constexpr = 0 if BLOCKS_FIRST else 1
    # The last blocks have most keys: they go first.
    block = gl.num_programs(axis) - 1 - gl.program_id(axis)
    head, sequence = gl.program_id(1 - axis) * HEADS, gl.program_id(2)
    start = gl.load(starts + sequence).to(gl.int32)
    length = gl.load(starts + sequence + 1).to(gl.int32) - start
    rows: gl.constexpr = 2 * ROWS // HEADS
    row = block * rows
    if row >= length:
        return
    prefix = gl.load(prefix_lens + sequence).to(gl.int32)
    slots = page_table + gl.load(table_rows + sequence).to(gl.int64) * table_stride
    of = (head // group) * head_size
    dtype: gl.constexpr = q.dtype.element_ty
    keys, values = ring(dtype, head_size, STAGES), ring(dtype, head_size, STAGES)
    hopper.fence_async_shared()
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, head_size], dtype)
    first = gl.allocate_shared_memory(dtype, [ROWS, head_size], layout)
    second = gl.allocate_shared_memory(dtype, [ROWS, head_size], layout)
    last = gl.cdiv(prefix + gl.minimum(length, row + rows), TILE)
    next_row, next_column = row + rows - ROWS, (head + HEADS - 1) * head_size
    k_at, v_at = k_buffer + of, v_buffer + of
    gl.warp_specialize(
        [
            (
                attend,
                (
                    q,
                    out,
                    first,
                    keys,
                    values,
                    start,
                    prefix,
                    length,
                    row,
                    last,
                    head * head_size,
                    scale,
                    stride_q,
                    stride_o,
                    head_size,
                    SEGMENT,
                    STAGES,
                ),
            ),
            (
                attend,
                (
                    q,
                    out,
                    second,
                    keys,
                    values,
                    start,
                    prefix,
                    length,
                    next_row,
                    last,
                    next_column,
                    scale,
                    stride_q,
                    stride_o,
                    head_size,
                    SEGMENT,
                    STAGES,
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
                    last,
                    of,
                    stride_k,
                    stride_v,
                    head_size,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )
