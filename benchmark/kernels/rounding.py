"""What the rounding in attention costs: the error of whole rows against float64, by arithmetic.

    python -m benchmark.kernels.rounding --out rounding.json

A model of the arithmetic and no kernel: everything is float64 but what an arithmetic rounds, which
is the weights that values are multiplied by, what the gate rounds in their sums, and the result.

- `running maximum`: scores are held against the largest so far, as in FlashAttention; the sum has
  weights as they are.
- `gate`: scores are held against that rounded up to a whole number, in segments; sums have weights
  rounded to the dtype, as values are multiplied by them.
- `gate, unrounded sums`: they have weights rounded to multiples of 2**-17, as they were up to
  arithmetic 4 (`margingate_kernels.attention.ARITHMETIC`).

Errors are norms of the difference over norms of the float64 result: the root of the mean square
and the largest, over all rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from benchmark.bench import engines

ROWS, LANES = 400, 128
TILE, SEGMENT = 128, 256
GRID = 2.0**17
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys; how much larger keys are than queries, so that few of them are attended; added to the
# first key's scores.
CASES = ((300, 1, 0), (2048, 1, 0), (300, 3, 0), (2048, 3, 0), (2048, 8, 0), (2048, 1, 8))
Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # top, total, mean


def nothing(rows: int, lanes: int) -> Sums:
    total = torch.zeros(rows, 1, dtype=torch.float64)
    return total - 1e30, total, torch.zeros(rows, lanes, dtype=torch.float64)


def add(before: Sums, more: Sums) -> Sums:
    top = torch.maximum(before[0], more[0])
    one, two = torch.exp2(before[0] - top), torch.exp2(more[0] - top)
    return top, before[1] * one + more[1] * two, before[2] * one + more[2] * two


def add_tile(sums: Sums, scores: torch.Tensor, values: torch.Tensor, **how: bool) -> Sums:
    """`scores` in powers of two, of one tile; `values` in the dtype that weights are rounded to."""
    highest = scores.max(1, keepdim=True).values
    top = torch.maximum(sums[0], highest.ceil() if how["whole"] else highest)
    weights, carry = torch.exp2(scores - top), torch.exp2(sums[0] - top)
    rounded = weights.to(values.dtype).double()
    summed = rounded if how["rounded"] else weights
    if how["whole"] and not how["rounded"]:
        summed = (summed * GRID).round() / GRID
    total = sums[1] * carry + summed.sum(1, keepdim=True)
    return top, total, sums[2] * carry + rounded @ values.double()


def attend(scores: torch.Tensor, values: torch.Tensor, segment: int, **how: bool) -> torch.Tensor:
    """Rows in float64, before the result is rounded."""
    sums = nothing(len(scores), values.shape[1])
    for i in range(0, len(values), segment):
        own = nothing(len(scores), values.shape[1])
        for j in range(i, min(i + segment, len(values)), TILE):
            tile = slice(j, min(j + TILE, len(values)))
            own = add_tile(own, scores[:, tile], values[tile], **how)
        sums = add(sums, own)
    return sums[2] / sums[1]


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "running maximum": lambda s, v: attend(s, v, len(v), whole=False, rounded=False),
    "gate": lambda s, v: attend(s, v, SEGMENT, whole=True, rounded=True),
    "gate, unrounded sums": lambda s, v: attend(s, v, SEGMENT, whole=True, rounded=False),
}


def errors(keys: int, larger: float, first: float, dtype: torch.dtype) -> dict[str, list[float]]:
    """Root of the mean square and largest, without the result's rounding and with it."""
    generator = torch.Generator().manual_seed(keys)

    def draw(count: int, by: float = 1.0) -> torch.Tensor:
        numbers = torch.randn(count, LANES, generator=generator, dtype=torch.float64)
        return (numbers * by).to(dtype)

    q, k, v = draw(ROWS), draw(keys, larger), draw(keys)
    scores = q.double() @ k.double().T / math.sqrt(LANES) / math.log(2)
    scores[:, 0] += first / math.log(2)
    exact = torch.softmax(scores * math.log(2), 1) @ v.double()
    found = {}
    for name, way in WAYS.items():
        rows = way(scores, v)
        found[name] = []
        for each in (rows, rows.to(dtype).double()):
            off = (each - exact).norm(dim=1) / exact.norm(dim=1)
            found[name] += [off.square().mean().sqrt().item(), off.max().item()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = []
    for name, dtype in DTYPES.items():
        for keys, larger, first in CASES:
            found = errors(keys, larger, first, dtype)
            results.append({"dtype": name, "keys": keys, "larger": larger, "first": first} | found)
            usual, *others = found.values()
            said = [f"{name} {keys} keys x {larger}, the first + {first}: {usual[2]:.5f}, ratios"]
            said += [" ".join(f"{one[i] / usual[i]:.2f}" for i in (0, 2, 3)) for one in others]
            print(" | ".join(said))
    engines.write(args.out, results)


if __name__ == "__main__":
    main()
