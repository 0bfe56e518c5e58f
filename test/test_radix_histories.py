"""The radix tree while requests come and go in any order."""

from __future__ import annotations

import pytest
import radix_world
from hypothesis import given, settings
from hypothesis import strategies as st
from radix_steps import STEPS, Step, take
from radix_world import ALONE, ANSWERS, TOGETHER, World

from margingate.runtime.probe.checks.check_prefill import Prefill

server = radix_world.server


@pytest.mark.parametrize("mode", [ALONE, TOGETHER, ANSWERS], ids=["alone", "together", "answers"])
@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEPS, min_size=15, max_size=60))
def test_requests_that_come_and_go_in_any_order(mode: Prefill, steps: list[Step]):
    world = World(mode)
    for step in steps:
        take(world, step)
        world.check()
    world.end()
