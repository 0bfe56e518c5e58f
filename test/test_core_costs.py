"""The delay that the cost model chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from margingate.core.costs import DELAYS, Costs, Load, best_delay, overhead

COSTS = Costs(step_ms=8.0, pass_ms=9.0, rows=256)


def test_without_a_delay_a_busy_server_passes_at_every_step():
    busy = Load(requests=32, trigger_rate=0.2, flip_rate=0.0)
    assert overhead(0, busy, COSTS) == pytest.approx(9 / 8, rel=0.01)


def test_a_full_pass_waits_for_nothing():
    busy = Load(requests=32, trigger_rate=0.2, flip_rate=0.0)
    assert overhead(64, busy, COSTS) == overhead(16, busy, COSTS)  # 256 rows are there after 8
    assert best_delay(busy, COSTS) == 8


def test_flips_make_waiting_dear():
    calm = Load(requests=2, trigger_rate=0.2, flip_rate=0.0)
    wild = Load(requests=2, trigger_rate=0.2, flip_rate=0.2)
    assert best_delay(calm, COSTS) > 16 > best_delay(wild, COSTS)


LOADS = st.builds(
    Load,
    requests=st.floats(0.1, 300),
    trigger_rate=st.floats(0, 1),
    flip_rate=st.floats(0, 1),
)
TIMES = st.builds(
    Costs, step_ms=st.floats(1, 50), pass_ms=st.floats(1, 50), rows=st.sampled_from((16, 64, 256))
)


@given(LOADS, TIMES)
def test_no_delay_is_better_than_the_chosen_one_by_much(load, costs):
    chosen = overhead(best_delay(load, costs), load, costs)
    assert all(chosen <= 1.03 * overhead(delay, load, costs) + 1e-9 for delay in DELAYS)
    assert chosen >= 0


@given(LOADS, TIMES, st.sampled_from(DELAYS))
def test_a_delay_that_is_nearly_as_good_stays(load, costs, current):
    kept = best_delay(load, costs, current)
    assert kept in (current, best_delay(load, costs))
    assert 1 + overhead(kept, load, costs) <= 1.03 * (1 + overhead(current, load, costs))
    assert best_delay(load, costs, kept) == kept
