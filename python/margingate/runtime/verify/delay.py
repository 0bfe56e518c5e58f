"""`--gate-max-delay auto`: the delay follows from measured latencies and the load seen.

On the stock fast path on a GPU; elsewhere the delay is 0. Answers do not depend on it, only their
speed does.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from margingate.config import GateConfig
from margingate.core.costs import Costs, Load, best_delay, overhead
from margingate.runtime.compat.process.ranks import slowest
from margingate.runtime.request.observer import Observer
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.verify.verifier import RowInput, Verifier

logger = logging.getLogger(__name__)

EVERY = 256  # decode steps with gated requests between two looks
FEW = 8  # requests in a decode step
FIRST = Load(requests=FEW, trigger_rate=0.15, flip_rate=0.005)  # until there is something to see
PRIOR_ROWS = 1000  # that FIRST's rates count as
TIMED = 5  # forwards
AT_START = "at start"


class Pacer(Observer):
    """Sets the queue's delay from what the last steps looked like."""

    def __init__(self, requests: OpenRequests, costs: Costs) -> None:
        self._requests, self._costs = requests, costs
        self._steps = self._gated = 0
        self._seen = (0, 0, 0)  # rows, flags and flips so far
        self._choose(FIRST, AT_START)

    def stepped(self, batch: Any, gated: int, canonical: bool) -> None:
        if gated == 0 or not batch.forward_mode.is_decode():
            return
        self._steps += 1
        self._gated += gated
        if self._steps == EVERY:
            self._look()

    def _look(self) -> None:
        now = self._counts()
        rows, flagged, flips = (a - b for a, b in zip(now, self._seen, strict=True))
        weight = rows + PRIOR_ROWS
        load = Load(
            self._gated / self._steps,
            (flagged + FIRST.trigger_rate * PRIOR_ROWS) / weight,
            (flips + FIRST.flip_rate * PRIOR_ROWS) / weight,
        )
        self._seen, self._steps, self._gated = now, 0, 0
        self._choose(load, f"after {rows} rows")

    def _counts(self) -> tuple[int, int, int]:
        counts = self._requests.summed()
        return counts.steps, counts.flagged, counts.flips

    def _choose(self, load: Load, when: str) -> None:
        queue, costs = self._requests.queue, self._costs
        starts = when == AT_START
        chosen = best_delay(load, costs, None if starts else queue.max_delay)
        if chosen == queue.max_delay and not starts:
            return
        queue.max_delay = chosen
        logger.info(
            "margingate: flagged rows wait %d steps (%s: %.1f requests a step, %.1f %% flagged, "
            "%.2f %% flips, a step %.2f ms, a pass of %d rows %.2f ms; expected overhead %.0f %%)",
            *(chosen, when, load.requests, 100 * load.trigger_rate, 100 * load.flip_rate),
            *(costs.step_ms, costs.rows, costs.pass_ms),
            100 * overhead(chosen, load, costs),
        )


def observers(
    scheduler: Any, config: GateConfig, verifier: Verifier, requests: OpenRequests, *, merges: bool
) -> tuple[Observer, ...]:
    """A pacer, where passes are to be spaced; the delay is 0 elsewhere.

    merges: passes are merged into decode steps, which is so on the stock fast path alone.
    """
    if config.max_delay is not None or not merges or verifier.device == "cpu":
        return ()
    step_ms, pass_ms = slowest(scheduler, measure(verifier))
    return (Pacer(requests, Costs(step_ms, pass_ms, verifier.rows, merges=merges)),)


def measure(verifier: Verifier) -> tuple[float, float]:
    """Milliseconds of SGLang's decode step of a few rows and of a verify pass, on padding alone."""
    graphs = verifier.runner.decode_cuda_graph_runner  # None: switched off
    sizes = [min(FEW, verifier.rows)] if graphs is None else graphs.capture_bs
    few = min((size for size in sizes if size >= FEW), default=max(sizes))
    step = Verifier(verifier.runner, few, graphs=graphs)
    return _ms(step), _ms(verifier)


def _ms(verifier: Verifier) -> float:
    """Milliseconds of the fastest of some forwards over the reserved slot."""
    times = []
    for _ in range(TIMED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        verifier.forward([RowInput(0, 0, 0)], verifier.rows)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)
