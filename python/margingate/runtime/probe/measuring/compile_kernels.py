"""Kernels of SGLang's batch-invariant matmul, compiled side by side before anything waits for them.

DeepGEMM compiles a kernel when it first meets a shape that needs one: some two seconds each, one
after the other, thirty of them for the layers of an 8B shape. It keeps what it compiles on disk,
where all processes find it. Here processes do that which need nothing else. Such a process is this
module, run as a script that reads OUTPUTS INPUTS ROWS from lines of its stdin:

    python -m margingate.runtime.probe.measuring.compile_kernels DEVICE
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from margingate.runtime.compat.compute.batch_invariant_matmul import (
    deterministic,
    invariant_matmul,
    is_deep_gemm,
)

logger = logging.getLogger(__name__)

COMPILES_S = 1.0  # a first call that takes so long had to compile
MOST_PROCESSES = 16  # each needs a few seconds to come up, and some GPU memory:
PROCESS_BYTES = 640 << 20  # of a CUDA context and the rows
PATIENCE_S = 180

Need = tuple[torch.Tensor, Sequence[int]]  # a weight [outputs, inputs], and row counts


class Compilers:
    """Processes that get ready for it as soon as they are made; they are gone when a `with` ends.

    None where DeepGEMM does not run. One that fails costs only time: whoever needs its kernels
    compiles them.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        """For weights among these, all of one device."""
        first = next(filter(is_deep_gemm, weights), None)
        self._running: list[subprocess.Popen[str]] = []
        if first is not None:
            device = first.device.index or 0
            self._running = [_started(device) for _ in range(_room_for())]

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_error: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.close()

    def compile(self, needs: Iterable[Need]) -> None:
        """Have the kernels compiled for these weights at these row counts. To be called once.

        Comes back at once where the first kernel of each weight was there already.
        """
        needs = [(weight, counts) for weight, counts in needs if is_deep_gemm(weight)]
        if not self._running or not needs:
            return
        start = time.monotonic()
        for process, lines in zip(self._running, _dealt(needs, len(self._running)), strict=True):
            with suppress(BrokenPipeError):
                _tell(process, lines)
        if any(_compiles(weight) for weight, _ in needs):
            failed = [code for code in map(_status, self._running) if code != 0]
            logger.info(
                "margingate: compiled the batch-invariant matmul's kernels in %d of %d processes "
                "(%.1f s)",
                len(self._running) - len(failed),
                len(self._running),
                time.monotonic() - start,
            )


def compile_ahead(needs: Sequence[Need]) -> None:
    """`Compilers.compile` with processes that are started now."""
    with Compilers(weight for weight, _ in needs) as compilers:
        compilers.compile(needs)


def _started(device: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _compiles(weight: torch.Tensor) -> bool:
    """Whether the kernel for one row was not there; False too where it does not run at all."""
    start = time.monotonic()
    try:
        invariant_matmul(weight.new_zeros(1, weight.shape[-1]), weight=weight, bias=None)
    except RuntimeError:
        return False
    torch.cuda.synchronize()
    return time.monotonic() - start > COMPILES_S


def _room_for() -> int:
    """Processes for which cores and GPU memory have room, beside those of other ranks."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if distributed else 1
    free, _ = torch.cuda.mem_get_info()
    room = int(free) * 3 // 4 // PROCESS_BYTES
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // ranks, room))


def _dealt(needs: Sequence[Need], processes: int) -> list[list[str]]:
    """The lines for each process; neighbours, which may share a kernel, go to different ones."""
    lines = [
        " ".join(map(str, (*weight.shape, count))) for weight, counts in needs for count in counts
    ]
    return [lines[i::processes] for i in range(processes)]


def _tell(process: subprocess.Popen[str], lines: Sequence[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("".join(f"{line}\n" for line in lines))
    process.stdin.close()


def _status(process: subprocess.Popen[str]) -> int:
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main(arguments: Sequence[str]) -> None:
    """Meet the kernels. Memory for the operands is not needed: rows may overlap."""
    import deep_gemm

    needed = list(sys.stdin)  # until then the probe may have all the GPU's memory
    torch.cuda.set_device(int(arguments[0]))
    step = 8  # elements between rows: 16 bytes, what a tensor map asks for
    buffer = torch.zeros(0, dtype=torch.bfloat16, device="cuda")
    with deterministic(deep_gemm):  # or cuBLASLt runs, and nothing is compiled
        for line in needed:
            outputs, inputs, count = map(int, line.split())
            size = max(inputs, outputs) + step * max(outputs, count)
            buffer = buffer if len(buffer) >= size else buffer.new_zeros(size)
            weight = buffer.as_strided((outputs, inputs), (step, 1))
            rows = buffer.as_strided((count, inputs), (step, 1))
            results = torch.empty_like(buffer).as_strided((count, outputs), (step, 1))
            deep_gemm.bf16_gemm_nn(rows, weight.T, results)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
