"""Which of SGLang's quantization methods and schemes the gate knows, and which can be loaded into.

SGLang puts one on each layer, experts and embedding. A class that is not named here is refused: a
derived one may bring the same weights to another kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from margingate.runtime.compat.compute import marlin, mxfp4, quantization
from margingate.runtime.compat.model import vision


def _always(_module: Any) -> bool:
    return True


def _is_for_marlin(experts: Any) -> bool:
    return marlin.are_experts(experts) and marlin.experts_are_served()


def _is_mxfp4(experts: Any) -> bool:
    return mxfp4.are_experts(experts) or mxfp4.are_widened(experts)


# By name of the class: whether a module that has it is an operator which the probe measures.
# Embeddings are looked up row by row; a head is measured by what computes logits.
KNOWN: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        **dict.fromkeys(("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"), _always),
        **dict.fromkeys(
            ("Fp8LinearMethod", "W8A8Fp8LinearMethod", "CompressedTensorsW8A8Fp8"),
            quantization.is_fp8_layer,
        ),
        **dict.fromkeys(
            ("AWQMarlinLinearScheme", "GPTQMarlinLinearScheme", "CompressedTensorsWNA16"),
            marlin.is_layer,
        ),
        **dict.fromkeys(
            (
                *("UnquantizedFusedMoEMethod", "Fp8MoEMethod", "W8A8FP8MoEMethod"),
                "CompressedTensorsW8A8Fp8MoE",
            ),
            quantization.are_known,
        ),
        **dict.fromkeys(
            ("AWQMoEScheme", "GPTQMarlinMoEScheme", "CompressedTensorsWNA16MoE"), _is_for_marlin
        ),
        **dict.fromkeys(
            ("CompressedTensorsWNA16TritonMoE", "MoeWNA16Method"), marlin.are_experts_by_triton
        ),
        "Mxfp4MoEMethod": _is_mxfp4,
    }
)
_UNQUANTIZED = "Unquantized"  # how the names of such methods begin
# Those of KNOWN that may leave parameters as the model made them. CompressedTensorsWNA16MoE gives
# them back their shapes, but replaces a workspace that CUDA graphs go on to write to.
_LOADED_INTO = (
    *("Fp8LinearMethod", "CompressedTensorsW8A8Fp8"),
    *("Fp8MoEMethod", "CompressedTensorsW8A8Fp8MoE", "MoeWNA16Method"),
)


def unknown(model: Any) -> tuple[str, str] | None:
    """The first module of a loaded model, and its class, whose kernel nobody measures.

    A vision tower is left out.
    """
    for name, module, kind in _kinds(vision.text_modules(model)):
        if kind not in KNOWN or not KNOWN[kind](module):
            return name, kind
    return None


def fixed(model: Any) -> tuple[str, str] | None:
    """The first module, and its class, into which SGLang cannot load other weights.

    It repacked, transposed or deleted parameters when it loaded them: a load would end half way, or
    fill weights of another form. What is left unquantized it loads into in place. With
    `--load-format flash_rl` it kept the loaders, and quantizes into the same buffers.
    """
    if getattr(model, "flash_rl_initial_load_complete", False):
        return None
    for name, module, kind in _kinds(model.named_modules()):
        if not kind.startswith(_UNQUANTIZED) and not _is_loaded_into(module, kind):
            return name, kind
    return None


def _is_loaded_into(module: Any, kind: str) -> bool:
    """Whether all parameters are still those that the model made, and nothing was derived of them.

    One that SGLang put in the place of another has no `weight_loader`. One in UE8M0 holds scales
    that were made of the checkpoint's, and is taken for done the next time.
    """
    own = module.parameters(recurse=False)
    kept = all(
        hasattr(each, "weight_loader") and not getattr(each, "format_ue8m0", False) for each in own
    )
    derived = getattr(module, "_block_fp8_bf16_weight", None) is not None
    return kind in _LOADED_INTO and kept and not derived


def _kinds(modules: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, str]]:
    """Of the modules that have one, the class of SGLang's method or scheme of their weights.

    Those of attention say scales of K/V columns, which are looked at by themselves.
    """
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    for name, module in modules:
        method = quantization.method_of(module)
        if method is not None and not isinstance(method, BaseKVCacheMethod):
            yield name, module, type(method).__name__
