"""Rings of tiles of keys and values in Hopper's shared memory, in Gluon, and who fills them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

TILE = gl.constexpr(128)  # keys
GATHERED = gl.constexpr(32)  # rows at a time
READERS = gl.constexpr(2)  # parts of a program that use each tile


@gluon.constexpr_function
def rows_layout(head_size: int, warps: int) -> gl.BlockedLayout:
    """Of rows that are read or written 16 bytes a lane."""
    lanes = head_size // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def first_tile(
    position: gl.tensor,
    WINDOW: gl.constexpr,  # noqa: N803
) -> gl.tensor:
    """The first tile of which a row at this position sees a key."""
    first = 0
    if WINDOW is not None:
        first = gl.maximum(position - WINDOW, 0) // TILE
    return first


@gluon.aggregate
class Ring:
    """Tiles in shared memory [stages, TILE, head_size], and barriers of each stage.

    A turn is a tile's number among those that are brought, from 0.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.jit
    def wait_full(
        self,
        turn: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.wait(self.full.index(turn % STAGES), turn // STAGES & 1)

    @gluon.jit
    def wait_free(
        self,
        turn: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.wait(self.free.index(turn % STAGES), turn // STAGES & 1 ^ 1)

    @gluon.jit
    def release(
        self,
        turn: gl.tensor,
        STAGES: gl.constexpr,  # noqa: N803
    ) -> None:
        mbarrier.arrive(self.free.index(turn % STAGES), count=1)


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
        mbarrier.init(free.index(stage), count=READERS)
    return Ring(tiles, full, free)  # type: ignore[call-arg]  # `aggregate` makes the constructor


@gluon.jit
def copy_tile(  # noqa: PLR0917
    ring: Ring,
    descriptor: tma.tensor_descriptor,
    row: gl.tensor,
    column: gl.tensor,
    turn: gl.tensor,
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Let the device copy a tile of new keys or values."""
    ring.wait_free(turn, STAGES)
    full = ring.full.index(turn % STAGES)
    mbarrier.expect(full, descriptor.nbytes_per_cta)
    tma.async_load(descriptor, [row, column], full, ring.tiles.index(turn % STAGES))


@gluon.jit
def slots_of(
    slots: gl.tensor, first: gl.tensor, end: gl.tensor, head_size: gl.constexpr
) -> gl.tuple:
    """Slots of a tile's keys, GATHERED in a tensor; 0 from `end` on."""
    rows = gl.arange(0, GATHERED, gl.SliceLayout(1, rows_layout(head_size, gl.num_warps())))
    found: gl.tuple = ()
    for i in gl.static_range(TILE // GATHERED):
        at = first + i * GATHERED + rows
        found += (gl.load(slots + at, mask=at < end, other=0),)
    return found


@gluon.jit
def gather_tile(  # noqa: PLR0917
    ring: Ring,
    pool: gl.tensor,
    slots: gl.tuple,
    first: gl.tensor,
    end: gl.tensor,
    turn: gl.tensor,
    stride: gl.constexpr,
    head_size: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
) -> None:
    """Copy a tile's rows from where each of them is; 0 where none exist."""
    layout: gl.constexpr = rows_layout(head_size, gl.num_warps())
    rows = first + gl.arange(0, GATHERED, gl.SliceLayout(1, layout))
    lanes = gl.arange(0, head_size, gl.SliceLayout(0, layout))[None, :]
    ring.wait_free(turn, STAGES)
    full = ring.full.index(turn % STAGES)
    into = ring.tiles.index(turn % STAGES)
    for i in gl.static_range(TILE // GATHERED):
        at = pool + slots[i].to(gl.int64)[:, None] * stride + lanes
        exists = rows + i * GATHERED < end
        async_copy.async_load(into.slice(i * GATHERED, GATHERED, 0), at, mask=exists[:, None])
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
    earliest: gl.tensor,  # position of a row
    last: gl.tensor,  # tiles from here on are not needed
    column: gl.tensor,  # of this K/V head
    stride_k: gl.constexpr,
    stride_v: gl.constexpr,
    head_size: gl.constexpr,
    STAGES: gl.constexpr,  # noqa: N803
    WINDOW: gl.constexpr,  # noqa: N803
) -> None:
    """Bring all tiles to the rings, as stages become free."""
    end = prefix + length
    begin = first_tile(earliest, WINDOW)
    slot = slots_of(slots, begin * TILE, end, head_size)
    for tile in range(begin, last):
        first, turn = tile * TILE, tile - begin
        if first >= prefix and first + TILE <= end:
            copy_tile(keys, k_tiles, start - prefix + first, column, turn, STAGES)
            copy_tile(values, v_tiles, start - prefix + first, column, turn, STAGES)
        else:
            gather_tile(keys, k_at, slot, first, end, turn, stride_k, head_size, STAGES)
            gather_tile(values, v_at, slot, first, end, turn, stride_v, head_size, STAGES)
        ahead = first + TILE
        gathered = (ahead < prefix) | (ahead + TILE > end)
        slot = slots_of(slots, ahead, end * gathered.to(gl.int32), head_size)
