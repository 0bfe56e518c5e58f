"""Triton body of `softmax_top2`: every row is split over the vocabulary, then its parts merged.

A part is (m1, i1, m2, i2, s): its two best logits with their ids and the sum of exp(x - m1).
How a row is cut and in which order its parts merge follow from the vocabulary size alone, so
neither the number of rows nor the other rows can change the bits of a row's result.

Infinities need care in s: x - m1 is NaN where both are the same infinity, and NaN in s is how
the body carries a NaN logit. So s is taken against 0 where m1 is infinite.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK = 4096  # columns per load; 16 bytes or more per thread
MAX_SPLITS = 64  # programs per row; the merge holds this many parts in one warp
_ALIGN = 16  # bytes of the widest load

_NO_ID = tl.constexpr(2**31 - 1)  # id of a column that does not exist; loses every tie
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))


class SplitPlan(NamedTuple):
    """How one row is cut."""

    blocks_per_split: int  # blocks of BLOCK columns that one program scans
    splits: int  # programs per row, none of them empty


def split_plan(vocab: int) -> SplitPlan:
    """Cut `vocab` columns into at most MAX_SPLITS runs of whole blocks; of nothing else."""
    blocks = triton.cdiv(vocab, BLOCK)
    per_split = triton.cdiv(blocks, MAX_SPLITS)
    return SplitPlan(per_split, triton.cdiv(blocks, per_split))


@triton.jit
def _is_nan(x: tl.tensor) -> tl.tensor:
    return x != x  # noqa: PLR0124


@triton.jit
def _block_part(x: tl.tensor, ids: tl.tensor) -> tl.tuple:
    """The part of one block: float32 x [BLOCK] with its ids; absent columns are (-inf, _NO_ID)."""
    ranked = tl.where(_is_nan(x), _NEG_INF, x)
    m1 = tl.max(ranked, axis=0)
    i1 = tl.min(tl.where(ranked == m1, ids, _NO_ID), axis=0)
    rest = tl.where(ids == i1, _NEG_INF, ranked)
    m2 = tl.max(rest, axis=0)
    i2 = tl.min(tl.where((rest == m2) & (ids != i1), ids, _NO_ID), axis=0)
    base = tl.where(tl.abs(m1) == _INF, 0.0, m1)
    return m1, i1, m2, i2, tl.sum(tl.exp(x - base), axis=0)


@triton.jit
def _weight(m: tl.tensor, top: tl.tensor) -> tl.tensor:
    """Factor that carries a sum taken against m over to top >= m; never NaN."""
    return tl.where(m == top, 1.0, tl.exp(m - top))


@triton.jit
def _first_of(ma: tl.tensor, ia: tl.tensor, mb: tl.tensor, ib: tl.tensor) -> tl.tuple:
    """Of two logits the one that ranks first."""
    a_first = (ma > mb) | ((ma == mb) & (ia < ib))
    return tl.where(a_first, ma, mb), tl.where(a_first, ia, ib)


@triton.jit
def _merge(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    """The part of two disjoint parts."""
    ma1, ia1, ma2, ia2, sa = a
    mb1, ib1, mb2, ib2, sb = b
    m1, i1 = _first_of(ma1, ia1, mb1, ib1)
    # The second is the better of the loser's best and the winner's second.
    a_won = i1 == ia1
    m2, i2 = _first_of(
        tl.where(a_won, mb1, ma1),
        tl.where(a_won, ib1, ia1),
        tl.where(a_won, ma2, mb2),
        tl.where(a_won, ia2, ib2),
    )
    return m1, i1, m2, i2, sa * _weight(ma1, m1) + sb * _weight(mb1, m1)


# `aligned` replaces Triton's own look at addresses and strides, which could pick another code
# path, and so another order of summation, for the same row at another address.
@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["logits"])
def scan_splits(  # noqa: PLR0917
    logits: tl.tensor,  # [rows, vocab]
    row_stride: tl.tensor,  # elements
    values: tl.tensor,  # float32 [rows, 3, splits]: m1, m2, s
    ids: tl.tensor,  # int32 [rows, 2, splits]: i1, i2
    vocab: tl.constexpr,
    valid_vocab: tl.constexpr,  # columns from here on do not exist
    splits: tl.constexpr,
    blocks_per_split: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,  # every row starts on, and is a multiple of, 16 bytes
) -> None:
    """One program per (row, split): write the part of its run of columns."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    row_ptr = logits + row * row_stride
    if aligned:
        row_ptr = tl.multiple_of(row_ptr, 16)
    part = (_NEG_INF, _NO_ID, _NEG_INF, _NO_ID, 0.0)
    for step in tl.static_range(blocks_per_split):
        columns = (split * blocks_per_split + step) * block + tl.arange(0, block)
        # Masked by the width, a multiple of the vector, and only then by valid_vocab.
        x = tl.load(row_ptr + columns, mask=columns < vocab, other=_NEG_INF).to(tl.float32)
        exists = columns < valid_vocab
        x = tl.where(exists, x, _NEG_INF)
        block_part = _block_part(x, tl.where(exists, columns, _NO_ID))
        part = block_part if step == 0 else _merge(part, block_part)
    m1, i1, m2, i2, s = part
    tl.store(values + (row * 3 + 0) * splits + split, m1)
    tl.store(values + (row * 3 + 1) * splits + split, m2)
    tl.store(values + (row * 3 + 2) * splits + split, s)
    tl.store(ids + (row * 2 + 0) * splits + split, i1)
    tl.store(ids + (row * 2 + 1) * splits + split, i2)


@triton.jit
def merge_splits(  # noqa: PLR0917
    values: tl.tensor,  # float32 [rows, 3, splits]
    ids: tl.tensor,  # int32 [rows, 2, splits]
    out_ids: tl.tensor,  # int64 [rows]
    out_runner_up: tl.tensor,  # int64 [rows]
    out_margin: tl.tensor,  # float32 [rows]
    out_logprob: tl.tensor,  # float32 [rows]
    splits: tl.constexpr,
    lanes: tl.constexpr,  # the power of two >= splits
) -> None:
    """One program per row: merge its parts and write the result."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, lanes)
    here = lane < splits
    value_ptr = values + row * 3 * splits + lane
    id_ptr = ids + row * 2 * splits + lane
    firsts = tl.load(value_ptr, mask=here, other=_NEG_INF)
    seconds = tl.load(value_ptr + splits, mask=here, other=_NEG_INF)
    sums = tl.load(value_ptr + 2 * splits, mask=here, other=0.0)
    first_ids = tl.load(id_ptr, mask=here, other=_NO_ID)
    second_ids = tl.load(id_ptr + splits, mask=here, other=_NO_ID)

    m1 = tl.max(firsts, axis=0)
    i1 = tl.min(tl.where(firsts == m1, first_ids, _NO_ID), axis=0)
    # The winning split offers its second, every other split its first.
    won = first_ids == i1
    rest = tl.where(won, seconds, firsts)
    rest_ids = tl.where(won, second_ids, first_ids)
    m2 = tl.max(rest, axis=0)
    i2 = tl.min(tl.where(rest == m2, rest_ids, _NO_ID), axis=0)
    total = tl.sum(sums * _weight(firsts, m1), axis=0)

    margin = m1 - m2
    margin = tl.where(margin == 0.0, 0.0, margin)  # 0.0 - -0.0 may be -0.0
    margin = tl.where(_is_nan(total), float("nan"), margin)
    logprob = tl.where(tl.abs(m1) == _INF, float("nan"), 0.0 - tl.log(total))
    tl.store(out_ids + row, i1.to(tl.int64))
    tl.store(out_runner_up + row, tl.where(i2 == _NO_ID, -1, i2).to(tl.int64))
    tl.store(out_margin + row, margin)
    tl.store(out_logprob + row, logprob)


def launch(
    logits: torch.Tensor,
    out: tuple[torch.Tensor, ...],
    workspace: tuple[torch.Tensor, ...],
    valid_vocab: int,
) -> None:
    """Both launches, on checked arguments with at least one row; writes `out` and `workspace`."""
    rows, vocab = logits.shape
    plan = split_plan(valid_vocab)
    with torch.cuda.device_of(logits):
        scan_splits[(rows * plan.splits,)](
            logits,
            logits.stride(0),
            *workspace,
            vocab=vocab,
            valid_vocab=valid_vocab,
            splits=plan.splits,
            blocks_per_split=plan.blocks_per_split,
            block=BLOCK,
            aligned=_is_aligned(logits),
            num_warps=8,
        )
        merge_splits[(rows,)](
            *workspace,
            *out,
            splits=plan.splits,
            lanes=triton.next_power_of_2(plan.splits),
            num_warps=1,
        )


def _is_aligned(logits: torch.Tensor) -> bool:
    """Whether each row may be read 16 bytes at a time."""
    size = logits.element_size()
    widths = (logits.shape[1] * size, logits.stride(0) * size, logits.data_ptr())
    return all(width % _ALIGN == 0 for width in widths)
