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
def held(  # noqa: PLR0917
    scores: gl.tensor,  # float32 [ROWS, keys]
    top: gl.tensor,  # float32 [ROWS], as `add_tile`
    positions: gl.tensor,  # int32 [ROWS]
    first: gl.tensor,  # key
    scale: gl.tensor,
    layout: gl.constexpr,
    WINDOW: gl.constexpr,  # noqa: N803
    MASKED: gl.constexpr,  # noqa: N803
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """A tile's scores, masked; what they are held against; what the sums so far are multiplied by;
    the new top."""
    if MASKED:
        keys = first + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
        if WINDOW is not None:
            ages = (positions[:, None] - keys[None, :]).to(gl.uint32)  # below 0 it is huge
            scores = gl.where(ages <= WINDOW, scores, NEG_INF)
        else:
            scores = gl.where(keys[None, :] <= positions[:, None], scores, NEG_INF)
    higher = gl.maximum(top, gl.ceil(gl.max(scores, 1) * scale))
    base = gl.where(higher == NEG_INF, 0.0, higher)
    return scores, base, power_of_two(top - base), higher


@gluon.jit
def halves_of(scores: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """Scores of a tile's first and last keys; no register moves."""
    half: gl.constexpr = scores.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, half, 16])
    one, other = scores.reshape([ROWS, 2, half]).permute((0, 2, 1)).split()
    one = gl.convert_layout(one, layout, assert_trivial=True)
    return one, gl.convert_layout(other, layout, assert_trivial=True)


@gluon.jit
def weights_of(
    scores: gl.tensor,
    base: gl.tensor,  # what they are held against, in any layout of rows
    scale: gl.tensor,
    operand: gl.constexpr,
    dtype: gl.constexpr,
) -> gl.tensor:
    """Rounded, and as the left side of a product."""
    layout: gl.constexpr = scores.type.layout
    scales = gl.full(scores.shape, scale, gl.float32, layout)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    bases = -gl.convert_layout(base, rows, assert_trivial=True)
    bases, scores = gl.broadcast(bases[:, None], scores)
    weights = gl.exp2(gl.fma(scores, scales, bases)).to(dtype)
    return gl.convert_layout(weights, operand, assert_trivial=True)


@gluon.jit
def by_rows(sums: gl.tensor, factors: gl.tensor) -> gl.tensor:
    """Sums multiplied by a factor a row, in any layout of rows."""
    rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    return sums * gl.convert_layout(factors, rows, assert_trivial=True)[:, None]


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
    total = by_rows(total, before) + by_rows(own_total, now)
    return higher, total, by_rows(mean, before) + by_rows(own, now)


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

    That is done while the tile's scores are made. The values of its first keys are multiplied while
    the last ones are weighed. More does not overlap within a tile: the other part of the program
    has the device meanwhile, and registers do not hold more.
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
    scores, base, carry, own_top = held(
        scores,
        gl.convert_layout(gl.where(begins, NEG_INF, own_top), rows, assert_trivial=True),
        gl.convert_layout(positions, rows, assert_trivial=True),
        *(tile * TILE, scale, layout, WINDOW, MASKED),
    )
    own_top = gl.convert_layout(own_top, row_layout, assert_trivial=True)
    early, late = halves_of(scores)
    early = weights_of(early, base, scale, operand, values.tiles.dtype)
    goes_on = begins == 0
    if goes_on:
        own, own_total = by_rows(own, carry), by_rows(own_total, carry)
    values.wait_full(turn, STAGES)
    hopper.fence_async_shared()
    half: gl.constexpr = COUNT // 2
    v, of = values.tiles.index(turn % STAGES), ones.slice(0, half, 0)
    own = warpgroup_mma(early, v.slice(0, half, 0), own, use_acc=goes_on, is_async=True)
    own_total = warpgroup_mma(early, of, own_total, use_acc=goes_on, is_async=True)
    late = weights_of(late, base, scale, operand, values.tiles.dtype)
    own = warpgroup_mma(late, v.slice(half, half, 0), own, is_async=True)
    own_total = warpgroup_mma(late, of, own_total, is_async=True)
    own, own_total, early, late = warpgroup_mma_wait(0, [own, own_total, early, late])
    values.release(turn, STAGES)
    return own_top, own_total, own, top, total, mean
