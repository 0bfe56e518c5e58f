"""Models that the gate does not serve, by their configuration and as they were loaded."""

from __future__ import annotations

from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.compat import settings


def refuse_model(model: Any, *, observes: bool = False) -> None:
    """Check SGLang's ModelConfig. Raises GateError naming what the model has.

    Args:
        observes: margins are only looked at, as a study of a model with windows does.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config

    text = model.hf_text_config
    kinds = (
        (not model.is_generation, "does not generate text"),
        (model.attention_arch.name == "MLA", "uses latent attention (MLA)"),
        (
            model.is_hybrid_swa or (not observes and _has_windows(text)),
            "mixes full and sliding-window attention",
        ),
        (model.is_encoder_decoder, "is an encoder-decoder"),
        (model.is_multimodal, "is multimodal"),
        (
            model.attention_arch.name not in ("MHA", "MLA") or mambaish_config(model) is not None,
            "keeps recurrent state (Mamba or linear attention)",
        ),
        (model.quantization is not None, f"is quantized ({model.quantization})"),
    )
    for applies, what in kinds:
        if applies:
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because it {what}: serve it "
                "without the flag."
            )


def _has_windows(text: Any) -> bool:
    """Whether some layers see a window only; SGLang does not call all such models hybrid."""
    return "sliding_attention" in (getattr(text, "layer_types", None) or ())


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
