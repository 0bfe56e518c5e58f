"""How long calls of operators take by row count, in CUDA graphs as when they serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from margingate.runtime.probe.measuring.graph_timing import replay_us
from margingate.runtime.probe.operators.operator import Operator

TIMED_CALLS = 20


def microseconds(operators: Sequence[Operator], counts: Sequence[int]) -> dict[int, float]:
    """Time of one call by row count, in a CUDA graph as when it serves.

    Each call is another layer's, where there are several: one just used has its weight in L2.
    """
    turns = [operators[i % len(operators)] for i in range(TIMED_CALLS)]
    sample = operators[0].sample(max(counts))
    found = {}
    for count in counts:
        rows = sample[:count]
        turns[0].run(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for operator in turns:
                operator.run(rows)
        found[count] = min(replay_us(graph) for _ in range(3)) / TIMED_CALLS
    return found
