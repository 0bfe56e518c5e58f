"""A mixture's experts in torch operators, for a CPU: each expert's rows, and a row's sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

# The name of a weight, w13 (gate and up) or w2, an expert, and rows -> their product with it
Product = Callable[[str, int, torch.Tensor], torch.Tensor]


def run_experts(
    hidden: torch.Tensor, topk_output: Any, moe_runner_config: Any, product: Product
) -> torch.Tensor:
    """What SGLang's fused kernels compute, expert by expert.

    Args:
        hidden: [rows, hidden]; not changed.
        topk_output: weights and ids of each row's experts, and the router's logits.

    Returns:
        [rows, hidden] in the dtype of `hidden`: the experts' rows, added in float32.
    """
    assert moe_runner_config.activation == "silu", "no other activation is written for a host"
    weights, ids, _ = topk_output
    result = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        rows, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = product("w13", expert, hidden[rows]).chunk(2, dim=-1)
        inner = silu(gate.float()).to(gate.dtype) * up
        outputs = product("w2", expert, inner)
        result[rows] += outputs.float() * weights[rows, place, None].float()
    scale = moe_runner_config.routed_scaling_factor
    return (result if scale is None else result * scale).to(hidden.dtype)
