"""Layers and experts in FP8 in torch operators, for a CPU.

The names of the arguments are SGLang's, and products are in float32. Activations are rounded to FP8
with a scale for each row, or for each row and group of columns.
"""

from __future__ import annotations

from typing import Any

import torch

from margingate.runtime.compat.host.experts import run_experts

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
    """What SGLang's Triton kernel for layers with a scale a block of weights computes.

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
    return _like(input, products, bias)


def scaled_fp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **_unused: Any,
) -> torch.Tensor:
    """What SGLang computes for layers with a scale a channel, or one for all of the weight.

    Args:
        input: [..., columns]; not changed.
        weight: float8_e4m3fn [columns, outputs].
        weight_scale: float32, one or one an output.
        input_scale: one for all activations, where the checkpoint gives it.
        bias: [outputs].

    Returns:
        [..., outputs] in the dtype of `input`.
    """
    assert input.dtype != _FP8, "inputs in FP8 are made by kernels that a host has not"
    products = _rounded(input.reshape(-1, input.shape[-1]), input_scale) @ weight.float()
    products *= weight_scale.float().view(-1)
    return _like(input, products, bias)


def fp8_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    *,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
    **_unused: Any,
) -> torch.Tensor:
    """What SGLang's fused Triton kernels for experts in FP8 compute, expert by expert.

    Args:
        hidden_states: [rows, hidden]; not changed.
        w1: float8_e4m3fn [experts, 2 x inner, hidden], gate and up.
        w2: float8_e4m3fn [experts, hidden, inner].
        topk_output: weights and ids of each row's experts, and the router's logits.
        w1_scale, w2_scale: for each expert, by blocks, by outputs or one.
        a1_scale, a2_scale: one for all activations, where the checkpoint gives it.
        block_shape: rows and columns of a block.

    Returns:
        [rows, hidden] in the dtype of `hidden_states`.
    """
    weights, scales = {"w13": w1, "w2": w2}, {"w13": w1_scale, "w2": w2_scale}
    given = {"w13": a1_scale, "w2": a2_scale}

    def product(name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        scaled = weights[name][expert], scales[name][expert]
        return _product(rows, scaled, given[name], block_shape)

    return run_experts(hidden_states, topk_output, moe_runner_config, product)


def _product(
    x: torch.Tensor,
    scaled: tuple[torch.Tensor, torch.Tensor],
    given: torch.Tensor | None,
    block_size: list[int] | None,
) -> torch.Tensor:
    """Rows by the weight [outputs, columns] and the scales in `scaled`."""
    weight, scales = scaled
    if block_size is None:
        return scaled_fp8_linear(x, weight.T, scales, given)
    return block_fp8_linear(input=x, weight=weight, block_size=block_size, weight_scale=scales)


def _like(x: torch.Tensor, products: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Products [rows, outputs], the bias added to them, in the dtype and with the rows of x."""
    if bias is not None:
        products += bias
    return products.to(x.dtype).view(*x.shape[:-1], products.shape[-1])


def _rounded(rows: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """In float32, as FP8 times a scale has it: the given one, or one for each row."""
    if given is None:
        return round_to_fp8(rows, rows.shape[1])
    return quantized_by(rows, given)[0].float() * given


def quantized_by(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in FP8 by the one scale given, and that: as SGLang rounds inputs whose scale a checkpoint
    gives, and weights that it merges.
    """
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_FP8), scale


def round_to_fp8(x: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, columns] in float32, as FP8 times a scale for each row and `group` columns has it."""
    rows, columns = x.shape
    whole = torch.nn.functional.pad(x.float(), (0, -columns % group)).view(rows, -1, group)
    scales = whole.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _LARGEST
    rounded = (whole / scales).clamp(-_LARGEST, _LARGEST).to(_FP8).float() * scales
    return rounded.view(rows, -1)[:, :columns]


def _spread(scales: torch.Tensor, block_size: list[int], weight: torch.Tensor) -> torch.Tensor:
    """The weight [outputs, columns] in float32: each block times its scale.

    Made anew in each call: a copy that is kept would be four times the weight, and an update, which
    writes in place and leaves no trace in the tensor, would leave it as it was.
    """
    wide = scales.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]
