"""What launching the two kernels of top-2 takes of the thread that does it: microseconds.

    python -m benchmark.kernels.launch_time --out launches.json

As Triton launches a kernel, and as `margingate_kernels.relaunch` does. It is Python's time, with
the checks and buffers of `softmax_top2` and without. Without a GPU, Triton is given a driver that
launches nothing, and takes that for a compiled kernel: the driver's own time is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from benchmark.bench import engines
from margingate_kernels import empty_top2, softmax_top2, top2, top2_triton, top2_workspace
from margingate_kernels.relaunch import Relaunch

BURST = 100  # launches that a GPU takes without making the thread wait
VOCABULARIES = (49152, 151936)


class AsTriton(Relaunch):
    """Asks Triton each time."""

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        self._kernel[grid](*args, **self._constants, **self._options)


class _Nothing:
    """Stands in for a compiled kernel."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *_args: Any) -> None:
        return None

    def run(self, *_args: Any) -> None:
        return None

    def __getitem__(self, grid: Any) -> Any:
        return triton.compiler.CompiledKernel.__getitem__(self, grid)

    def _init_handles(self) -> None:
        return None


class _Driver:
    """Of a Hopper that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def without_a_gpu() -> None:
    """Triton launches nothing from here on, in this process."""

    def compiled(function: Any, key: Any, _signature: Any, device: int, *_rest: Any) -> Any:
        return function.device_caches[device][0].setdefault(key, _Nothing())

    driver.set_active(_Driver())
    jit.JITFunction._do_compile = compiled
    top2_triton.launch_options = lambda _device: {"overlap": True, "launch_pdl": True}
    top2.softmax_top2_reference = lambda logits, valid_vocab: top2.launch_top2(
        logits, None, None, valid_vocab
    )


def us(call: Callable[[], object], bursts: int = 50) -> float:
    """Microseconds of this thread for a call, in the best of some bursts."""
    best = float("inf")
    for _ in range(bursts):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.thread_time()
        for _ in range(BURST):
            call()
        best = min(best, time.thread_time() - began)
    return best / BURST * 1e6


def measure(vocabulary: int, device: str) -> dict[str, float]:
    """Of one row of bfloat16 logits."""
    logits = torch.randn(1, vocabulary, device=device).to(torch.bfloat16)
    out, workspace = empty_top2(1, device), top2_workspace(1, vocabulary, device)
    found = {}
    for name, way in (("as Triton", AsTriton), ("again", Relaunch)):
        top2_triton.Relaunch = way
        top2_triton._launches.cache_clear()
        found[f"two launches, {name}"] = us(
            lambda: top2_triton.launch(logits, tuple(out), tuple(workspace), vocabulary)
        )
        found[f"softmax_top2, {name}"] = us(lambda: softmax_top2(logits))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not engines.on_gpu():
        without_a_gpu()
    device = "cuda" if engines.on_gpu() else "cpu"
    results = {str(vocabulary): measure(vocabulary, device) for vocabulary in VOCABULARIES}
    for vocabulary, found in results.items():
        for name, took in found.items():
            print(f"{vocabulary:>8} columns: {took:7.1f} us  {name}")
    engines.write(args.out, results)


if __name__ == "__main__":
    main()
