"""Seeded draws: the token as a function of logits, seed and position, and the draw's margin.

A draw is the argmax of temperature-scaled logits plus Gumbel noise over the tokens that top-k,
top-p and min-p keep (the Gumbel-max trick), which has the distribution of sampling from their
softmax. The noise is a hash of (seed, position, token id), so nothing else decides the token.

The margin says how far the logits are from choosing otherwise, in logits, as for a greedy row: if
no difference between two logits of the row changes by as much, the token stays. It is a lower
bound, and the least of three distances: to another kept token overtaking the winner; to the winner
leaving the kept set; to a token outside entering it and winning.

Kept are, as in SGLang: the `top_k` best; those whose better ones together have a probability of at
most `top_p`; those whose probability is at least `min_p` times the best one's. Equal logits rank by
token id. Probabilities are summed as integers, so that no order of summation can matter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from margingate_kernels import seeded_triton

_UNIT = 1 << 40  # the best token's probability weight, as an integer; 2**22 of them fit an int64
_MASKED = -1e30  # stands for -inf, so that differences stay numbers; its probability is 0
_HOTTEST = 1e24  # temperatures above it are as good as this one, and would reach a masked token
_GOLDEN, _FIRST, _SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


# On a GPU. A draw takes up to 131 bytes a logit while it runs, and a step may have many rows.
ROWS_AT_ONCE = 16
PART, BLOCK = 4096, 512  # columns of a program of rows that keep all tokens, and of its turns


class Draws(NamedTuple):
    """How R rows are drawn; all tensors on the logits' device."""

    seeds: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]; of the row's input token in its sequence
    temperatures: torch.Tensor  # float32 [R], > 0
    top_ks: torch.Tensor  # int32 or int64 [R], >= 1; the vocabulary's size or more keeps all
    top_ps: torch.Tensor  # float32 [R], in (0, 1]
    min_ps: torch.Tensor  # float32 [R], in [0, 1]


class SeededTop2(NamedTuple):
    """Per-row result of `seeded_top2` over R rows."""

    ids: torch.Tensor  # int64 [R]; the token drawn
    runner_up: torch.Tensor  # int64 [R]; the next best kept; where one alone is kept, any other
    margin: torch.Tensor  # float32 [R]; logits, >= 0 or NaN


@torch.no_grad()
def seeded_top2(logits: torch.Tensor, draws: Draws, *, filtered: bool = True) -> SeededTop2:
    """Draw a token for each row.

    A row's bits depend on that row alone: sums are of integers, everything else is elementwise, and
    on the CPU each row is worked on by itself. Allocates; on the CPU it looks at `draws`, and on a
    GPU it does not synchronise. Works on 16 rows at a time there, but where no row filters.

    Args:
        logits: float32, bfloat16 or float16 [R, V], not scaled by the temperature, V >= 2. NaN
            and +inf count as -inf and make the row's margin NaN. Not mutated.
        draws: a seed, position and parameters for each row. Only shapes are checked: a
            temperature of 0, say, gives margins without meaning.
        filtered: False promises that every row keeps all tokens, which saves the sort on a GPU;
            the CPU sees for itself.

    Returns:
        Ids, and a margin in logits, before the division by the temperature: it may be held
        against the threshold of greedy rows.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits has shape {list(logits.shape)}; pass [rows, vocab], vocab >= 2.")
    for name, values in draws._asdict().items():
        if values.shape != logits.shape[:1]:
            raise ValueError(f"draws.{name} has shape {list(values.shape)}; pass [{len(logits)}].")
    if len(logits) == 0:
        return _draw(logits, draws, filtered)
    on_cpu = logits.device.type == "cpu"
    if not on_cpu and not filtered:
        return draw_from_all(logits, draws)
    step = 1 if on_cpu else ROWS_AT_ONCE
    parts = []
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        some = Draws(*(values[rows] for values in draws))
        if on_cpu:  # a copy of its own, so that a row's address cannot matter either
            parts.append(_draw(logits[rows].clone(), some, _filters(some, logits.shape[1])))
        else:
            parts.append(_draw(logits[rows], some, filtered))
    return SeededTop2(*(torch.cat(column) for column in zip(*parts, strict=True)))


def draw_from_all(logits: torch.Tensor, draws: Draws) -> SeededTop2:
    """As `seeded_top2` on a GPU, of rows that keep all tokens; nothing is checked."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    parts = triton.cdiv(vocab, PART)
    new = logits.new_empty
    scores = new((rows, parts, 2), dtype=torch.float64)
    places, invalid = (
        new((rows, parts, 2), dtype=torch.int32),
        new((rows, parts), dtype=torch.int32),
    )
    seeded_triton.best_of_parts[rows, parts](
        logits,
        draws.seeds,
        draws.positions,
        draws.temperatures,
        scores,
        places,
        invalid,
        logits.stride(0),
        _HOTTEST,
        _MASKED,
        vocab,
        PART,
        BLOCK,
    )
    ids, runner_up = new((2, rows), dtype=torch.int64)
    margin = new(rows, dtype=torch.float32)
    seeded_triton.best_of_rows[(rows,)](
        *(scores, places, invalid, ids, runner_up, margin),
        *(parts, triton.next_power_of_2(parts)),
        num_warps=1,
    )
    return SeededTop2(ids, runner_up, margin)


def _filters(draws: Draws, vocab: int) -> bool:
    """Whether any row keeps less than all tokens; waits for the device."""
    some = (draws.top_ks < vocab) | (draws.top_ps < 1) | (draws.min_ps > 0)
    return bool(some.any())


def _draw(logits: torch.Tensor, draws: Draws, filtered: bool) -> SeededTop2:
    temperature = draws.temperatures.double().clamp(max=_HOTTEST).view(-1, 1)
    invalid = logits.isnan() | logits.isposinf()
    values = logits.float().masked_fill(invalid, _MASKED).clamp(min=_MASKED)
    # In logits: scaled by the temperature, so that margins are too.
    score = values.double() + temperature * gumbel(draws.seeds, draws.positions, logits.shape[1])
    if filtered:
        ids, runner_up, margin = _draw_filtered(values, score, draws, temperature)
    else:
        ids, best, runner_up, second = _best_two(score)
        margin = best - second
    margin = margin.masked_fill(invalid.any(-1, keepdim=True), torch.nan)
    return SeededTop2(ids.view(-1), runner_up.view(-1), margin.float().view(-1))


def _best_two(score: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Index and value of each row's best and of its second best; all [R, 1]."""
    first = score.argmax(-1, keepdim=True)
    rest = score.scatter(1, first, -torch.inf)
    second = rest.argmax(-1, keepdim=True)
    return first, score.gather(1, first), second, rest.gather(1, second)


def _draw_filtered(
    values: torch.Tensor, score: torch.Tensor, draws: Draws, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drawn id, runner-up id and margin, [R, 1] each. From here on columns are ranks."""
    values, order = values.sort(dim=-1, descending=True, stable=True)
    values = values.double()
    score = score.gather(1, order)
    mass = _Mass(values, draws, temperature)
    rank = torch.arange(values.shape[1], device=values.device).view(1, -1)
    count = draws.top_ks.long().clamp(max=values.shape[1]).view(-1, 1)
    edge = values[:, :1] + temperature * torch.log(draws.min_ps.double().view(-1, 1))
    by_rank, by_value = rank < count, values >= edge
    kept = by_rank & mass.inside & by_value
    winner, best, second, next_best = _best_two(score.masked_fill(~kept, -torch.inf))
    chosen = values.gather(1, winner)
    leave = torch.minimum(chosen - _first_outside(values, count), chosen - edge)
    leave = torch.minimum(leave, mass.leave(rank, winner))
    last = values.gather(1, count - 1)
    enter = torch.minimum(
        (last - values).masked_fill(by_rank, torch.inf),
        (edge - values).masked_fill(by_value, torch.inf),
    )
    enter = torch.minimum(enter, mass.enter().masked_fill(mass.inside, torch.inf))
    comes = torch.maximum(enter, best - score).masked_fill(kept, torch.inf).amin(-1, keepdim=True)
    margin = torch.minimum(torch.minimum(best - next_best, leave), comes)
    second = torch.where(next_best.isneginf(), (winner == 0).long(), second)
    return order.gather(1, winner), order.gather(1, second), margin


def _first_outside(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The best value outside the first `count` [R, 1] ranks; -inf where all are inside."""
    outside = values.gather(1, count.clamp(max=values.shape[1] - 1))
    return outside.masked_fill(count >= values.shape[1], -torch.inf)


class _Mass:
    """Top-p: what it keeps, and how far the logits are from changing that.

    Changing every difference of two logits by less than d multiplies the odds of a fixed set of
    tokens by a factor between e^-d/T and e^d/T, and lets a token overtake only those less than d
    above it. So for a token to leave (or enter), some set that d lets it have before it must have
    odds that d lifts over (or lowers to) those of p. The distances are the least such d.
    """

    def __init__(self, values: torch.Tensor, draws: Draws, temperature: torch.Tensor) -> None:
        """`values` [R, V] descend; `temperature` [R, 1]."""
        self._values, self._temperature = values, temperature
        self._weight = (torch.exp((values - values[:, :1]) / temperature) * _UNIT).round().long()
        self._total = self._weight.sum(-1, keepdim=True)
        self._before = self._weight.cumsum(-1) - self._weight
        self._off_by = values.shape[1] / 2  # a sum of weights, each rounded to a whole number
        self._limit = draws.top_ps.double().view(-1, 1)
        limit = self._limit * self._total.double()
        self.inside = (self._before.double() <= limit) | (self._limit >= 1)  # [R, V]

    def _above(self, weights: torch.Tensor) -> torch.Tensor:
        """How far at least the odds of sets of these weights are above those of p, in logits."""
        weights = weights.double()
        rest = self._total.double() - weights + self._off_by
        odds = torch.log((weights - self._off_by).clamp(min=0) / rest)
        return self._temperature * (odds - torch.logit(self._limit))

    def _below(self, weights: torch.Tensor) -> torch.Tensor:
        """How far at least the odds of sets of these weights are below those of p, in logits."""
        weights = weights.double()
        rest = (self._total.double() - weights - self._off_by).clamp(min=0)
        odds = torch.log((weights + self._off_by) / rest)
        return self._temperature * (torch.logit(self._limit) - odds)

    def leave(self, rank: torch.Tensor, winner: torch.Tensor) -> torch.Tensor:
        """For the kept token at rank `winner` [R, 1]: [R, 1]."""
        own = self._weight.gather(1, winner)
        others = self._before + self._weight - own  # before it, once it fell behind this rank
        others = torch.where(rank == winner, self._before, others)
        lift = torch.maximum(self._values.gather(1, winner) - self._values, self._below(others))
        return lift.masked_fill(rank < winner, torch.inf).amin(-1, keepdim=True).clamp(min=0)

    def enter(self) -> torch.Tensor:
        """For each token [R, V]; of meaning for those outside."""
        # Overtaking down to rank j costs values[j] - values[i], and lowering the mass before j
        # above[j]; the first falls with j and the second rises, so the best j is where they cross.
        above = self._above(self._before)
        gap = above - self._values  # ascending
        cross = torch.searchsorted(gap, -self._values).clamp(max=gap.shape[1] - 1)
        nearest = [
            torch.maximum(above.gather(1, rank), self._values.gather(1, rank) - self._values)
            for rank in (cross, (cross - 1).clamp(min=0))
        ]
        return torch.minimum(*nearest).clamp(min=0)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise, float64 [R, vocab]; entry v of a row is a hash of (seed, position, v).

    It is in units of logits over the temperature: a draw adds T times it to the logits.

    Args:
        seeds: int64 [R], any value.
        positions: int64 [R], on the same device; of the row's input token in its sequence.
        vocab: columns. A token's noise does not depend on it.

    The hash is two rounds of SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), the
    second over a Weyl sequence by token id; its upper 53 bits, moved off 0 and 1, are the uniform.
    """
    key = _mix(_mix(seeds) + positions * _GOLDEN).view(-1, 1)
    steps = torch.arange(1, vocab + 1, device=seeds.device) * _GOLDEN
    bits = _shift(_mix(key + steps), 11)
    uniform = (bits.double() + 0.5) * math.ldexp(1.0, -53)
    return -torch.log(-torch.log(uniform))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 64 bits; int64 arithmetic wraps."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
