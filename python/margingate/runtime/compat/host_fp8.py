"""Linear layers in FP8 with a scale a block of weights, in torch operators, for a CPU."""

from __future__ import annotations

import torch

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_LEAST = 1e-10  # of a group of activations, so that zeros have a scale


def block_fp8_linear(
    *,
    input: torch.Tensor,
    weight: torch.Tensor,
    block_size: list[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What SGLang's Triton kernel for such layers computes, with products in float32.

    The names of the arguments are SGLang's. Activations are rounded to FP8 with a scale for each
    row and group of columns.

    Args:
        input: [..., columns]; not changed.
        weight: float8_e4m3fn [outputs, columns].
        block_size: rows and columns of a block.
        weight_scale: float32, one a block; blocks at the edges may be smaller.
        input_scale: None; FP8 inputs come with kernels that a host has not.
        bias: [outputs].

    Returns:
        [..., outputs] in the dtype of `input`.
    """
    assert input_scale is None, "inputs in FP8 are made by kernels that a host has not"
    rows = input.reshape(-1, input.shape[-1])
    products = round_to_fp8(rows, block_size[1]) @ _spread(weight_scale, block_size, weight).T
    if bias is not None:
        products += bias
    return products.to(input.dtype).view(*input.shape[:-1], len(weight))


def round_to_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, columns] in float32, as FP8 times a scale for each row and `group` columns has it."""
    rows, columns = x.shape
    whole = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(rows, -1, group)
    scales = whole.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _LARGEST
    rounded = (whole / scales).clamp(-_LARGEST, _LARGEST).to(_FP8).float() * scales
    return rounded.view(rows, -1)[:, :columns]


def _spread(scales: torch.Tensor, block_size: list[int], weight: torch.Tensor) -> torch.Tensor:
    """The weight [outputs, columns] in float32: each block times its scale."""
    wide = scales.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]
