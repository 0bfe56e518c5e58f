"""Which layers and experts with packed weights the gate knows, as SGLang loaded them for Marlin.

Weights are whole numbers of 4 or 8 bits, with a scale, and in AWQ a zero point, for each group of
inputs; rows stay as they are. AWQ, GPTQ and compressed-tensors come to the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from margingate.runtime.compat import release
from margingate.runtime.compat.compute.quantization import checkpoint_says
from margingate.runtime.compat.instance_patches import (
    ON_MARLIN_EXPERTS,
    in_module,
    replaced_in_module,
)
from margingate_kernels.marlin_weights import MarlinWeights

# As SGLang's ModelConfig calls them, where Marlin can have such a checkpoint's weights.
METHODS = ("awq_marlin", "gptq_marlin")
COMPRESSED, PACKED = "compressed-tensors", "pack-quantized"
BY_TRITON = "moe_wna16"  # experts by SGLang's Triton kernel; layers by Marlin, if they are GPTQ's
_ATOMIC = "use_atomic_add"  # an argument of the kernel of experts
_WORD = 32  # bits


def is_served(model: Any) -> bool:
    """Whether SGLang's ModelConfig says a model whose linear layers and experts may be such.

    A head in 4 bits is no layer that the probe knows.
    """
    packed = model.quantization == COMPRESSED and checkpoint_says(model, "format") == PACKED
    mixed = model.quantization == BY_TRITON and checkpoint_says(model, "quant_method") == "gptq"
    known = packed or mixed or model.quantization in METHODS
    return known and not checkpoint_says(model, "lm_head")


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


def weights(layer: Any) -> MarlinWeights | None:
    """Those of a layer, as Marlin has them; None of reordered inputs, and where all are one group.

    Raises AttributeError for a layer that Marlin has not repacked, as on a CPU.
    """
    held = scales(layer)
    named = [getattr(layer, name, None) for name in ("g_idx", "g_idx_sort_indices")]
    reordered = any(each is not None and each.numel() for each in named)
    if reordered or len(held) < 2:
        return None
    packed = layer.qweight if hasattr(layer, "qweight") else layer.weight_packed
    zeros = getattr(layer, "qzeros", getattr(layer, "weight_zero_point", None))
    _, inputs = shape(layer)
    bits = packed.numel() * _WORD // (held.shape[1] * inputs)
    return MarlinWeights(
        packed.data, held.data, zeros.data if zeros is not None and zeros.numel() else None, bits
    )


def describe(layer: Any) -> str:
    """What chooses the kernel of such a layer, beside its shape and dtype."""
    scheme = layer.scheme
    config = _kernel_config(scheme) or scheme.quant_config
    return f"{type(scheme).__name__} {config} {list(scales(layer).shape)}"


def experts_are_served() -> bool:
    """Whether this release lets atomic adds be switched off for experts."""
    return release.of_release("MARLIN_EXPERTS", newest=True)


def are_experts(experts: Any) -> bool:
    """Whether Marlin multiplies by the weights of this FusedMoE."""
    from sglang.srt.layers.quantization.awq.schemes import AWQMoEScheme
    from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE
    from sglang.srt.layers.quantization.gptq.schemes import GPTQMarlinMoEScheme

    # Not those that are derived of them: they bring such weights to other kernels.
    known = (AWQMoEScheme, GPTQMarlinMoEScheme, CompressedTensorsWNA16MoE)
    return type(getattr(experts, "scheme", None)) in known


def are_experts_by_triton(experts: Any) -> bool:
    """Whether SGLang's fused Triton kernel multiplies by such weights of this FusedMoE."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16TritonMoE,
    )
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method

    return type(_method(experts)) in (CompressedTensorsWNA16TritonMoE, MoeWNA16Method)


def experts_scales(experts: Any) -> torch.Tensor:
    """[experts, groups, outputs] of the first product, in the dtype of rows and results."""
    found: torch.Tensor = getattr(experts, _scales_of(experts, "w13"))
    return found


def experts_shape(experts: Any) -> tuple[int, int, int]:
    """Experts on this rank, outputs of the first product, and inputs."""
    config = experts.moe_runner_config
    products = 2 if config.is_gated else 1
    outputs = products * config.intermediate_size_per_partition
    return config.num_local_experts, outputs, config.hidden_size


def describe_experts(experts: Any) -> str:
    """What chooses the kernels of packed experts, beside their shape and dtype."""
    method = _method(experts)
    of_config = ("weight_bits", "group_size", "desc_act", "zero_point", "is_sym", "has_zp")
    said = [
        f"{name}={getattr(held, name)}"
        for held, names in (
            (method, ("num_bits", "group_size", "actorder", "sym", "is_k_full")),
            (getattr(method, "quant_config", None), of_config),
            (getattr(method, "kernel", None), ("is_k_full",)),
        )
        for name in names
        if hasattr(held, name)
    ]
    scales = [getattr(experts, _scales_of(experts, name)) for name in ("w13", "w2")]
    said += [str(list(each.shape)) for each in scales]
    return " ".join((type(method).__name__, *said, str(scales[0].dtype)))


def multiply_in_order(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND fused_marlin_moe, by which all experts go to Marlin: without atomic adds.

    On Hopper SGLang asks for them in every call: partial sums would be added in any order.
    """
    # SGLang decides inside of the function, and hands it to the kernel by name.
    in_order = partial(_in_order, in_module(ON_MARLIN_EXPERTS))
    with replaced_in_module(ON_MARLIN_EXPERTS, in_order):
        return original(*args, **kwargs)


def _in_order(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _ATOMIC not in kwargs:
        name = ON_MARLIN_EXPERTS.name
        raise RuntimeError(f"{name} was called without {_ATOMIC}: nothing is known")
    return kernel(*args, **{**kwargs, _ATOMIC: False})


def without_atomic_adds(_chosen: bool, *_args: Any, **_kwargs: Any) -> bool:
    """AFTER should_use_atomic_add_reduce: no. Partial sums would be added in any order."""
    return False


def _method(experts: Any) -> Any:
    """SGLang's scheme of experts, or their method where there is none."""
    return getattr(experts, "scheme", None) or getattr(experts, "quant_method", None)


def _scales_of(experts: Any, name: str) -> str:
    """The attribute with the scales of w13 or w2."""
    given = f"{name}_scales"
    return given if hasattr(experts, given) else f"{name}_weight_scale"


def _kernel_config(scheme: Any) -> Any:
    """SGLang's MarlinLinearLayerConfig; None of AWQ, whose layers say their sizes themselves."""
    holder = scheme if hasattr(scheme, "kernel_config") else getattr(scheme, "kernel", None)
    return getattr(holder, "kernel_config", None)
