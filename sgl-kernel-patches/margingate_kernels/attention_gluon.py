"""The arithmetic of attention_triton.py in Gluon, operation by operation: the bits are the same.

Products are only begun here: who calls waits for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from margingate_kernels import attention_triton
from margingate_kernels.gluon_rings import TILE, Ring

ROWS = gl.constexpr(64)  # that four warps attend
NEG_INF = gl.constexpr(attention_triton.NEG_INF.value)
_GRID = gl.constexpr(attention_triton._GRID.value)
_ZEROS = gl.constexpr((TILE.value * attention_triton._GRID_BITS.value + 2**31) % 2**32 - 2**31)

power_of_two = gluon.jit(attention_triton.power_of_two.fn)


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
        scores = gl.where(keys[None, :] <= positions[:, None], scores, NEG_INF)
    higher = gl.maximum(top, gl.ceil(gl.max(scores, 1) * scale))
    base = gl.where(higher == NEG_INF, 0.0, higher)
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
    base = gl.where(higher == NEG_INF, 0.0, higher)  # before the first
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
        gl.where(first, NEG_INF, own_top),
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
