"""SGLang's batch-invariant matmul: what runs it, and the row counts that it has kernels for."""

from __future__ import annotations

import torch


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
    """Whether `invariant_matmul` runs DeepGEMM for this weight."""
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops

    chosen = bool(ops.ENABLE_JIT_DEEPGEMM and ops._ENABLE_MM_DEEPGEMM)
    return chosen and weight.is_cuda and weight.dtype == torch.bfloat16
