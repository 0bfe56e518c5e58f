"""Triton body of `softmax_top2`: every row is cut into parts, one warp each, that then merge.

A warp reads its part in groups: the columns that one thread reads at once, 16 bytes where the
address allows. A group stands in the ranking for its largest logit, and groups of equal rank go
by column, so the row's two best columns lie in its two best groups. The scan therefore tracks
groups alone, and the merge reads the two that won once more to rank their columns.

A part is (m1, c1, m2, c2, s): the logits that its two best groups stand for, the first columns
of those groups, and the sum of exp(x - m1). How a row is cut and in which order its parts merge
follow from the vocabulary size, the dtype and the alignment alone, so neither the number of rows
nor the other rows can change the bits of a row's result.

Infinities need care in s: x - m1 is NaN where both are the same infinity, and NaN in s is how
the body carries a NaN logit. So s is taken against 0 where m1 is infinite. In the ranking NaN
counts as -inf: tl.max passes over it, and so does every `>`.
"""

import functools

import torch
import triton
import triton.language as tl

from margingate_kernels.ordered_triton import as_rank, unrank
from margingate_kernels.overlap import (
    launch_options,
    let_the_next_kernel_start,
    wait_for_the_kernel_before,
)
from margingate_kernels.relaunch import Relaunch

LANES = 32  # threads of a warp
COLUMNS_PER_LANE = 32  # of one part; they stay in registers between ranking and summing
PART = LANES * COLUMNS_PER_LANE  # columns
WARPS = 4  # parts per program; a program's registers stay taken until its last warp is done
_WIDEST_LOAD = 16  # bytes
_INT32 = 2**31 - 1  # Triton takes larger whole numbers as 64 bits wide

_LANES = tl.constexpr(LANES)
_NO_COLUMN = tl.constexpr(2**31 - 1)  # loses every tie
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_POINTERS = ["logits", "values", "ids"]
_OUT = ["out_ids", "out_runner_up", "out_margin", "out_logprob"]


def part_count(vocab: int) -> int:
    """Parts of a row of `vocab` columns, as whole programs; the last ones may hold none."""
    return triton.cdiv(vocab, PART * WARPS) * WARPS


@triton.jit
def _is_nan(x: tl.tensor) -> tl.tensor:
    return x != x  # noqa: PLR0124


@triton.jit
def _exp(x: tl.tensor) -> tl.tensor:
    """Unlike tl.exp without the three instructions that keep subnormal results."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _weight(m: tl.tensor, top: tl.tensor) -> tl.tensor:
    """Factor that carries a sum taken against m over to top >= m; never NaN."""
    return tl.where(m == top, 1.0, _exp(m - top))


@triton.jit
def _finite_or_zero(m: tl.tensor) -> tl.tensor:
    return tl.where(tl.abs(m) == _INF, 0.0, m)


@triton.jit
def _load_groups(  # noqa: PLR0917
    row_ptr: tl.tensor,
    starts: tl.tensor,  # int32 [warps, LANES]: first column of each lane's first group
    vocab: tl.constexpr,
    valid_vocab: tl.constexpr,
    group: tl.constexpr,
    steps: tl.constexpr,
    masked: tl.constexpr,  # some columns may not exist; they read as -inf
) -> tl.tuple:
    """All columns of a program: `steps` tiles of float32 [warps, LANES, group]."""
    tiles: tl.tuple = ()
    for step in tl.static_range(steps):
        columns = (starts + step * _LANES * group)[:, :, None] + tl.arange(0, group)[None, None, :]
        if masked:
            # Masked by the width, a multiple of the group, and only then by valid_vocab.
            x = tl.load(
                row_ptr + columns,
                mask=columns < vocab,
                other=_NEG_INF,
                eviction_policy="evict_first",  # read once
            ).to(tl.float32)
            x = tl.where(columns < valid_vocab, x, _NEG_INF)
        else:
            x = tl.load(row_ptr + columns, eviction_policy="evict_first").to(tl.float32)
        tiles += (x,)
    return tiles


@triton.jit
def _best_groups(tiles: tl.tuple, steps: tl.constexpr) -> tl.tuple:
    """Each lane's two best groups: (m1, step1, m2, step2), all [warps, LANES], none NaN.

    A lane meets its groups by ascending column, so a strict `>` leaves ties to the lowest one.
    """
    a = tl.max(tiles[0], axis=2)
    b = tl.max(tiles[1], axis=2)
    a = tl.where(_is_nan(a), _NEG_INF, a)
    b = tl.where(_is_nan(b), _NEG_INF, b)
    m1, step1 = tl.where(b > a, b, a), tl.where(b > a, 1, 0)
    m2, step2 = tl.where(b > a, a, b), tl.where(b > a, 0, 1)
    for step in tl.static_range(2, steps):
        m = tl.max(tiles[step], axis=2)
        first, second = m > m1, m > m2
        m2 = tl.where(first, m1, tl.where(second, m, m2))
        step2 = tl.where(first, step1, tl.where(second, step, step2))
        m1, step1 = tl.where(first, m, m1), tl.where(first, step, step1)
    return m1, step1, m2, step2


@triton.jit
def _two_best(
    m1: tl.tensor, c1: tl.tensor, m2: tl.tensor, c2: tl.tensor, axis: tl.constexpr
) -> tl.tuple:
    """Along an axis, kept: the two best of pairs (m1, c1) that rank before their (m2, c2)."""
    rank1, rank2 = as_rank(m1), as_rank(m2)
    top1 = tl.max(rank1, axis=axis, keep_dims=True)
    at1 = tl.min(tl.where(rank1 == top1, c1, _NO_COLUMN), axis=axis, keep_dims=True)
    # The winner offers its second, every other its first.
    won = c1 == at1
    rank, c = tl.where(won, rank2, rank1), tl.where(won, c2, c1)
    top2 = tl.max(rank, axis=axis, keep_dims=True)
    at2 = tl.min(tl.where(rank == top2, c, _NO_COLUMN), axis=axis, keep_dims=True)
    return unrank(top1), at1, unrank(top2), at2


# `group` replaces Triton's own look at addresses and strides, which could pick another code
# path, and so another order of summation, for the same row at another address.
@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=_POINTERS)
def scan_parts(  # noqa: PLR0917
    logits: tl.tensor,  # [rows, vocab]
    row_stride: tl.tensor,  # elements
    values: tl.tensor,  # float32 [rows, parts, 3]: m1, m2, s
    ids: tl.tensor,  # int32 [rows, parts, 2]: c1, c2
    vocab: tl.constexpr,
    valid_vocab: tl.constexpr,  # columns from here on do not exist
    parts: tl.constexpr,
    group: tl.constexpr,  # columns; above 1, rows start on and are multiples of 16 bytes
    steps: tl.constexpr,  # groups per lane, two or more
    warps: tl.constexpr,
    overlap: tl.constexpr,  # what is before may still run; let merge_parts be launched already
) -> None:
    """One program per row and `warps` of its parts: write them."""
    wait_for_the_kernel_before(overlap)
    let_the_next_kernel_start(overlap)
    row = (tl.program_id(0) // (parts // warps)).to(tl.int64)
    first_part = tl.program_id(0) % (parts // warps) * warps
    row_ptr = logits + row * row_stride
    if group > 1:
        row_ptr = tl.multiple_of(row_ptr, 16)
    # Triton deals threads out from the last axis on: a group to each, a part to each warp.
    lane = tl.arange(0, _LANES)[None, :]
    part = first_part + tl.arange(0, warps)[:, None]
    width: tl.constexpr = steps * _LANES * group  # of a part
    starts = part * width + lane * group
    if (first_part + warps) * width <= valid_vocab:
        tiles = _load_groups(row_ptr, starts, vocab, valid_vocab, group, steps, False)
    else:
        tiles = _load_groups(row_ptr, starts, vocab, valid_vocab, group, steps, True)

    m1, step1, m2, step2 = _best_groups(tiles, steps)
    base = _finite_or_zero(m1)[:, :, None]
    s = tl.zeros_like(m1)
    for step in tl.static_range(steps):
        s += tl.sum(_exp(tiles[step] - base), axis=2)
    c1, c2 = starts + step1 * (_LANES * group), starts + step2 * (_LANES * group)
    top1, at1, top2, at2 = _two_best(m1, c1, m2, c2, 1)
    total = tl.sum(s * _weight(m1, top1), axis=1, keep_dims=True)

    # Each field by a lane of its own, so that no value has to change threads.
    part += row * parts
    value = tl.where(lane == 0, top1, tl.where(lane == 1, top2, total))
    tl.store(values + part * 3 + lane, value, mask=lane < 3)
    tl.store(ids + part * 2 + lane, tl.where(lane == 0, at1, at2), mask=lane < 2)


@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=_POINTERS + _OUT)
def merge_parts(  # noqa: PLR0917
    logits: tl.tensor,  # [rows, vocab]
    row_stride: tl.tensor,  # elements
    values: tl.tensor,  # float32 [rows, parts, 3]: m1, m2, s
    ids: tl.tensor,  # int32 [rows, parts, 2]: c1, c2
    out_ids: tl.tensor,  # int64 [rows]
    out_runner_up: tl.tensor,  # int64 [rows]
    out_margin: tl.tensor,  # float32 [rows]
    out_logprob: tl.tensor,  # float32 [rows]
    valid_vocab: tl.constexpr,
    parts: tl.constexpr,
    padded_parts: tl.constexpr,  # the power of two >= parts
    group: tl.constexpr,
    overlap: tl.constexpr,  # scan_parts may still run
) -> None:
    """One program per row: merge its parts, rank the two groups that won, write the result."""
    let_the_next_kernel_start(overlap)
    wait_for_the_kernel_before(overlap)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, padded_parts)
    here = part < parts
    part += row * parts
    firsts = tl.load(values + part * 3, mask=here, other=_NEG_INF)
    seconds = tl.load(values + part * 3 + 1, mask=here, other=_NEG_INF)
    sums = tl.load(values + part * 3 + 2, mask=here, other=0.0)
    first_columns = tl.load(ids + part * 2, mask=here, other=_NO_COLUMN)
    second_columns = tl.load(ids + part * 2 + 1, mask=here, other=_NO_COLUMN)
    m1, c1, _, c2 = _two_best(firsts, first_columns, seconds, second_columns, 0)
    total = tl.sum(sums * _weight(firsts, m1), axis=0)

    lane = tl.arange(0, _LANES)  # a whole warp's, of which 2 * group have a column
    columns = tl.where(lane < group, c1, c2) + lane % group
    exists = (columns < valid_vocab) & (lane < 2 * group)
    x = tl.load(logits + row * row_stride + columns, mask=exists, other=_NEG_INF).to(tl.float32)
    x = tl.where(_is_nan(x), _NEG_INF, x)
    columns = tl.where(exists, columns, _NO_COLUMN)
    nothing = tl.full((_LANES,), _NEG_INF, tl.float32)
    nowhere = tl.full((_LANES,), _NO_COLUMN, tl.int32)
    m1, i1, m2, i2 = _two_best(x, columns, nothing, nowhere, 0)

    margin = m1 - m2
    margin = tl.where(margin == 0.0, 0.0, margin)  # 0.0 - -0.0 may be -0.0
    margin = tl.where(_is_nan(total), float("nan"), margin)
    logprob = tl.where(tl.abs(m1) == _INF, float("nan"), 0.0 - tl.log(total))
    one = tl.arange(0, 1)
    tl.store(out_ids + row + one, i1.to(tl.int64))
    tl.store(out_runner_up + row + one, tl.where(i2 == _NO_COLUMN, -1, i2).to(tl.int64))
    tl.store(out_margin + row + one, margin)
    tl.store(out_logprob + row + one, logprob)


def launch(
    logits: torch.Tensor,
    out: tuple[torch.Tensor, ...],
    workspace: tuple[torch.Tensor, ...],
    valid_vocab: int,
) -> None:
    """Both launches, on checked arguments with at least one row; writes `out` and `workspace`."""
    (rows, vocab), stride = logits.shape, logits.stride(0)
    form = (logits.device, logits.dtype, vocab, stride > _INT32)
    scan, merge, programs = _launches(*form, valid_vocab, _group(logits))
    with torch.cuda.device_of(logits):
        scan((rows * programs, 1, 1), logits, stride, *workspace)
        merge((rows, 1, 1), logits, stride, *workspace, *out)


@functools.lru_cache(maxsize=256)
def _launches(
    device: torch.device,
    _dtype: torch.dtype,
    vocab: int,
    _is_wide: bool,
    valid_vocab: int,
    group: int,
) -> tuple[Relaunch, Relaunch, int]:
    """The two kernels for logits of this form, and the programs of the first for each row.

    _is_wide: whether the row stride needs 64 bits.
    """
    parts, early = part_count(valid_vocab), launch_options(device)
    every = {"valid_vocab": valid_vocab, "parts": parts}
    steps = {"group": group, "steps": COLUMNS_PER_LANE // group, "warps": WARPS}
    padded = {"padded_parts": triton.next_power_of_2(parts), "group": group}
    last = {"overlap": early.pop("overlap")}
    return (
        Relaunch(scan_parts, {"vocab": vocab, **every, **steps, **last}, num_warps=WARPS, **early),
        Relaunch(merge_parts, {**every, **padded, **last}, num_warps=1, **early),
        parts // WARPS,
    )


def _group(logits: torch.Tensor) -> int:
    """Columns that one thread may read at once, in every row."""
    size = logits.element_size()
    widths = (logits.shape[1] * size, logits.stride(0) * size, logits.data_ptr())
    return 1 if any(width % _WIDEST_LOAD for width in widths) else _WIDEST_LOAD // size
