"""Triton body of `unpack_marlin`: a program writes 64 outputs of some inputs of one group.

Within a tile a word belongs to a thread of a warp: thread 4 * (output % 8) + (input % 8) / 2 of
warp output / 16. It has the numbers of both of a thread's inputs, of those eight further on, and
of the outputs eight further on. So each word is read by several lanes, from the cache next to them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_INPUTS = 64  # of a program


@triton.jit
def unpack_kernel(  # noqa: PLR0917
    packed: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    out: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    of_group: tl.constexpr,  # inputs of a group, a multiple of `block`
    bits: tl.constexpr,
    has_zeros: tl.constexpr,
    block: tl.constexpr,  # inputs of a program, a multiple of 16
) -> None:
    """Pointers to what `MarlinWeights` has, and to [outputs, inputs]."""
    tile_n = tl.program_id(0)
    first = tl.program_id(1) * block
    n = tl.arange(0, 64)[:, None]
    k = first + tl.arange(0, block)[None, :]
    row = k % 16
    thread = 4 * (n % 8) + row % 8 // 2
    warp = n // 16
    odd, far, beside = row % 2, row // 8, n % 16 // 8
    tile = (k // 16).to(tl.int64) * (outputs // 64) + tile_n
    if bits == 4:
        word = tile * 128 + thread * 4 + warp
        place = 4 * odd + far + 2 * beside
    else:
        word = tile * 256 + thread * 8 + warp * 2 + beside
        place = 2 * odd + far
    values = (tl.load(packed + word) >> (bits * place)) & ((1 << bits) - 1)
    group = (first // of_group).to(tl.int64)
    # Of 64 outputs, n is at 8 * (n % 8) + n // 8 among the scales and the zero points of a group.
    scale = tl.load(scales + group * outputs + tile_n * 64 + 8 * (n % 8) + n // 8)
    if has_zeros:
        place = n // 8
        if bits == 4:
            column = tile_n * 8 + n % 8
            place = 4 * (place % 2) + place // 2
        else:
            column = tile_n * 16 + 2 * (n % 8) + place // 4
            place = 2 * (place % 2) + place % 4 // 2
        held = tl.load(zeros + group * (outputs * bits // 32) + column)
        zero = (held >> (bits * place)) & ((1 << bits) - 1)
    else:
        zero = 1 << (bits - 1)
    weight = (values - zero).to(tl.float32) * scale.to(tl.float32)
    at = (tile_n * 64 + n).to(tl.int64) * inputs + k
    tl.store(out + at, weight.to(out.dtype.element_ty))


def launch(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out: torch.Tensor,
    bits: int,
) -> None:
    """Run the body on arguments already checked; `unpack_marlin` is the public way in."""
    outputs, inputs = out.shape
    group = inputs // len(scales)
    block = min(group & -group, MOST_INPUTS)  # a power of two
    unpack_kernel[(outputs // 64, inputs // block)](
        packed,
        scales,
        scales if zeros is None else zeros,
        out,
        inputs,
        outputs,
        of_group=group,
        bits=bits,
        has_zeros=zeros is not None,
        block=block,
        num_warps=4,
    )
