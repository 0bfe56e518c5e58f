"""Triton body of `router_margin`: one warp a row finds the edge between chosen and not chosen.

Scores become whole numbers of the same order, since a warp finds the largest whole number in one
instruction. The largest is taken out, with all that equal it, until k + 1 of them are out; counting
tells which was the k-th and which the (k + 1)-th. Groups of experts are chosen so before.

In this order an expert that may not be chosen is below everything. A NaN has no place in it; its
row's margin is NaN whatever comes out.
"""

import torch
import triton
import triton.language as tl

from margingate_kernels.ordered_triton import as_rank, unrank
from margingate_kernels.overlap import (
    launch_options,
    let_the_next_kernel_start,
    wait_for_the_kernel_before,
)

SCORINGS = {"logits": 0, "sigmoid": 1, "softmax": 2}  # what decides; all but the first with a bias

_SIGMOID = tl.constexpr(SCORINGS["sigmoid"])
_SOFTMAX = tl.constexpr(SCORINGS["softmax"])
_ABSENT = tl.constexpr(-(2**31))  # below the rank of -inf
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))


@triton.jit
def _is_nan(x: tl.tensor) -> tl.tensor:
    return x != x  # noqa: PLR0124


@triton.jit
def _most(x: tl.tensor) -> tl.tensor:
    """The largest of a tile, [1, 1]."""
    return tl.max(tl.max(x, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _total(x: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(x, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _scores(
    x: tl.tensor,  # float32 [groups, width], -inf where there is no expert
    bias: tl.tensor,  # float32, as x
    there: tl.tensor,  # bool, as x
    scoring: tl.constexpr,
) -> tl.tensor:
    """What decides. Exponentials and sums are in float64, so that no order of a sum, and no
    library, shows in the float32 that they are rounded to.
    """
    wide = x.to(tl.float64)
    if scoring == _SIGMOID:
        x = (1.0 / (1.0 + tl.exp(-wide))).to(tl.float32) + bias
    elif scoring == _SOFTMAX:
        weight = tl.exp(wide - _most(x).to(tl.float64))
        x = (weight / _total(tl.where(there, weight, 0.0))).to(tl.float32) + bias
    return x


@triton.jit
def _edge(rank: tl.tensor, k: tl.constexpr) -> tl.tuple:
    """The k-th and the (k + 1)-th largest of a tile, [1, 1] each; _ABSENT where there is none."""
    taken = tl.zeros((1, 1), tl.int32)
    last, first_out = tl.full((1, 1), _ABSENT, tl.int32), tl.full((1, 1), _ABSENT, tl.int32)
    for _ in range(k + 1):
        top = _most(rank)
        equal = rank == top
        last = tl.where(taken < k, top, last)
        first_out = tl.where(taken <= k, top, first_out)
        taken += _total(equal.to(tl.int32))
        rank = tl.where(equal, _ABSENT, rank)
    return last, first_out


@triton.jit
def _gap(last: tl.tensor, first_out: tl.tensor) -> tl.tensor:
    """From chosen to not chosen; +inf where nothing was left to choose."""
    gap = unrank(last) - unrank(first_out)
    return tl.where(first_out == _ABSENT, _INF, gap)


@triton.jit
def _least(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """NaN where either is."""
    return tl.where(_is_nan(a) | _is_nan(b), float("nan"), tl.where(a < b, a, b))


@triton.jit
def _group_scores(rank: tl.tensor, scoring: tl.constexpr) -> tl.tensor:
    """What a group stands for, float32 [groups, 1]: its best; biased, the sum of its two best."""
    top = tl.max(rank, axis=1, keep_dims=True)
    if scoring == 0:
        return unrank(top)
    equal = rank == top
    rest = tl.max(tl.where(equal, _ABSENT, rank), axis=1, keep_dims=True)
    alone = tl.sum(equal.to(tl.int32), axis=1, keep_dims=True) == 1
    return unrank(top) + unrank(tl.where(alone, rest, top))


@triton.jit(do_not_specialize=["row_stride", "bias_stride"])
def fold_margins(  # noqa: PLR0917
    logits: tl.tensor,  # [rows, groups * width]
    row_stride: tl.tensor,  # elements
    bias: tl.tensor,  # [rows or 1, groups * width]; not read where `scoring` is "logits"
    bias_stride: tl.tensor,  # elements; 0: one bias for all rows
    out: tl.tensor,  # float32 [rows]
    k: tl.constexpr,
    scoring: tl.constexpr,
    groups: tl.constexpr,
    chosen_groups: tl.constexpr,
    width: tl.constexpr,  # experts of a group
    padded_groups: tl.constexpr,  # powers of two
    padded_width: tl.constexpr,
    reset: tl.constexpr,  # write the margin, instead of the least of it and what is there
    overlap: tl.constexpr,  # what is before may still run
) -> None:
    """One program per row."""
    wait_for_the_kernel_before(overlap)
    let_the_next_kernel_start(overlap)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, padded_groups)[:, None]
    column = tl.arange(0, padded_width)[None, :]
    there = (group < groups) & (column < width)
    expert = group * width + column
    x = tl.load(logits + row * row_stride + expert, mask=there, other=_NEG_INF).to(tl.float32)
    if scoring != 0:
        b = tl.load(bias + row * bias_stride + expert, mask=there, other=0.0).to(tl.float32)
        x = _scores(x, b, there, scoring)
    broken = _total((there & _is_nan(x)).to(tl.int32)) > 0
    rank = tl.where(there, as_rank(x), _ABSENT)

    margin = tl.full((1, 1), _INF, tl.float32)
    if chosen_groups < groups:
        stands_for = _group_scores(rank, scoring)
        is_group = group < groups
        broken |= _total((is_group & _is_nan(stands_for)).to(tl.int32)) > 0
        group_rank = tl.where(is_group, as_rank(stands_for), _ABSENT)
        last, first_out = _edge(group_rank, chosen_groups)
        margin = _gap(last, first_out)
        rank = tl.where(group_rank >= last, rank, _ABSENT)
    last, first_out = _edge(rank, k)
    margin = _least(margin, _gap(last, first_out))
    margin = tl.where(broken, float("nan"), margin)

    one = tl.arange(0, 1)
    place = out + row + one[:, None] + one[None, :]
    if not reset:
        margin = _least(margin, tl.load(place))
    tl.store(place, margin)


def launch(  # noqa: PLR0917
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    k: int,
    scoring: str,
    groups: int,
    chosen_groups: int,
    reset: bool,
) -> None:
    """On checked arguments with at least one row; writes `out`."""
    rows, experts = logits.shape
    width = experts // groups
    per_row = bias is not None and bias.dim() == 2
    with torch.cuda.device_of(logits):
        fold_margins[(rows,)](
            logits,
            logits.stride(0),
            logits if bias is None else bias,
            bias.stride(0) if bias is not None and per_row else 0,
            out,
            k=k,
            scoring=SCORINGS[scoring],
            groups=groups,
            chosen_groups=chosen_groups,
            width=width,
            padded_groups=triton.next_power_of_2(groups),
            padded_width=triton.next_power_of_2(width),
            reset=reset,
            num_warps=1,
            **launch_options(logits.device),
        )
