"""How long a CUDA graph takes on the GPU. Imports torch alone: benchmarks run without SGLang."""

from __future__ import annotations

import torch


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay; waits for its end."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return 1e3 * float(start.elapsed_time(stop))
