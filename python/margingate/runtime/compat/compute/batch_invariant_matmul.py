"""SGLang's batch-invariant matmul: what runs it, and the row counts that it has kernels for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.errors import TritonError

# Where it does not run here: DeepGEMM has nothing to compile with, or a GPU has less shared memory
# than Triton's tiles of float16 take.
NOT_RUNNING = (RuntimeError, TritonError)
_LEAST_OUTPUTS = 16  # of a weight that DeepGEMM takes
_BLOCK = 16  # bytes: rows of both operands begin at a multiple of it


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


def is_deep_gemm(weight: torch.Tensor) -> bool:
    """Whether `invariant_matmul` runs DeepGEMM for this weight [outputs, inputs].

    SGLang asks the same of each call, and whether both operands are contiguous.
    """
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    chosen = bool(ops.ENABLE_JIT_DEEPGEMM and ops._ENABLE_MM_DEEPGEMM)
    if not chosen or not weight.is_cuda or weight.dtype != torch.bfloat16:
        return False
    outputs, inputs = weight.shape
    aligned = all(n * weight.element_size() % _BLOCK == 0 for n in (outputs, inputs))
    return outputs >= _LEAST_OUTPUTS and aligned and weight.is_contiguous()


@contextmanager
def deterministic(library: Any) -> Iterator[None]:
    """Meanwhile DeepGEMM runs the kernels that `invariant_matmul` does.

    From version 0.2 on its bfloat16 products are cuBLASLt's by default, whose order of additions
    may depend on the number of rows.

    Args:
        library: the module `deep_gemm`.
    """
    asked = getattr(library, "get_deterministic_algorithms", None)
    if asked is None or asked():
        yield
        return
    library.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        library.use_deterministic_algorithms(False)
