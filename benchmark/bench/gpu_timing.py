"""How long a call takes on the GPU, without what the CPU needs to launch it: in a CUDA graph.

Imports torch alone, so that kernels are timed where SGLang is not installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from margingate.runtime.probe.measuring.graph_timing import replay_us

GIB = 1 << 30


def microseconds(
    call: Callable[[Any], Any], inputs: Sequence[Any], replays: int, warm_up: int = 1
) -> list[float]:
    """Microseconds a call, one figure a replay of a graph that calls `call` with each input.

    The first two inputs run outside the graph first, to compile and to initialise; the first
    `warm_up` replays are not counted.
    """
    graph = _capture(call, inputs)
    for _ in range(warm_up):
        graph.replay()
    return [replay_us(graph) / len(inputs) for _ in range(replays)]


def bandwidth(replays: int = 10) -> float:
    """GB/s, read plus written, of a device copy of 1 GiB."""
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = microseconds(target.copy_, [source, source], replays, warm_up=2)
    return 2 * GIB / statistics.median(times) / 1e3


def _capture(call: Callable[[Any], Any], inputs: Sequence[Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for one in inputs[:2]:
            call(one)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in inputs:
            call(one)
    return graph
