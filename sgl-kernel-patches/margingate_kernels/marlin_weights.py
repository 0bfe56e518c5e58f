"""Weights in Marlin's layout, as the numbers that Marlin multiplies by.

Marlin keeps whole numbers of 4 or 8 bits in the order in which its tensor-core instructions read
them: tiles of 16 inputs by 64 outputs, one behind the other along the outputs, then along the
inputs. Scales and zero points of a group of inputs lie in the same order within 64 outputs. Each
weight is (number - zero point) * scale, rounded once to the type of the scales.

Source of the layout: `gptq_marlin_repack` and `awq_marlin_repack` of SGLang, whose Python packers
the tests hold this to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from margingate_kernels import marlin_weights_triton

TILE_INPUTS, TILE_OUTPUTS = 16, 64
_DTYPES = (torch.bfloat16, torch.float16)


class MarlinWeights(NamedTuple):
    """A layer's weights in Marlin's layout; tensors are contiguous and on one device."""

    packed: torch.Tensor  # int32 [inputs / 16, outputs * bits / 2]
    scales: torch.Tensor  # bfloat16 or float16 [groups, outputs], at least two groups
    zeros: torch.Tensor | None  # int32 [groups, outputs * bits / 32]; None: in the middle
    bits: int  # 4 or 8


@torch.no_grad()
def unpack_marlin(weights: MarlinWeights) -> torch.Tensor:
    """The weights [outputs, inputs], contiguous, in the type of the scales. One Triton launch.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes that do not fit each other, or one group for all inputs, whose scales
            Marlin keeps in another order.
    """
    packed, scales, zeros, bits = weights
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    if packed.dtype != torch.int32 or scales.dtype not in _DTYPES:
        raise TypeError(
            f"packed weights are int32 and scales bfloat16 or float16, not {packed.dtype} and "
            f"{scales.dtype}"
        )
    groups, outputs = scales.shape
    inputs = len(packed) * TILE_INPUTS
    fits = packed.shape[1] == outputs * bits // 2 and outputs % TILE_OUTPUTS == 0
    if not fits or groups < 2 or inputs % groups or inputs // groups % TILE_INPUTS:
        raise ValueError(
            f"packed weights {list(packed.shape)} of {bits} bits do not fit scales "
            f"{list(scales.shape)}, of which there are two groups of inputs or more"
        )
    if zeros is not None and (
        zeros.dtype != torch.int32 or zeros.shape != (groups, outputs * bits // 32)
    ):
        raise ValueError(
            f"zero points are int32 {[groups, outputs * bits // 32]}, not {zeros.dtype} "
            f"{list(zeros.shape)}"
        )
    out = torch.empty(outputs, inputs, dtype=scales.dtype, device=scales.device)
    marlin_weights_triton.launch(packed, scales, zeros, out, bits)
    return out
