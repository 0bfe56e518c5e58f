"""Whose time the scheduler's thread spends: that of each hook of margingate, step by step.

A hook's time is its own: without the function of SGLang that it is around, and without hooks that
run within it, which count as theirs. A turn of the scheduler's loop ends with
`get_next_batch_to_run`, and in a gated scheduler with the hook on it. One that is not gated has
turns alone.
"""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter_ns as now
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from margingate_kernels import Top2

TURN = "managers.scheduler.Scheduler.get_next_batch_to_run"
ASKED = "managers.scheduler.Scheduler.get_internal_state"
ANSWER = "hook_time"  # beside the gate's counters
APART = "apart: "  # begins what is timed and is no work of a hook
WAIT = f"{APART}wait"  # for the device
OPERATOR = "operator: "  # begins what is counted and not timed
Step = dict[str, list[float]]  # by name: nanoseconds, calls


class Clock:
    """Of one thread."""

    def __init__(self, own: tuple[float, float] = (0.0, 0.0)) -> None:
        """`own`: what the clock itself adds to a call, as `own_ns` has it; taken off again."""
        self._own = own
        self.steps: dict[tuple[str, int], list[tuple[int, Step]]] = defaultdict(list)
        self._step: Step = {}
        self._launched = ("none", 0)
        self._turned = now()
        self._inner: list[int] = []  # of each call on the stack: nanoseconds that are not its own
        self.hooked = False  # the hook on the loop tells of its turns

    def timed(self, name: str, function: Callable[..., Any], *, around: bool) -> Any:
        """`function`, whose own time is noted. `around`: its first argument is an original."""
        own = self._own[around]

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if around:
                args = (self._without(args[0]), *args[1:])
            began = now()
            self._inner.append(0)
            try:
                return function(*args, **kwargs)
            finally:
                took = now() - began
                entry = self._step.setdefault(name, [0, 0])
                entry[0] += took - self._inner.pop() - own
                entry[1] += 1
                if self._inner:
                    self._inner[-1] += took

        return timed

    def _without(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original`, whose time is not that of the hook around it."""

        def without(*args: Any, **kwargs: Any) -> Any:
            began = now()
            self._inner.append(0)
            try:
                return original(*args, **kwargs)
            finally:
                self._inner.pop()
                self._inner[-1] += now() - began

        return without

    def count(self, name: str) -> None:
        """One call of an operator."""
        self._step.setdefault(f"{OPERATOR}{name}", [0, 0])[1] += 1

    def turn(self, plan: Any) -> None:
        """A turn ended; what follows belongs to the forward of `plan`."""
        self.steps[self._launched].append((now() - self._turned, self._step))
        batch, self._step, self._turned = plan.batch_to_run, {}, now()
        mode = "none" if batch is None else batch.forward_mode.name
        self._launched = (mode, 0 if batch is None else len(batch.reqs))

    def take(self) -> dict[str, Any]:
        """Medians of a decode step since the last call, by its number of requests, as text.

        Each: `steps`; `turn_us` of a turn of the loop; `busy_us` of it without waits for the
        device; of each hook microseconds and calls.
        """
        found = {
            str(size): _medians(steps)
            for (mode, size), steps in self.steps.items()
            if mode == "DECODE"
        }
        self.steps.clear()
        return found


def _medians(steps: list[tuple[int, Step]]) -> dict[str, Any]:
    names = {name for _, step in steps for name in step}
    none = (0, 0)
    own = {
        name: [statistics.median(step.get(name, none)[i] for _, step in steps) for i in (0, 1)]
        for name in names
    }
    return {
        "steps": len(steps),
        "turn_us": statistics.median(took for took, _ in steps) / 1e3,
        "busy_us": statistics.median(took - step.get(WAIT, none)[0] for took, step in steps) / 1e3,
        "hooks": {name: [ns / 1e3, calls] for name, (ns, calls) in own.items() if calls},
    }


def own_ns(calls: int = 500, turns: int = 40) -> tuple[float, float]:
    """Nanoseconds that the clock adds to a call of a hook, and to one around an original.

    The least mean of so many turns: what else runs on the machine, as other engines that start,
    would be taken off each hook.
    """
    clock, found = Clock(), []
    for around, function in ((False, lambda: None), (True, lambda original: original())):
        timed, means = clock.timed("nothing", function, around=around), []
        for _ in range(turns):
            for _ in range(calls):
                timed(*((int,) if around else ()))
            means.append(clock._step.pop("nothing")[0] / calls)
        found.append(min(means))
    return found[0], found[1]


class _Operators(TorchDispatchMode):
    """Counts the calls of torch's operators in one thread, which takes longer than most of them."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._clock.count(str(func))
        return func(*args, **(kwargs or {}))


def install(*, operators: bool = False) -> Clock:
    """In a process whose hooks are not installed yet: time all of them, and what is apart.

    That is a wait for the device, and SGLang's own sending, both of which it would do anyway.
    `/server_info` answers with what was noted since it was last asked.

    Args:
        operators: count torch's operators and Triton's launches too; times are not to be used then.
    """
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    from margingate.runtime.request import guard
    from margingate.runtime.request.in_flight import InFlight

    clock, wrap = Clock(own_ns()), guard.wrap
    for owner, name in ((InFlight, "arrived"), (SchedulerOutputStreamer, "stream_output")):
        timed = clock.timed(f"{APART}{name}", getattr(owner, name), around=False)
        setattr(owner, name, timed)

    def wrap_timed(target: str, function: Any, policy: Any, **named: Any) -> Any:
        guarded = wrap(target, function, policy, **named)
        timed = clock.timed(target, guarded, around=named["around"])
        if target == TURN:
            clock.hooked = True
            timed = _then(timed, clock.turn)
        elif target == ASKED:
            timed = _answering(timed, clock)
        return functools.wraps(function)(timed)

    guard.wrap = wrap_timed
    _without_hooks(clock, operators=operators)
    if torch.cuda.is_available():
        wait = clock.timed(WAIT, torch.cuda.Event.synchronize, around=False)
        torch.cuda.Event.synchronize = wait  # type: ignore[method-assign]
    else:
        _as_on_a_gpu()
    return clock


def _without_hooks(clock: Clock, *, operators: bool) -> None:
    """What a scheduler without the gate has: turns, and the answer."""
    from sglang.srt.managers.scheduler import Scheduler

    plan, answer = Scheduler.get_next_batch_to_run, Scheduler.get_internal_state
    mode = _Operators(clock) if operators else None

    @functools.wraps(plan)
    def planned(*args: Any, **kwargs: Any) -> Any:
        nonlocal mode
        found = plan(*args, **kwargs)
        if not clock.hooked:
            clock.turn(found)
        if mode is not None:  # from here on, in this thread
            mode.__enter__()
            mode = None
        return found

    @functools.wraps(answer)
    def answered(*args: Any, **kwargs: Any) -> Any:
        found = answer(*args, **kwargs)
        if not clock.hooked:
            found.internal_state[ANSWER] = clock.take()
        return found

    Scheduler.get_next_batch_to_run, Scheduler.get_internal_state = planned, answered
    if operators:
        _count_launches(clock)


def _count_launches(clock: Clock) -> None:
    """Those of Triton's kernels, which no operator of torch's tells of."""
    from triton.runtime.jit import JITFunction

    from margingate_kernels.relaunch import Relaunch

    for owner, method, name in ((JITFunction, "run", "Triton"), (Relaunch, "__call__", "again")):
        original = getattr(owner, method)

        def launched(*args: Any, _of: Any = original, _as: str = name, **kwargs: Any) -> Any:
            clock.count(_as)
            return _of(*args, **kwargs)

        setattr(owner, method, launched)


def _as_on_a_gpu() -> None:
    """Large batches are canonical on a CPU too, and kernels take no time that counts.

    Their oracles go row by row there. What stands in for them chooses the largest logit.
    """
    from margingate.runtime.probe import startup
    from margingate.runtime.sampling import sampler
    from margingate_kernels.seeded import SeededTop2

    def top2(logits: torch.Tensor) -> Top2:
        values, ids = logits.float().topk(2)
        return Top2(ids[:, 0], ids[:, 1], values[:, 0] - values[:, 1], values[:, 0])

    def drawn(logits: torch.Tensor, _draws: Any, **_named: Any) -> SeededTop2:
        return SeededTop2(*top2(logits)[:3])

    startup.LARGEST["cpu"] = startup.LARGEST_ON_GPU
    sampler.softmax_top2, sampler.seeded_top2 = top2, drawn


def _then(function: Any, told: Callable[[Any], None]) -> Any:
    def then(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        told(result)
        return result

    return then


def _answering(function: Any, clock: Clock) -> Any:
    def answering(result: Any, *args: Any) -> Any:
        result.internal_state[ANSWER] = clock.take()
        return function(result, *args)

    return answering
