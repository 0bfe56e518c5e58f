"""Seeded draws: a function of their own row, the right distribution, an honest margin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

from margingate_kernels import Draws, gumbel, seeded, seeded_top2

ALL = 1 << 30
FILTERS = [
    (1.0, ALL, 1.0, 0.0),
    (0.8, ALL, 0.95, 0.0),
    (1.3, 7, 1.0, 0.0),
    (0.7, ALL, 1.0, 0.08),
    (1.1, 9, 0.9, 0.03),
]


def make_draws(rows: int, temperature=1.0, top_k=ALL, top_p=1.0, min_p=0.0, seed=0) -> Draws:
    return Draws(
        torch.full((rows,), seed),
        torch.arange(rows),
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )


@pytest.mark.parametrize("setting", FILTERS)
def test_a_row_is_drawn_alike_alone_and_in_company(setting):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 4099, generator=generator) * 3
    draws = make_draws(9, *setting)
    together = seeded_top2(logits, draws)
    for order in (torch.arange(8, -1, -1), torch.tensor([4]), torch.tensor([7, 2, 7])):
        picked = seeded_top2(logits[order], Draws(*(column[order] for column in draws)))
        for some, every in zip(picked, together):
            assert torch.equal(some, every[order])


@pytest.mark.parametrize("setting", FILTERS)
def test_the_whole_batch_at_once_draws_what_its_rows_draw(setting):
    """What a GPU does; here on the CPU, where the wrapper works row by row."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(2)) * 3
    draws = make_draws(6, *setting)
    by_row = seeded_top2(logits, draws)
    at_once = seeded._draw(logits, draws, filtered=True)
    assert torch.equal(by_row.ids, at_once.ids)
    assert torch.equal(by_row.runner_up, at_once.runner_up)
    assert torch.equal(by_row.margin, at_once.margin)


@pytest.mark.parametrize("setting", FILTERS)
def test_the_distribution_is_sglangs(setting):
    """Chi-square of 20,000 draws against SGLang's own sampler on a vocabulary of 16."""
    temperature, top_k, top_p, min_p = setting
    draws = 20_000
    logits = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 1.5
    rows = logits.expand(draws, 16)
    drawn = seeded._draw(rows, make_draws(draws, *setting), filtered=True)  # all rows at once
    ours = torch.bincount(drawn.ids, minlength=16)
    torch.manual_seed(4)
    theirs = top_k_top_p_min_p_sampling_from_probs_torch(
        torch.softmax(rows / temperature, -1),
        torch.full((draws,), top_k),
        torch.full((draws,), top_p),
        torch.full((draws,), min_p),
        min_p > 0,
        None,
        torch.zeros(draws),
    )
    theirs = torch.bincount(theirs, minlength=16)
    assert torch.equal(ours > 0, theirs > 0), "the kept sets differ"
    table = torch.stack([ours, theirs])[:, (ours + theirs) > 0]
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.001


def test_the_noise_is_standard_gumbel_and_differs_by_seed_position_and_token():
    noise = gumbel(torch.arange(50), torch.zeros(50, dtype=torch.int64), 2000)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.001
    again = gumbel(torch.zeros(50, dtype=torch.int64), torch.arange(50), 2000)
    for values in (noise, again):
        assert len(values.unique()) == values.numel()
    correlation = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))
    assert abs(correlation[0, 1]) < 5 / math.sqrt(noise.numel())
    edges = torch.tensor([0, (1 << 63) - 1])
    assert gumbel(edges, edges, 10).isfinite().all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-60, 60).map(lambda tenths: tenths / 10), min_size=2, max_size=24),
    st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    st.one_of(st.just(ALL), st.integers(2, 20)),
    st.one_of(st.just(1.0), st.floats(0.2, 0.99)),
    st.one_of(st.just(0.0), st.floats(0.001, 0.5)),
    st.integers(0, 1 << 40),
)
@example([-3.8, 5.7, 5.7], 0.7, ALL, 0.5, 0.0, 0)  # two share all of p; a change rounds up
@example([-2.6, 6.0], 0.3, ALL, 0.75, 0.0, 0)  # a probability too small for its whole number
def test_no_change_smaller_than_the_margin_changes_the_token(
    values, temperature, top_k, top_p, min_p, seed
):
    logits = torch.tensor([values])
    one = make_draws(1, temperature, top_k, top_p, min_p, seed)
    drawn = seeded_top2(logits, one)
    margin = min(drawn.margin.item(), 20.0)
    assert margin >= 0
    generator = torch.Generator().manual_seed(seed)
    tries = 64
    change = torch.rand(tries, len(values), generator=generator).round(decimals=0)
    change[: tries // 2] = torch.rand(tries // 2, len(values), generator=generator)
    changed = logits + change * margin * 0.999
    moved = changed.double() - logits.double()  # next to a tiny margin, float32 rounds up a lot
    changed = changed[moved.amax(-1) - moved.amin(-1) < margin]  # no difference changes by it
    tries = len(changed)
    many = Draws(*(column.expand(tries) for column in one))
    again = seeded._draw(changed, many, filtered=True)
    assert (again.ids == drawn.ids).all()


def test_the_margin_is_not_idle():
    """Near the boundary of the kept set it is small, though the winner leads by far."""
    logits = torch.tensor([[5.0, 1.0, 1.0 - 1e-4, -3.0]])
    tight = [
        seeded_top2(logits, make_draws(1, 1.0, 2, seed=seed)).margin.item() for seed in range(400)
    ]
    free = [seeded_top2(logits, make_draws(1, seed=seed)).margin.item() for seed in range(400)]
    assert min(tight) < 2e-4 < min(free)


def test_one_kept_token_wins_and_has_a_runner_up():
    logits = torch.tensor([[0.0, 9.0, 3.0]])
    drawn = seeded_top2(logits, make_draws(1, top_k=ALL, top_p=0.5))
    assert drawn.ids.tolist() == [1] and drawn.runner_up.item() != 1
    assert 0 < drawn.margin.item() < math.inf


def test_masked_and_broken_logits():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0], [torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0]])
    drawn = seeded_top2(logits, make_draws(3))
    assert 0 not in drawn.ids.tolist()
    assert drawn.margin.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("temperature", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("filters", [(ALL, 1.0, 0.0), (ALL, 0.9, 0.0), (9, 1.0, 0.1)])
def test_no_temperature_draws_a_masked_token(temperature, filters):
    """Every other token may come; SGLang accepts any finite temperature."""
    logits = torch.randn(300, 10, generator=torch.Generator().manual_seed(6))
    logits[:, 2:] = -torch.inf
    drawn = seeded_top2(logits, make_draws(300, temperature, *filters))
    assert set(drawn.ids.tolist()) == {0, 1}


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits has shape \[3\]"):
        seeded_top2(torch.zeros(3), make_draws(3))
    with pytest.raises(ValueError, match=r"draws.seeds has shape \[2\]; pass \[3\]"):
        seeded_top2(torch.zeros(3, 5), make_draws(2))
