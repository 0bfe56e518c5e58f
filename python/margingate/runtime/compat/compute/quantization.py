"""Which layers in FP8 the gate knows, as SGLang loaded them, and how they round their inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

METHODS = ("fp8", "w8a8_fp8", "compressed-tensors")  # as SGLang's ModelConfig calls them
# What the scale of an input is made of; GIVEN by the checkpoint, NONE where nothing is rounded.
BLOCKS, TOKENS, GIVEN, BATCH, NONE = "groups of a row", "a row", "given", "all rows", ""


def is_known(model: Any) -> bool:
    """Whether SGLang's ModelConfig names a method whose layers may be in FP8."""
    return model.quantization in METHODS


def shares_scales(model: Any) -> bool:
    """Whether SGLang's ModelConfig says experts that `rounding` would call BATCH.

    Only of what it says by itself; `rounding` knows all of it when the model is loaded.
    """
    of = partial(checkpoint_says, model)
    by_scales = of("weight_block_size") or of("activation_scheme") == "static"
    return model.quantization == METHODS[0] and has_experts(model) and not by_scales


def checkpoint_says(model: Any, name: str) -> Any:
    """An entry of the checkpoint's quantization, by SGLang's ModelConfig; None without one."""
    config = getattr(model.hf_config, "quantization_config", None) or {}
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def left_out(said: Callable[[str], Any]) -> list[str]:
    """The layers that a checkpoint's quantization leaves out, sorted. `said`: gives its entries."""
    lists = (said(name) for name in ("ignored_layers", "modules_to_not_convert", "ignore"))
    return sorted(map(str, next((each for each in lists if isinstance(each, list) and each), [])))


def has_experts(model: Any) -> bool:
    """Whether SGLang's ModelConfig names a number of experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(model.hf_text_config, name, None) for name in names)


def is_fp8_layer(module: Any) -> bool:
    """Whether this linear layer's products are of FP8 numbers, inputs too."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8LinearMethod

    method = method_of(module)
    if isinstance(method, Fp8LinearMethod):
        return not (method.use_marlin or method.use_mxfp8)
    return isinstance(method, (W8A8Fp8LinearMethod, CompressedTensorsW8A8Fp8))


def are_known(experts: Any) -> bool:
    """Whether the experts of SGLang's FusedMoE are unquantized, or have products of FP8 numbers."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Fp8MoE,
    )
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8FP8MoEMethod

    method = method_of(experts)
    if isinstance(method, Fp8MoEMethod):
        return not method.use_mxfp8 and are_rounded(experts)
    return isinstance(
        method, (UnquantizedFusedMoEMethod, W8A8FP8MoEMethod, CompressedTensorsW8A8Fp8MoE)
    )


def are_rounded(experts: Any) -> bool:
    """Whether the experts' inputs are rounded to FP8, as their weights are."""
    return bool(experts.w13_weight.dtype.itemsize == 1 and experts.w13_weight.is_floating_point())


def rounding(experts: Any) -> str:
    """How experts round their inputs: BLOCKS, TOKENS, GIVEN, BATCH or NONE."""
    from sglang.srt.layers.quantization.w8a8_fp8 import W8A8FP8MoEMethod

    chosen = method_of(experts)
    if not are_rounded(experts):
        return NONE
    if _block_size(chosen):
        return BLOCKS
    strategy = getattr(getattr(chosen, "weight_quant", None), "strategy", None)
    if isinstance(chosen, W8A8FP8MoEMethod) or strategy == "channel":
        return TOKENS
    return BATCH if experts.w13_input_scale is None else GIVEN


def shape(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer; without blocks SGLang keeps its weight transposed."""
    outputs, inputs = layer.weight.shape
    return (outputs, inputs) if _has_blocks(layer) else (inputs, outputs)


def no_scale_for_norms(_original: Any, _linear: Any) -> None:
    """AROUND what a norm asks for the scale by which it may round rows for the layer behind it.

    There is none: the layer rounds them by its own given scale, and is measured with that.
    """


def describe(layer: Any) -> str:
    """What chooses the kernels of a linear layer, beside the shape and dtype of its weight."""
    method, scales = method_of(layer), _scales(layer, "weight")
    kernel = getattr(method, "w8a8_block_fp8_linear", None)
    named = getattr(getattr(kernel, "func", kernel), "__name__", "")
    said = [
        *(type(method).__name__, str(_block_size(method)), named),
        *(str(getattr(kernel, "keywords", "")), str(list(scales.shape)), str(scales.dtype)),
        *(name for name in ("block_fp8_as_mxfp8",) if getattr(method, name, False)),
        "a given scale" if getattr(layer, "input_scale", None) is not None else "",
    ]
    widened = getattr(layer, "_block_fp8_bf16_weight", None) is not None
    return " ".join(filter(None, said)) + " with a BF16 copy" * widened


def describe_experts(experts: Any) -> str:
    """The same of experts in FP8."""
    method, scales = method_of(experts), _scales(experts, "w13_weight")
    said = (_block_size(method), rounding(experts), list(scales.shape), scales.dtype)
    return " ".join(map(str, (type(method).__name__, *said)))


def method_of(module: Any) -> Any:
    """SGLang's method of a layer, or the scheme that a method of several hands over to."""
    return getattr(module, "scheme", None) or getattr(module, "quant_method", None)


def _block_size(method: Any) -> Any:
    return getattr(method, "weight_block_size", None)


def _has_blocks(layer: Any) -> bool:
    return bool(_block_size(method_of(layer)))


def _scales(layer: Any, name: str) -> torch.Tensor:
    """Of the layer's weight of this name."""
    inverse: torch.Tensor | None = getattr(layer, f"{name}_scale_inv", None)
    found: torch.Tensor = getattr(layer, f"{name}_scale") if inverse is None else inverse
    return found
