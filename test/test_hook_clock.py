"""The clock of the hooks: a hook's time is its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.bench import hook_clock

LONG, SHORT = 30, 5  # microseconds


class Time:
    """What the clock reads: it goes on where a test says so, whatever else the machine does."""

    def __init__(self) -> None:
        self.ns = 0

    def now(self) -> int:
        return self.ns

    def passes(self, microseconds: int) -> None:
        self.ns += 1000 * microseconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(hook_clock, "now", time.now)
    return time


@pytest.fixture
def clock(time: Time) -> hook_clock.Clock:
    return hook_clock.Clock()


def decode(rows: int) -> Any:
    mode = SimpleNamespace(name="DECODE")
    return SimpleNamespace(batch_to_run=SimpleNamespace(forward_mode=mode, reqs=[0] * rows))


def test_neither_the_original_nor_an_inner_hook_counts(clock: hook_clock.Clock, time: Time) -> None:
    inner = clock.timed("inner", lambda: time.passes(LONG), around=False)

    def of_sglang() -> str:
        time.passes(LONG)
        inner()
        return "done"

    def hook(original: Any) -> Any:
        time.passes(SHORT)
        inner()
        return original()

    clock.turn(decode(2))
    assert clock.timed("outer", hook, around=True)(of_sglang) == "done"
    clock.turn(decode(2))
    found = clock.take()["2"]
    assert found["steps"] == 1
    assert found["hooks"] == {"outer": [SHORT, 1], "inner": [2 * LONG, 2]}
    assert found["turn_us"] == found["busy_us"] == SHORT + 3 * LONG


def test_an_exception_passes_and_leaves_the_clock_in_order(clock: hook_clock.Clock) -> None:
    def hook(original: Any) -> Any:
        return original()

    def failing() -> None:
        raise ValueError("of SGLang")

    with pytest.raises(ValueError, match="of SGLang"):
        clock.timed("outer", hook, around=True)(failing)
    assert clock._inner == []


def test_a_step_belongs_to_the_batch_that_was_launched_before_it(clock: hook_clock.Clock) -> None:
    hook = clock.timed("hook", lambda: None, around=False)
    clock.turn(decode(3))
    for _ in range(2):
        hook()
        clock.turn(decode(1))
    assert {size: found["steps"] for size, found in clock.take().items()} == {"3": 1, "1": 1}
    assert clock.take() == {}


def test_a_wait_for_the_device_is_no_work_and_a_count_is_no_time(
    clock: hook_clock.Clock, time: Time
) -> None:
    wait = clock.timed(hook_clock.WAIT, lambda: time.passes(LONG), around=False)
    clock.turn(decode(1))
    wait()
    time.passes(SHORT)
    clock.count("aten.add")
    clock.count("aten.add")
    clock.turn(decode(1))
    found = clock.take()["1"]
    assert (found["turn_us"], found["busy_us"]) == (LONG + SHORT, SHORT)
    assert found["hooks"][f"{hook_clock.OPERATOR}aten.add"] == [0, 2]


def test_what_else_runs_is_not_taken_for_the_clocks_own_time(monkeypatch) -> None:
    """A few calls that were interrupted weigh on a mean, and not on the least of some."""
    calls = iter(range(10**9))
    time = Time()

    def now() -> int:
        time.passes(10**6 if next(calls) % 1000 == 999 else 1)
        return time.now()

    monkeypatch.setattr(hook_clock, "now", now)
    assert max(hook_clock.own_ns(calls=20)) < 10**6
