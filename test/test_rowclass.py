"""Row classes: which row counts an operator may be called with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from margingate.config import GateError
from margingate.core.rowclass import RowPlan, Times, choose, runs, timed_counts
from margingate.runtime import invariance, probe, probe_plans


@given(st.integers(1, 64), st.integers(0, 64), st.integers(1, 700))
def test_pieces_cover_every_row_once_and_none_is_too_long(low, more, rows):
    plan = RowPlan(low, low + more)
    pieces = plan.pieces(rows)
    assert [row for start, stop in pieces for row in range(start, stop)] == list(range(rows))
    assert all(0 < stop - start <= plan.high for start, stop in pieces)
    lengths = {stop - start for start, stop in pieces}
    assert max(lengths) - min(lengths) <= 1


def test_the_class_that_leaves_most_counts_alone_is_chosen():
    assert choose({1: 0, 8: 0, 64: 0}) is None
    assert choose({1: 0, 8: 0, 16: 0, 24: 1, 32: 1}) == RowPlan(1, 16)
    assert choose({1: 0, 8: 1, 16: 1, 24: 1, 32: 0}) == RowPlan(8, 24)
    assert runs({1: 0, 2: 0, 3: 1, 4: 0}) == [([1, 2], 0), ([3], 1), ([4], 0)]
    with pytest.raises(ValueError, match="from 3 to 2"):
        RowPlan(3, 2)


CLASSES = {1: 0, 8: 0, 16: 0, 32: 0, 64: 0, 128: 1, 192: 1, 256: 1}
FLAT = dict.fromkeys(timed_counts(CLASSES), 30.0)


def test_a_plan_that_is_clearly_faster_is_taken_instead():
    assert choose(CLASSES) == RowPlan(1, 64)
    # A call in pieces takes twice the time; padding costs little.
    assert choose(CLASSES, Times(FLAT, None)) == RowPlan(128, 256)
    slow_when_padded = {count: 10.0 if count <= 64 else 100.0 for count in FLAT}
    assert choose(CLASSES, Times(slow_when_padded, None)) == RowPlan(1, 64)


def test_the_invariant_kernel_is_taken_where_it_is_clearly_faster():
    as_fast = {count: 1.01 * us for count, us in FLAT.items()}
    assert choose(CLASSES, Times(FLAT, as_fast)) == RowPlan(1, 256, own_kernel=True)
    slower = {count: 3 * us for count, us in FLAT.items()}
    assert choose(CLASSES, Times(FLAT, slower)) == RowPlan(128, 256)
    assert choose(dict.fromkeys(CLASSES, 0), Times(FLAT, as_fast)) is None
    assert not RowPlan(1, 256, own_kernel=True).holds(8)


WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).bfloat16()


def split_by_count(x: torch.Tensor) -> torch.Tensor:
    """Reduces in two halves from 9 rows on, as a GEMM might."""
    if x.shape[0] <= 8:
        return x @ WEIGHT.T
    return x[:, :20] @ WEIGHT[:, :20].T + x[:, 20:] @ WEIGHT[:, 20:].T


def leaky(x: torch.Tensor) -> torch.Tensor:
    """A row's result depends on its neighbours, through the largest value of the whole call."""
    return x @ WEIGHT.T + x.abs().max() / 8


def test_the_probe_separates_the_classes():
    classes = probe.probe_operator(split_by_count, 40, probe.row_counts(32), WEIGHT)
    assert {count for count, key in classes.items() if key == 0} == set(range(1, 9))
    assert choose(classes).high in (8, 32)


def test_the_probe_says_no_to_a_row_that_depends_on_its_neighbours():
    with pytest.raises(probe.RowDependenceError) as caught:
        probe.probe_operator(leaky, 40, probe.row_counts(16), WEIGHT)
    assert caught.value.rows > 1


class Broken(torch.nn.Module):
    """A model whose only linear layer leaks between rows."""

    def __init__(self) -> None:
        super().__init__()
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        class Leaky(UnquantizedLinearMethod):
            def apply(self, layer, x, bias=None):
                return leaky(x)

        self.down_proj = torch.nn.Module()
        self.down_proj.weight = torch.nn.Parameter(WEIGHT, requires_grad=False)
        self.down_proj.quant_method = Leaky()


def test_a_model_with_such_a_layer_is_refused_by_name():
    with pytest.raises(GateError, match=r"cannot use down_proj: with \d+ rows"):
        probe_plans.probe_groups(probe.groups(Broken()), 16)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 40])
def test_pieces_and_padding_keep_the_bits(rows):
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    one_by_one = torch.cat([split_by_count(row[None]) for row in x])
    assert torch.equal(invariance._in_class(RowPlan(1, 8), x, split_by_count), one_by_one)
    nine = torch.cat([split_by_count(row.expand(9, -1))[:1] for row in x])
    assert torch.equal(invariance._in_class(RowPlan(9, 64), x, split_by_count), nine)
