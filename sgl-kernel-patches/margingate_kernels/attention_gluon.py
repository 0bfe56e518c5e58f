"""The arithmetic of attention_triton.py in Gluon, operation by operation: the bits are the same."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from margingate_kernels import attention_triton
from margingate_kernels.gluon_rings import TILE, Ring, first_tile, rows_layout

WARPS = gl.constexpr(4)  # of a part of a program
ROWS = gl.constexpr(64)  # that they attend
NEG_INF = gl.constexpr(attention_triton.NEG_INF.value)
ONES = gl.constexpr(attention_triton.ONES.value)
_LOG2_E = gl.constexpr(attention_triton._LOG2_E.value)

power_of_two = gluon.jit(attention_triton.power_of_two.fn)


@gluon.jit
def room_for_ones(dtype: gl.constexpr) -> gl.shared_memory_descriptor:
    """What weights are summed by: [TILE, ONES] ones, as a product's right side."""
    shape: gl.constexpr = [ONES, TILE]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    room = gl.allocate_shared_memory(dtype, shape, layout)
    room.store(gl.full(shape, 1.0, dtype, rows_layout(TILE, WARPS)))
    return room.permute((1, 0))


@gluon.jit
def weigh(  # noqa: PLR0917
    scores: gl.tensor,  # float32 [ROWS, keys]
    top: gl.tensor,  # float32 [ROWS], as `add_tile`
    positions: gl.tensor,  # int32 [ROWS]
    first: gl.tensor,  # key
    scale: gl.tensor,
    layout: gl.constexpr,
    WINDOW: gl.constexpr,  # noqa: N803
    MASKED: gl.constexpr,  # noqa: N803
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """A tile's weights, what the sums so far are multiplied by, and the new top."""
    count: gl.constexpr = scores.shape[1]
    if MASKED:
        keys = first + gl.arange(0, count, gl.SliceLayout(0, layout))
        if WINDOW is not None:
            ages = (positions[:, None] - keys[None, :]).to(gl.uint32)  # below 0 it is huge
            scores = gl.where(ages <= WINDOW, scores, NEG_INF)
        else:
            scores = gl.where(keys[None, :] <= positions[:, None], scores, NEG_INF)
    higher = gl.maximum(top, gl.ceil(gl.max(scores, 1) * scale))
    base = gl.where(higher == NEG_INF, 0.0, higher)
    scales = gl.full([ROWS, count], scale, gl.float32, layout)
    bases, scores = gl.broadcast((-base)[:, None], scores)
    weights = gl.exp2(gl.fma(scores, scales, bases))
    return weights, power_of_two(top - base), higher


@gluon.jit
def add_segment(  # noqa: PLR0917
    top: gl.tensor,
    total: gl.tensor,
    mean: gl.tensor,
    own_top: gl.tensor,
    own_total: gl.tensor,
    own: gl.tensor,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Add a segment's sums to those before it."""
    higher = gl.maximum(top, own_top)
    base = gl.where(higher == NEG_INF, 0.0, higher)  # before the first
    before, now = power_of_two(top - base), power_of_two(own_top - base)
    rows: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total *= gl.convert_layout(before, rows, assert_trivial=True)[:, None]
    total += own_total * gl.convert_layout(now, rows, assert_trivial=True)[:, None]
    return higher, total, mean * before[:, None] + own * now[:, None]


@gluon.jit
def with_sink(total: gl.tensor, top: gl.tensor, sink: gl.tensor, layout: gl.constexpr) -> gl.tensor:
    """A row's sum of weights with that of its sink, after all keys."""
    sinks = gl.full([ROWS], sink, gl.float32, layout)
    powers = gl.full([ROWS], _LOG2_E, gl.float32, layout)
    return total + gl.exp2(gl.fma(sinks, powers, -top))


@gluon.jit
def add_tile(  # noqa: PLR0917
    own_top: gl.tensor,  # of the tile's segment so far, or of the one before: float32 [ROWS]
    own_total: gl.tensor,  # float32 [ROWS, ONES]
    own: gl.tensor,  # float32 [ROWS, head_size]
    top: gl.tensor,  # of the segments before that
    total: gl.tensor,
    mean: gl.tensor,
    queries: gl.shared_memory_descriptor,
    ones: gl.shared_memory_descriptor,  # [TILE, ONES]
    keys: Ring,
    values: Ring,
    positions: gl.tensor,  # int32 [ROWS]: the last key that each row sees
    tile: gl.tensor,
    earliest: gl.tensor,  # position of the program's first row
    scale: gl.tensor,
    mean_layout: gl.constexpr,
    per: gl.constexpr,  # tiles of a segment
    COUNT: gl.constexpr,  # noqa: N803 - keys of the tile that are needed
    STAGES: gl.constexpr,  # noqa: N803
    WINDOW: gl.constexpr,  # noqa: N803 - keys before its own that a row sees; None: all
    MASKED: gl.constexpr,  # noqa: N803
) -> tuple[gl.tensor, ...]:
    """Add a tile; a segment's first is added to nothing, and the segment before to the others.

    That is done while the tile's scores are made. Within a tile nothing else overlaps: the other
    part of the program has the device meanwhile, and registers do not hold more.
    """
    row_layout: gl.constexpr = gl.SliceLayout(1, mean_layout)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COUNT, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, mean_layout, 2)
    first = first_tile(earliest, WINDOW)
    turn = tile - first
    begins = tile % per == 0
    if WINDOW is not None:
        begins = begins | (tile == first)
    keys.wait_full(turn, STAGES)
    hopper.fence_async_shared()
    k = keys.tiles.index(turn % STAGES).slice(0, COUNT, 0).permute((1, 0))
    empty = gl.zeros([ROWS, COUNT], gl.float32, layout)
    scores = warpgroup_mma(queries, k, empty, use_acc=False, is_async=True)
    if begins & (turn > 0):
        own = warpgroup_mma_wait(1, [own])  # nothing to wait for: it tells the compiler
        top, total, mean = add_segment(top, total, mean, own_top, own_total, own)
    scores = warpgroup_mma_wait(0, [scores])
    keys.release(turn, STAGES)
    weights, carry, own_top = weigh(
        scores,
        gl.convert_layout(gl.where(begins, NEG_INF, own_top), rows, assert_trivial=True),
        gl.convert_layout(positions, rows, assert_trivial=True),
        *(tile * TILE, scale, layout, WINDOW, MASKED),
    )
    own_top = gl.convert_layout(own_top, row_layout, assert_trivial=True)
    weights = gl.convert_layout(weights.to(values.tiles.dtype), operand, assert_trivial=True)
    if begins == 0:
        own *= gl.convert_layout(carry, row_layout, assert_trivial=True)[:, None]
        total_rows: gl.constexpr = gl.SliceLayout(1, own_total.type.layout)
        own_total *= gl.convert_layout(carry, total_rows, assert_trivial=True)[:, None]
    values.wait_full(turn, STAGES)
    hopper.fence_async_shared()
    v, of = values.tiles.index(turn % STAGES).slice(0, COUNT, 0), ones.slice(0, COUNT, 0)
    goes_on = begins == 0
    own_total = warpgroup_mma(weights, of, own_total, use_acc=goes_on, is_async=True)
    own = warpgroup_mma(weights, v, own, use_acc=goes_on, is_async=True)
    own, own_total, weights = warpgroup_mma_wait(0, [own, own_total, weights])
    values.release(turn, STAGES)
    return own_top, own_total, own, top, total, mean
