"""Norms of Gemma 3's heads, whose rows SGLang sums in an order that depends on how many there are.

On a GPU SGLang gives inputs [rows, heads, size] to torch operators, whose sum of squares is cut by
the number of rows times heads where that is small. Inputs [rows, size] go to one kernel that has a
block of threads for each row: the function is the same, and no row sees how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def forward_rows(
    original: Callable[..., Any],
    norm: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> Any:
    """AROUND Gemma3RMSNorm.forward_cuda: inputs of more than two axes as rows [n, size].

    Returns: the result in the shape of `x`, contiguous; with a residual, what SGLang returns.
    """
    if residual is not None or x.dim() <= 2:
        return original(norm, x, residual)
    rows = x.reshape(-1, x.shape[-1])
    normed: torch.Tensor = original(norm, rows)
    return normed.view(x.shape)
