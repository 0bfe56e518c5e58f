"""Experts with weights in MXFP4 and their routing, in torch operators, for a CPU.

Each function stands where SGLang calls one of `triton_kernels`. Weights are made numbers once, in
float32, and products are in float32: the results of a product have one rounding, as theirs have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from margingate.runtime.compat.compute.mxfp4 import METHOD

# Of the lowest three bits; the fourth is the sign.
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLE = 127  # of a scale's byte, which says a power of two


@dataclass(frozen=True)
class Slices:
    """Of triton_kernels' record of rows by expert, what stands here."""

    slice_sizes: torch.Tensor  # int32 [experts]: the rows of each


def unpacked(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 [..., columns] of bytes [..., columns / 2] and a scale's byte for each 32 columns.

    The lower four bits of a byte are the earlier column.
    """
    signed = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    powers = torch.exp2(scales.float() - _MIDDLE)
    return signed[codes.long()] * powers.repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)


def swizzle(packed: torch.Tensor, scales: torch.Tensor, _num_warps: int) -> tuple[Any, Any, Any]:
    """In place of `_swizzle_mxfp4`: the weight as numbers, [experts, inputs, outputs]."""
    from triton_kernels.numerics import InFlexData

    return unpacked(packed.data, scales.data).transpose(-2, -1), InFlexData(), scales.data


def routing(
    logits: torch.Tensor,
    n_expts_act: int,
    sm_first: bool = False,
    **_unused: Any,
) -> tuple[Slices, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """What SGLang makes of a router's scores [rows, experts]: rows, sorted by expert.

    Args:
        n_expts_act: experts of a row; equal scores are taken in their order.
        sm_first: whether weights are a share of all experts instead of those chosen.

    Returns:
        How many rows each expert has; the row and the place (row times k and more) of each of its
        inputs; their weights; and k.
    """
    scores = torch.softmax(logits, dim=-1) if sm_first else logits
    values, ids = (
        part[:, :n_expts_act] for part in scores.sort(dim=-1, descending=True, stable=True)
    )
    weights = values if sm_first else torch.softmax(values.float(), dim=-1).to(logits.dtype)
    places = ids.flatten().sort(stable=True).indices.int()
    sizes = ids.flatten().bincount(minlength=logits.shape[1]).int()
    gates = weights.flatten()[places.long()]
    return Slices(sizes), places // n_expts_act, places, gates, n_expts_act


def run_experts(
    core: Any, runner_input: Any, quant_info: Any, _running_state: Any, **_unused: Any
) -> Any:
    """In place of TritonKernelsRunnerCore.run: rows by expert, in gpt-oss's activation."""
    from sglang.srt.layers.moe.moe_runner.triton_kernels import TritonKernelsRunnerOutput

    x, places = runner_input.hidden_states, runner_input.scatter_indx.long()
    sources, gates = runner_input.gather_indx.long(), runner_input.gate_scal
    results = torch.zeros(len(places), x.shape[1], dtype=x.dtype)
    start = 0
    for expert, size in enumerate(runner_input.a_ragged_metadata.slice_sizes.tolist()):
        mine = slice(start, start + size)
        if size:
            inner = _linear(x[sources[mine]], quant_info, "w13", expert)
            inner = _swiglu(inner, core.config.gemm1_alpha, core.config.gemm1_clamp_limit)
            outputs = _linear(inner.to(x.dtype), quant_info, "w2", expert)
            results[places[mine]] = (outputs * gates[mine, None].float()).to(x.dtype)
        start += size
    summed = results.unflatten(0, (len(x), -1)).sum(1)
    return TritonKernelsRunnerOutput(hidden_states=summed)


def _linear(x: torch.Tensor, quant_info: Any, name: str, expert: int) -> torch.Tensor:
    """Float32 [rows, outputs]."""
    weight, bias = getattr(quant_info, f"{name}_weight"), getattr(quant_info, f"{name}_bias")
    return x.float() @ weight[expert] + bias[expert].float()


def _swiglu(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Of gates and values side by side."""
    gate, up = x[:, ::2].contiguous().clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    # A row is filled up to whole vectors: torch takes what is left over in another way.
    room = torch.nn.functional.pad(alpha * gate, (0, -gate.shape[1] % 32))
    return gate * room.sigmoid()[:, : gate.shape[1]] * (up + 1)


def register() -> None:
    """Let SGLang read such checkpoints on a host, in this process."""
    from sglang.srt.layers import quantization
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    quantization.QUANTIZATION_METHODS.setdefault(METHOD, Mxfp4Config)


def install() -> None:
    """Put these in their places; SGLang's router keeps to its runner's format, as on a GPU."""
    from sglang.srt.layers.moe import topk as choice
    from sglang.srt.layers.moe.moe_runner.triton_kernels import TritonKernelsRunnerCore
    from sglang.srt.layers.moe.topk import TopKOutputFormat
    from sglang.srt.layers.moe.utils import get_moe_runner_backend
    from sglang.srt.layers.quantization import mxfp4

    register()
    native = choice.TopK.forward_native

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = module.topk_config.output_format
        by_runner = wanted is None and get_moe_runner_backend().is_triton_kernels()
        if by_runner or wanted == TopKOutputFormat.TRITON_KERNEL:
            return module.forward_cuda(*args, **kwargs)
        return native(module, *args, **kwargs)

    choice.TopK.forward_native = forward
    choice.routing = routing
    mxfp4._swizzle_mxfp4 = swizzle
    TritonKernelsRunnerCore.run = run_experts
