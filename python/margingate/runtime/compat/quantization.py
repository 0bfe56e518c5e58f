"""Which quantized layers the gate knows, as SGLang loaded them."""

from __future__ import annotations

from functools import partial
from typing import Any

METHOD = "fp8"  # as SGLang's ModelConfig and a checkpoint's configuration call it


def has_fp8_blocks(model: Any) -> bool:
    """Whether SGLang's ModelConfig says FP8 weights with a scale a block, in a dense model.

    Such a checkpoint leaves the scales of activations to the server, a scale for each row and group
    of columns; no other row enters them.
    """
    config = getattr(model.hf_config, "quantization_config", None) or {}
    of = config.get if isinstance(config, dict) else partial(getattr, config)
    if model.quantization != METHOD or not of("weight_block_size", None):
        return False
    return not has_experts(model)


def has_experts(model: Any) -> bool:
    """Whether SGLang's ModelConfig names a number of experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(model.hf_text_config, name, None) for name in names)


def is_fp8_block_layer(module: Any) -> bool:
    """Whether this layer's products are of FP8 numbers, with a scale a block of weights."""
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    method = getattr(module, "quant_method", None)
    if not isinstance(method, Fp8LinearMethod) or not method.weight_block_size:
        return False
    return not (method.use_marlin or method.use_mxfp8)


def describe(layer: Any) -> str:
    """What chooses the kernels of such a layer, beside the shape and dtype of its weight."""
    method, scales = layer.quant_method, layer.weight_scale_inv
    kernel = method.w8a8_block_fp8_linear
    said = [
        *(type(method).__name__, str(method.weight_block_size)),
        *(getattr(kernel, "func", kernel).__name__, str(getattr(kernel, "keywords", ""))),
        *(str(list(scales.shape)), str(scales.dtype)),
        *(name for name in ("block_fp8_as_mxfp8",) if getattr(method, name, False)),
    ]
    widened = getattr(layer, "_block_fp8_bf16_weight", None) is not None
    return " ".join(filter(None, said)) + " with a BF16 copy" * widened
