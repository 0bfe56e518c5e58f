"""SGLang's batch-invariant matmul: run, and compiled before anything waits for it.

On a Hopper GPU it is DeepGEMM, which compiles a kernel when it first meets a shape that needs one:
some two seconds each, one after the other, two dozen of them for a layer that prefills and decodes.
`compile_ahead` has them compiled side by side by processes of its own; DeepGEMM keeps what it
compiles on disk, where all processes find it. Such a process is this module, run as a script:

    python -m margingate.runtime.invariant_matmul DEVICE OUTPUTS INPUTS ROWS[,ROWS...]
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import dropwhile

import torch

logger = logging.getLogger(__name__)

COMPILES_S = 1.0  # a first call that takes so long had to compile
MOST_PROCESSES = 16  # each needs a few seconds to come up, and some GPU memory:
PROCESS_BYTES = 640 << 20  # of a CUDA context and the rows
PATIENCE_S = 180


def invariant_matmul(
    x: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """SGLang's batch-invariant kernel: x [rows, inputs] by weight [outputs, inputs]."""
    from sglang.srt.batch_invariant_ops import matmul_persistent

    return matmul_persistent(x.contiguous(), weight.T, bias)


def kernel_counts(largest: int) -> list[int]:
    """Row counts up to `largest` that meet every kernel there is for them.

    Tiles have 16 rows, 32 or a multiple of 64; Triton compiles multiples of 16 apart.
    """
    counts = {1, 16, 17, 33, 49, *range(65, largest, 64), largest}
    return sorted(count for count in counts if count <= largest)


Need = tuple[torch.Tensor, Sequence[int]]  # a weight [outputs, inputs], and ascending row counts


def compile_ahead(needs: Iterable[Need]) -> None:
    """Have the kernels compiled for these weights at these row counts.

    Does nothing up to the first weight whose first kernel is not there. A process that fails costs
    only time: whoever needs its kernels compiles them.
    """
    compiled = [need for need in needs if is_deep_gemm(need[0])]
    missing = list(dropwhile(lambda need: not _compiles(need[0]), compiled))
    if not missing:
        return
    start = time.monotonic()
    jobs = _jobs(missing, _processes())
    running = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, *job],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for job in jobs
    ]
    failed = [code for code in map(_status, running) if code != 0]
    logger.info(
        "margingate: compiled the batch-invariant matmul's kernels in %d of %d processes (%.1f s)",
        len(jobs) - len(failed),
        len(jobs),
        time.monotonic() - start,
    )


def is_deep_gemm(weight: torch.Tensor) -> bool:
    """Whether `invariant_matmul` runs DeepGEMM for this weight."""
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    chosen = bool(ops.ENABLE_JIT_DEEPGEMM and ops._ENABLE_MM_DEEPGEMM)
    return chosen and weight.is_cuda and weight.dtype == torch.bfloat16


def _compiles(weight: torch.Tensor) -> bool:
    """Whether the kernel for one row was not there; False too where it does not run at all."""
    start = time.monotonic()
    try:
        invariant_matmul(weight.new_zeros(1, weight.shape[-1]), weight=weight, bias=None)
    except RuntimeError:
        return False
    torch.cuda.synchronize()
    return time.monotonic() - start > COMPILES_S


def _processes() -> int:
    """How many the cores and the GPU's memory have room for, beside those of other ranks."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if distributed else 1
    free, _ = torch.cuda.mem_get_info()
    room = int(free) * 3 // 4 // PROCESS_BYTES
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // ranks, room))


def _jobs(needs: Sequence[Need], processes: int) -> list[list[str]]:
    """Arguments of each process: a run of neighbouring row counts, which share kernels."""
    each = max(1, processes // len(needs))
    jobs = []
    for weight, counts in needs:
        size = -(-len(counts) // each)
        fixed = [str(weight.device.index or 0), *map(str, weight.shape)]
        pieces = (counts[i : i + size] for i in range(0, len(counts), size))
        jobs += [[*fixed, ",".join(map(str, piece))] for piece in pieces]
    return jobs


def _status(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main(arguments: Sequence[str]) -> None:
    """Meet the kernels of one shape. Memory for its operands is not needed: rows may overlap."""
    import deep_gemm

    device, outputs, inputs = map(int, arguments[:3])
    counts = [int(count) for count in arguments[3].split(",")]
    torch.cuda.set_device(device)
    step = 8  # elements between rows: 16 bytes, what a tensor map asks for
    buffer = torch.zeros(
        max(inputs, outputs) + step * max(outputs, *counts), dtype=torch.bfloat16, device="cuda"
    )
    weight = buffer.as_strided((outputs, inputs), (step, 1))
    results = torch.empty_like(buffer)
    for count in counts:
        rows = buffer.as_strided((count, inputs), (step, 1))
        deep_gemm.bf16_gemm_nn(rows, weight.T, results.as_strided((count, outputs), (step, 1)))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
