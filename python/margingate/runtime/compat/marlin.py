"""Which linear layers with packed weights the gate knows, as SGLang loaded them for Marlin.

Weights are whole numbers of 4 or 8 bits, with a scale, and in AWQ a zero point, for each group of
inputs; rows stay as they are. AWQ, GPTQ and compressed-tensors come to the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from margingate.runtime.compat.quantization import checkpoint_says, has_experts

# As SGLang's ModelConfig calls them, where Marlin can have such a checkpoint's weights.
METHODS = ("awq_marlin", "gptq_marlin")
COMPRESSED, PACKED = "compressed-tensors", "pack-quantized"


def is_served(model: Any) -> bool:
    """Whether SGLang's ModelConfig says a dense model whose linear layers may be such.

    A head in 4 bits is no layer that the probe knows.
    """
    packed = model.quantization == COMPRESSED and checkpoint_says(model, "format") == PACKED
    if model.quantization not in METHODS and not packed:
        return False
    return not (has_experts(model) or checkpoint_says(model, "lm_head"))


def is_layer(module: Any) -> bool:
    """Whether Marlin multiplies by this layer's weights."""
    from sglang.srt.layers.quantization.awq.schemes import AWQMarlinLinearScheme
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
    from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinLinearScheme

    scheme = getattr(module, "scheme", None)
    known = (AWQMarlinLinearScheme, GPTQMarlinLinearScheme, CompressedTensorsWNA16)
    return isinstance(scheme, known) and hasattr(getattr(module, "quant_method", None), "apply")


def scales(layer: Any) -> torch.Tensor:
    """[groups, outputs], in the dtype of the layer's inputs and results."""
    found: torch.Tensor = layer.scales if hasattr(layer, "scales") else layer.weight_scale
    return found


def shape(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    config = _kernel_config(layer.scheme)
    if config is None:
        return layer.output_size_per_partition, layer.input_size_per_partition
    inputs, outputs = config.partition_weight_shape
    return outputs, inputs


def describe(layer: Any) -> str:
    """What chooses the kernel of such a layer, beside its shape and dtype."""
    scheme = layer.scheme
    config = _kernel_config(scheme) or scheme.quant_config
    return f"{type(scheme).__name__} {config} {list(scales(layer).shape)}"


def without_atomic_adds(_chosen: bool, *_args: Any, **_kwargs: Any) -> bool:
    """AFTER should_use_atomic_add_reduce: no. Partial sums would be added in any order."""
    return False


def _kernel_config(scheme: Any) -> Any:
    """SGLang's MarlinLinearLayerConfig; None of AWQ, whose layers say their sizes themselves."""
    holder = scheme if hasattr(scheme, "kernel_config") else getattr(scheme, "kernel", None)
    return getattr(holder, "kernel_config", None)
