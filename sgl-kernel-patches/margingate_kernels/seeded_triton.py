"""Triton bodies of `seeded_top2` for rows that keep all tokens: logits are read once.

A program scores the tokens of a part of a row and finds the two best; a second launch finds those
of the row. Which they are does not depend on how a row is cut.
"""

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_NO_COLUMN = tl.constexpr(2**31 - 1)  # loses every tie
_NEG_INF = tl.constexpr(float("-inf"))
_INF = tl.constexpr(float("inf"))


@triton.jit
def _mix(bits: tl.tensor) -> tl.tensor:
    """A bijection of uint64."""
    bits = (bits ^ (bits >> 30)) * tl.full([], _FIRST, tl.uint64)
    bits = (bits ^ (bits >> 27)) * tl.full([], _SECOND, tl.uint64)
    return bits ^ (bits >> 31)


@triton.jit
def _scores(
    logits: tl.tensor,  # float32 [columns]; -inf where none exists
    columns: tl.tensor,  # int32
    key: tl.tensor,  # uint64, of seed and position
    temperature: tl.tensor,  # float64
    masked: tl.constexpr,
) -> tl.tensor:
    """Logits plus noise times the temperature, float64."""
    steps = (columns + 1).to(tl.uint64) * tl.full([], _GOLDEN, tl.uint64)
    bits = _mix(key + steps) >> 11
    uniform = (bits.to(tl.float64) + 0.5) * (2.0**-53)
    noise = -tl.log(-tl.log(uniform))
    return tl.maximum(logits, masked).to(tl.float64) + temperature * noise


@triton.jit(do_not_specialize=["stride"])
def best_of_parts(  # noqa: PLR0917
    logits: tl.tensor,  # [rows, vocab], any floating dtype
    seeds: tl.tensor,  # int64 [rows]
    positions: tl.tensor,  # int64 [rows]
    temperatures: tl.tensor,  # float32 [rows]
    scores: tl.tensor,  # float64 [rows, parts, 2]: written; the best and the second best
    places: tl.tensor,  # int32 [rows, parts, 2]: written; their columns
    invalid: tl.tensor,  # int32 [rows, parts]: written; not 0 where a logit is NaN or +inf
    stride: tl.tensor,  # elements from row to row
    hottest: tl.constexpr,
    masked: tl.constexpr,  # stands for -inf
    vocab: tl.constexpr,
    PART: tl.constexpr,  # noqa: N803 - columns of a program
    BLOCK: tl.constexpr,  # noqa: N803 - and of a turn; PART is a multiple
) -> None:
    """A program a row and part."""
    row, part = tl.program_id(0), tl.program_id(1)
    mixed = _mix(tl.load(seeds + row).to(tl.uint64, bitcast=True))
    turns = tl.load(positions + row).to(tl.uint64, bitcast=True)
    key = _mix(mixed + turns * tl.full([], _GOLDEN, tl.uint64))
    temperature = tl.load(temperatures + row).to(tl.float64)
    temperature = tl.minimum(temperature, tl.full([], hottest, tl.float64))
    at = logits + row.to(tl.int64) * stride
    first = tl.full([BLOCK], _NEG_INF, tl.float64)
    second = tl.full([BLOCK], _NEG_INF, tl.float64)
    first_at = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    second_at = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for begin in range(part * PART, (part + 1) * PART, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        exists = columns < vocab
        x = tl.load(at + columns, mask=exists, other=_NEG_INF).to(tl.float32)
        is_wrong = (x != x) | (x == _INF)  # noqa: PLR0124
        wrong |= is_wrong.to(tl.int32)
        found = _scores(tl.where(is_wrong, _NEG_INF, x), columns, key, temperature, masked)
        found = tl.where(exists, found, _NEG_INF)
        ahead, behind = found > first, found > second
        second = tl.where(ahead, first, tl.where(behind, found, second))
        second_at = tl.where(ahead, first_at, tl.where(behind, columns, second_at))
        first = tl.where(ahead, found, first)
        first_at = tl.where(ahead, columns, first_at)
    best, its_place, next_best, next_place = _best_two(first, first_at, second, second_at)
    to = (row * tl.num_programs(1) + part) * 2
    tl.store(scores + to, best)
    tl.store(scores + to + 1, next_best)
    tl.store(places + to, its_place)
    tl.store(places + to + 1, next_place)
    tl.store(invalid + row * tl.num_programs(1) + part, tl.max(wrong, 0))


@triton.jit
def best_of_rows(  # noqa: PLR0917
    scores: tl.tensor,  # as `best_of_parts`
    places: tl.tensor,
    invalid: tl.tensor,
    ids: tl.tensor,  # int64 [rows]: written
    runner_up: tl.tensor,  # int64 [rows]: written
    margin: tl.tensor,  # float32 [rows]: written
    parts: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803 - at least parts
) -> None:
    """A program a row."""
    row = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    exists = each < parts
    at = (row * parts + each) * 2
    first = tl.load(scores + at, mask=exists, other=_NEG_INF)
    second = tl.load(scores + at + 1, mask=exists, other=_NEG_INF)
    first_at = tl.load(places + at, mask=exists, other=_NO_COLUMN)
    second_at = tl.load(places + at + 1, mask=exists, other=_NO_COLUMN)
    wrong = tl.max(tl.load(invalid + row * parts + each, mask=exists, other=0), 0)
    best, its_place, next_best, next_place = _best_two(first, first_at, second, second_at)
    tl.store(ids + row, its_place.to(tl.int64))
    tl.store(runner_up + row, next_place.to(tl.int64))
    tl.store(margin + row, tl.where(wrong > 0, float("nan"), (best - next_best).to(tl.float32)))


@triton.jit
def _best_two(
    first: tl.tensor, first_at: tl.tensor, second: tl.tensor, second_at: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Of the two best of each lane, with their columns; equal ones go by column."""
    best = tl.max(first, 0)
    its_place = tl.min(tl.where(first == best, first_at, _NO_COLUMN), 0)
    rest = tl.where(first_at == its_place, second, first)
    rest_at = tl.where(first_at == its_place, second_at, first_at)
    next_best = tl.max(rest, 0)
    next_place = tl.min(tl.where(rest == next_best, rest_at, _NO_COLUMN), 0)
    return best, its_place, next_best, next_place
