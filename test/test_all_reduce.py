"""Sums of tensor-parallel ranks: what is measured of them, and how a class is kept to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from margingate.config import GateError
from margingate.core.rowclass import RowPlan
from margingate.runtime.compat.process import ranks
from margingate.runtime.probe.measuring import classes
from margingate.runtime.probe.planning import all_reduce

WIDTH = 256


class Group:
    """Three ranks in one process: each has the same rows, its columns moved by its number.

    Sums are right up to an order of addition that `order(rows)` chooses: True for another one. With
    `by_place` the second half of the rows is added in the other order, as by NCCL's rings.
    """

    world_size, rank_in_group = 3, 1

    def __init__(self, order=lambda rows: False, by_place: bool = False) -> None:
        self.order, self.by_place = order, by_place
        self.calls: list[int] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        parts = [x.roll(rank - self.rank_in_group, dims=1) for rank in range(self.world_size)]
        one, other = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])
        if self.by_place:
            half = len(x) // 2
            return torch.cat([one[:half], other[half:]])
        return other if self.order(len(x)) else one


RUNNER = SimpleNamespace(
    model_config=SimpleNamespace(hidden_size=WIDTH), dtype=torch.bfloat16, device="cpu"
)


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    monkeypatch.setattr(all_reduce, "_plan", None)
    monkeypatch.setattr(all_reduce, "_width", 0)


def settled(monkeypatch, group, prefill=()) -> list[classes.Finding]:
    monkeypatch.setattr(ranks, "group", lambda: group)
    monkeypatch.setattr(ranks, "of_all", lambda value: [value] * 3)
    return all_reduce.settle(RUNNER, classes.row_counts(64), prefill)


def run(group: Group, rows: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    group.calls.clear()
    result = all_reduce.all_reduce(lambda g, x: g.all_reduce(x), group, rows)
    return result, group.calls


def rows_of(count: int, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, width, generator=generator).to(torch.bfloat16)


def test_one_rank_has_nothing_to_measure(monkeypatch):
    monkeypatch.setattr(ranks, "group", lambda: None)
    assert all_reduce.settle(RUNNER, [1, 2], [600]) == []


def test_sums_in_one_order_need_no_plan(monkeypatch):
    group = Group()
    (found,) = settled(monkeypatch, group, [600, 2100])
    assert found.plan == RowPlan(((1, 64), (600, 600), (2100, 2100))) and found.prefill
    assert found.shape == (3, WIDTH)
    assert set(found.classes.values()) == {0} and max(found.classes) == 2100
    assert run(group, rows_of(5000))[1] == [2100] * 3, "none that was not measured"
    assert run(group, rows_of(590))[1] == [600]


def test_large_sums_run_in_pieces_of_the_class_of_small_ones(monkeypatch):
    """As on four H200s: kernels of SGLang's own up to 16 MB, then NCCL's."""
    group = Group(order=lambda rows: rows > 600)
    (found,) = settled(monkeypatch, group, [599, 600, 700, 1000])
    assert found.plan == RowPlan(((1, 64), (599, 600))) and found.prefill
    rows = rows_of(1700)
    whole, calls = run(group, rows)
    assert calls == [599, 599, 599]
    assert torch.equal(whole, torch.cat([run(group, rows[i : i + 1])[0] for i in range(1700)]))
    assert run(group, rows[:600])[1] == [600]


def test_small_sums_are_padded_where_large_ones_are_the_class(monkeypatch):
    group = Group(order=lambda rows: rows < 4)
    (found,) = settled(monkeypatch, group)
    assert found.plan == RowPlan(((4, 64),)) and not found.prefill
    rows = rows_of(64)
    assert torch.equal(run(group, rows[:1])[0], run(group, rows)[0][:1])
    assert run(group, rows[:1])[1] == [4]


def test_a_sum_that_depends_on_a_rows_place_is_refused(monkeypatch):
    with pytest.raises(GateError, match="all-reduce of --tp-size 3: with 2 rows"):
        settled(monkeypatch, Group(by_place=True))


def test_other_tensors_are_left_alone(monkeypatch):
    group = Group(order=lambda rows: rows > 600)
    settled(monkeypatch, group, [600, 700])
    assert run(group, rows_of(700, WIDTH + 1))[1] == [700]
    alone = SimpleNamespace(world_size=1, all_reduce=lambda x: x, calls=[])
    rows = rows_of(700)
    assert run(alone, rows)[0] is rows


def test_a_class_is_one_only_where_all_ranks_say_so():
    one, other = {1: 0, 2: 0, 3: 1, 4: 1}, {1: 0, 2: 0, 3: 0, 4: 1}
    assert all_reduce.merged([one, one]) == one
    assert all_reduce.merged([one, other]) == {1: 0, 2: 0, 3: 1, 4: 2}


def test_every_rank_is_asked(monkeypatch):
    group = SimpleNamespace(world_size=2, cpu_group="cpu")

    def gather(into: list[Any], value: Any, group: Any) -> None:
        assert group == "cpu"
        into[:] = [value, "theirs"]

    monkeypatch.setattr(ranks, "group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert ranks.of_all("mine") == ["mine", "theirs"]
    monkeypatch.setattr(ranks, "group", lambda: None)
    assert ranks.of_all("mine") == ["mine"]
