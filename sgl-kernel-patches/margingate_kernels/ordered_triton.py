"""Whole numbers in the order of floats: a warp finds their largest in one instruction, not ten."""

import triton
import triton.language as tl


@triton.jit
def as_rank(m: tl.tensor) -> tl.tensor:
    """A whole number that orders as `m`; equal zeros are equal. Meaningless for NaN."""
    bits = (m + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unrank(rank: tl.tensor) -> tl.tensor:
    """The float that `as_rank` was given, -0.0 as 0.0. Meaningless for other whole numbers."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
