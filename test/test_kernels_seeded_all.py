"""Draws of rows that keep all tokens, as a GPU makes them: those of the operators in torch.

As in test_kernels_attention.py, run as a script it runs the checks on the CPU.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from jit_bodies import checks_in, for_hopper, jit_tests, run_checks

from margingate_kernels import Draws, seeded, seeded_triton
from margingate_kernels.seeded import BLOCK, PART, SeededTop2, draw_from_all

ALL = 1 << 30


def draws_of(rows: int, device: str, temperature: float = 0.8, seed: int = 5) -> Draws:
    columns = (
        torch.arange(rows) * 7919 + seed,
        torch.arange(rows) % 3,
        torch.full((rows,), temperature),
        torch.full((rows,), ALL),
        torch.ones(rows),
        torch.zeros(rows),
    )
    return Draws(*(column.to(device) for column in columns))


def hold_to_torch(logits: torch.Tensor, draws: Draws) -> SeededTop2:
    found, want = draw_from_all(logits, draws), seeded._draw(logits, draws, filtered=False)
    assert torch.equal(found.ids, want.ids)
    assert torch.equal(found.runner_up, want.runner_up)
    assert torch.allclose(found.margin, want.margin, rtol=1e-6, atol=1e-9, equal_nan=True)
    return found


def random(rows: int, vocab: int, device: str, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).to(device)


def check_shapes(device: str) -> None:
    """Vocabularies of less than a part, whole parts, and a bit more."""
    for rows, vocab in ((1, 2), (3, 513), (2, PART), (2, PART + 1), (1, 3 * PART - 1)):
        hold_to_torch(random(rows, vocab, device), draws_of(rows, device))


def check_dtypes_and_strides(device: str) -> None:
    logits = random(4, 1500, device)
    for each in (logits.half(), logits[:, 100:1400], logits[::2], logits[:, ::2], logits.T[:4]):
        hold_to_torch(each, draws_of(len(each), device))


def check_parameters(device: str) -> None:
    """Seeds and positions of all sizes; temperatures that flatten and that sharpen."""
    logits, many = random(4, 900, device), draws_of(4, device)
    seeds = torch.tensor([0, 1, (1 << 63) - 1, -(1 << 63)], device=device)
    positions = torch.tensor([0, (1 << 40), 7, 131_071], device=device)
    for temperature in (1e-4, 1.0, 30.0, 1e9):
        its = torch.full((4,), temperature, device=device)
        hold_to_torch(logits, many._replace(seeds=seeds, positions=positions, temperatures=its))


def check_best_ones_of_one_lane(device: str) -> None:
    """A lane of a program keeps its two best, in whatever order they come."""
    places = torch.tensor([7, 7 + BLOCK, 7 + 2 * BLOCK])
    orders = list(itertools.permutations((30.0, 20.0, 10.0)))
    logits = torch.zeros(len(orders), 3 * BLOCK, device=device)
    logits[:, places.to(device)] = torch.tensor(orders, device=device)
    found = hold_to_torch(logits, draws_of(len(orders), device, temperature=0.01))
    assert found.ids.tolist() == [int(places[order.index(30.0)]) for order in orders]
    assert found.runner_up.tolist() == [int(places[order.index(20.0)]) for order in orders]


def check_what_is_no_number(device: str) -> None:
    """Tokens without a probability are not drawn; a row with NaN or +inf says so."""
    logits = random(5, 700, device)
    logits[0, 1:] = -torch.inf
    logits[1, 50:] = -torch.inf
    logits[2, 9] = torch.nan
    logits[3, 690] = torch.inf
    found = draw_from_all(logits, draws_of(5, device))
    assert found.ids[0] == 0 and found.margin[0] > 1e29
    assert found.ids[1] < 50 and found.runner_up[1] < 50
    assert found.margin.isnan().tolist() == [False, False, True, True, False]
    assert found.ids[2] != 9 and found.ids[3] != 690
    hold_to_torch(logits[1:], draws_of(5, device)._make(c[1:] for c in draws_of(5, device)))


def check_company(device: str) -> None:
    """A row's bits are its own."""
    logits, draws = random(6, 1000, device), draws_of(6, device)
    together = draw_from_all(logits, draws)
    for order in ([5, 0, 3], [2]):
        alone = draw_from_all(logits[order], Draws(*(column[order] for column in draws)))
        for some, every in zip(alone, together):
            assert torch.equal(some, every[order])


CHECKS = checks_in(globals())

interpreted, test_jit_bodies_in_interpreter, test_jit_bodies_on_gpu = jit_tests(CHECKS, __file__)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_jit_bodies_compile_for_hopper(dtype: str) -> None:
    types = {
        "logits": f"*{dtype}",
        **dict.fromkeys(("seeds", "positions", "ids", "runner_up"), "*i64"),
        **dict.fromkeys(("temperatures", "margin"), "*fp32"),
        **dict.fromkeys(("places", "invalid"), "*i32"),
        **{"scores": "*fp64", "stride": "i32"},
    }
    parts = {"hottest": seeded._HOTTEST, "masked": seeded._MASKED, "vocab": 128_256}
    for kernel, constants, warps in (
        (seeded_triton.best_of_parts, {**parts, "PART": PART, "BLOCK": seeded.BLOCK}, 4),
        (seeded_triton.best_of_rows, {"parts": 32, "BLOCK": 32}, 1),
    ):
        its = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        assert for_hopper(kernel, its, dict(constants), warps).asm["ptx"]


if __name__ == "__main__":
    print(json.dumps(run_checks(CHECKS, seeded_triton.best_of_parts)))
