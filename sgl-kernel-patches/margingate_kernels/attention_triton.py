"""Triton bodies of `decode_attention` and `extend_attention`: one arithmetic for both.

The keys of a row are cut into segments at multiples of SEGMENT, and each segment into tiles of
BLOCK_N, both counted from position 0. A segment is summed tile by tile from nothing; then the
segments are added up from the first to the last. Decode gives each segment to a program of its own
and adds them up in a second launch; extend does all of it in one loop, but for few rows with many
keys (attention_split_triton.py). What makes all the same is that the maximum which scores are held
against is rounded up to a whole number (scores are in powers of two): rescaling then multiplies by
a power of two, which is exact, so it does not matter when it is done. What is masked is multiplied
in as exactly 1 and added as exactly 0.

A window begins with the tile that holds its first key, in both. Decode starts there; extend starts
at the first tile of its earliest row, and what the other rows do not see leaves their sums as they
were: nothing, held against -inf.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
ONES = tl.constexpr(8)  # equal columns of a row's total: the narrowest product
PAGED, FLAT, TILES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # see `columns_of`
_LOG2_E = tl.constexpr(1.4426950408889634)


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
    v_at: tl.tensor,  # its first lane is the first of V_LANES
    row: tl.tensor,  # TILES: of key 0
    column: tl.tensor,  # TILES: of this K/V head
    v_column: tl.tensor,  # TILES: of the first of V_LANES
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    head_size: tl.constexpr,
    V_LANES: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor]:
    """A tile's keys [head_size, BLOCK_N] and values [BLOCK_N, V_LANES]; 0 where none exist."""
    if KIND == TILES:
        k, v = k_at.load([row + tile, column]).T, v_at.load([row + tile, v_column])
    else:
        lanes = tl.arange(0, head_size)
        v_lanes = tl.arange(0, V_LANES)
        rows = tile + tl.arange(0, BLOCK_N)
        exists = rows < end
        if KIND == PAGED:
            rows = tl.load(slots + rows, mask=exists, other=0) if MASKED else tl.load(slots + rows)
        rows = rows.to(tl.int64)
        k_from = k_at + rows[None, :] * stride_k + lanes[:, None]
        v_from = v_at + rows[:, None] * stride_v + v_lanes[None, :]
        if MASKED:
            k = tl.load(k_from, mask=exists[None, :], other=0.0)
            v = tl.load(v_from, mask=exists[:, None], other=0.0)
        else:
            k, v = tl.load(k_from), tl.load(v_from)
    return k, v


@triton.jit
def capped(scores: tl.tensor, squeeze: tl.tensor) -> tl.tensor:
    """Tanh of scores times `squeeze` / (2 log2 e), within 2**-21; no rounding is left open."""
    powers = tl.exp2(scores * squeeze)
    return 1.0 - tl.div_rn(tl.full(scores.shape, 2.0, tl.float32), powers + 1.0)


@triton.jit
def with_sink(total: tl.tensor, top: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """A row's sum of weights with that of its sink, a score that has no value; after all keys."""
    sinks = tl.full(top.shape, 0.0, tl.float32) + sink.to(tl.float32)
    return total + tl.exp2(tl.fma(sinks, tl.full(top.shape, _LOG2_E, tl.float32), -top))


@triton.jit
def add_tile(  # noqa: PLR0917
    top: tl.tensor,  # float32 [rows]: what the scores so far were held against; whole, or -inf
    total: tl.tensor,  # float32 [rows, ONES]: sum of the weights, in each column
    mean: tl.tensor,  # float32 [rows, V_LANES]: sum of the weighted values
    queries: tl.tensor,  # [rows, head_size]
    positions: tl.tensor,  # int32 [rows]: the last key that each sees
    tile: tl.tensor,  # the first key
    k: tl.tensor,  # [head_size, BLOCK_N]
    v: tl.tensor,  # [BLOCK_N, V_LANES]
    scale: tl.float32,  # above 0
    squeeze: tl.tensor,  # of a cap, else None; see `capped`
    BLOCK_N: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803 - keys before its own that a row sees; None: all
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile of keys to a segment's sums; not MASKED: none of it is after a row."""
    scores = tl.dot(queries, k)
    if squeeze is not None:
        scores = capped(scores, squeeze)
    if WINDOW is not None:
        ages = positions[:, None] - (tile + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.where(ages.to(tl.uint32) <= WINDOW, scores, NEG_INF)  # below 0 it is huge
    elif MASKED:
        keys = tile + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] <= positions[:, None], scores, NEG_INF)
    higher = tl.maximum(top, tl.ceil(tl.max(scores, 1) * scale))
    base = tl.where(higher == NEG_INF, 0.0, higher)
    # The compiler may not choose between one rounding and two: it would differ from loop to loop.
    scales = tl.full(scores.shape, 0.0, tl.float32) + scale
    weights = tl.exp2(tl.fma(scores, scales, tl.broadcast_to(-base[:, None], scores.shape)))
    carry = power_of_two(top - base)
    # The matrix unit sums them as it sums values: in its order, and rounded as for those. The
    # largest weight is rarely 1, so that its rounding would scale all of a row.
    rounded = weights.to(v.dtype)
    ones = tl.full([BLOCK_N, ONES], 1.0, v.dtype)
    total = tl.dot(rounded, ones, total * carry[:, None])
    mean = tl.dot(rounded, v, mean * carry[:, None])
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
    v_column: tl.tensor,
    scale: tl.float32,
    squeeze: tl.tensor,
    stride_k: tl.constexpr,
    stride_v: tl.constexpr,
    head_size: tl.constexpr,
    V_LANES: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A segment's sums, tile by tile from nothing."""
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M, ONES], tl.float32)
    mean = tl.zeros([BLOCK_M, V_LANES], tl.float32)
    # With one tile less in flight two programs fit an SM; FLAT segments are mostly the last ones.
    for tile in tl.range(first, last, BLOCK_N, num_stages=2 if KIND == FLAT else None):
        k, v = columns_of(
            *(tile, end, slots, k_at, v_at, row, column, v_column),
            *(stride_k, stride_v, head_size, V_LANES, BLOCK_N, KIND, MASKED),
        )
        top, total, mean = add_tile(
            *(top, total, mean, queries, positions, tile, k, v, scale, squeeze),
            *(BLOCK_N, WINDOW, MASKED),
        )
    return top, tl.max(total, 1), mean
