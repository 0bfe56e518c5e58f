"""Models that the gate does not serve, by their configuration and as they were loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.compute import marlin, mxfp4, quantization
from margingate.runtime.compat.compute.routers import experts
from margingate.runtime.compat.model import vision
from margingate.runtime.compat.model.architectures import has_two_pools
from margingate.runtime.probe.checks import loaded_model


@dataclass(frozen=True)
class ModelFamily:
    """Models that have something which the gate cannot undo, replay or measure yet."""

    has: str  # ends "because it ..."
    matches: Callable[[Any], bool]  # of SGLang's ModelConfig
    way_out: str = "serve it without the flag"

    def said(self, model: Any) -> str:
        """What the model has, with its value."""
        return self.has.format(model=model)


def _has_other_pools(model: Any) -> bool:
    """Whether it has two pools that are served neither as two nor as one.

    Layers with other head sizes fit no single pool; a chunk that starts anew is no window.
    """
    chunked = getattr(model.hf_text_config, "attention_chunk_size", None)
    other = model.is_hybrid_swa_compress or chunked
    return bool(other and has_two_pools(model))


def _has_a_state(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return model.attention_arch.name not in ("MHA", "MLA") or mambaish_config(model) is not None


def _is_quantized_as_known(model: Any) -> bool:
    known = (quantization.is_known, marlin.is_served, mxfp4.is_served)
    return any(each(model) for each in known)


# All others are served, dense ones and mixtures of experts, if the probe knows each operator.
REFUSED_FAMILIES = (
    ModelFamily("does not generate text", lambda model: not model.is_generation),
    ModelFamily("uses latent attention (MLA)", lambda model: model.attention_arch.name == "MLA"),
    ModelFamily(
        "has a second K/V pool for layers with other heads, or for chunks that are no windows",
        _has_other_pools,
    ),
    ModelFamily("is an encoder-decoder", lambda model: model.is_encoder_decoder),
    ModelFamily(
        f"is multimodal and none of {vision.SERVED}, which are served",
        lambda model: model.is_multimodal and not vision.is_known(model),
    ),
    ModelFamily("keeps recurrent state (Mamba or linear attention)", _has_a_state),
    ModelFamily(
        "is quantized ({model.quantization}), of which FP8 is known, gpt-oss in MXFP4, and packed "
        "weights for Marlin (AWQ, GPTQ, compressed-tensors)",
        lambda model: model.quantization is not None and not _is_quantized_as_known(model),
        "use a checkpoint in BF16 or in FP8, leave --quantization away, or serve it without the "
        "flag",
    ),
    ModelFamily(
        loaded_model.SHARED.format("the model"), quantization.shares_scales, loaded_model.BY_ROW
    ),
)


def refuse_model(model: Any) -> None:
    """Check SGLang's ModelConfig. Raises GateError naming what the model has."""
    for family in REFUSED_FAMILIES:
        if family.matches(model):
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because it "
                f"{family.said(model)}: {family.way_out}."
            )


def refuse_stock_experts(model: Any, config: GateConfig) -> None:
    """A loaded model's experts for Marlin, where no plan runs them in pieces. Raises GateError.

    A row of a verify pass would depend on which experts the pass's other rows choose.
    """
    if config.invariant or config.policy == "observe":
        return
    for name, module in experts(model):
        if marlin.are_experts(module):
            raise GateError(
                f"--gate-fast-path is {config.fast_path}, but Marlin shares out the sums of {name} "
                "by the experts that all rows choose: use --gate-fast-path invariant."
            )


def refuse_other_masks(model: Any, config: GateConfig) -> None:
    """A loaded model's attention that lets a token of a prompt see later ones. Raises GateError.

    A prompt's columns then depend on where it is cut, and the gate cuts prompts.
    """
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    if config.policy == "observe":
        return
    for name, module in vision.text_modules(model):
        if isinstance(module, RadixAttention) and module.attn_type != AttentionType.DECODER:
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because {name} lets tokens "
                f"of a prompt see later ones ({module.attn_type.value}): serve it without the flag."
            )


def refuse_column_type(server_args: Any) -> None:
    """--kv-cache-dtype names another type than the model's. Raises GateError."""
    dtype = settings.model_config(server_args).dtype
    args = settings.view(server_args)
    if args.kv_cache_dtype != "auto" and dtype != torch.bfloat16:
        raise GateError(
            f"--kv-cache-dtype is {args.kv_cache_dtype}, but the model's type is {dtype}, so that "
            "K/V columns would be read back as other numbers: use auto."
        )


def refuse_columns(runner: Any) -> None:
    """K/V columns as they were set up: a checkpoint may ask for scaled ones. Raises GateError.

    A column that is read back as another number than was written gives a prompt other bits
    where a part of it is cached.
    """
    if runner.kv_cache_dtype != runner.dtype:
        raise GateError(
            f"--deterministic-gate does not serve this model yet, because its K/V columns are "
            f"{runner.kv_cache_dtype} and it computes in {runner.dtype}: use --kv-cache-dtype auto "
            "and a checkpoint without scales for them, or serve it without the flag."
        )
    for name, module in runner.model.named_modules():
        scales = (getattr(module, "k_scale_float", None), getattr(module, "v_scale_float", None))
        if any(scale not in (None, 1.0) for scale in scales):
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because {name} scales its "
                "K/V columns: use a checkpoint without scales, or serve it without the flag."
            )
