"""What a checkpoint is, as its config.json says, before SGLang has decided anything."""

from __future__ import annotations

import os
from typing import Any

_SIZES = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)


def checkpoint_config(args: Any) -> dict[str, Any]:
    """The named model's config; empty where it is not to be read, which SGLang then says."""
    path = str(getattr(args, "model_path", None) or "")
    return _config_of(path, getattr(args, "revision", None))


def _config_of(path: str, revision: str | None = None) -> dict[str, Any]:
    from transformers import PretrainedConfig

    if path.lower() in ("", "none", "dummy"):
        return {}
    try:
        found, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):
        return {}
    return dict(found)


def folder_config(model_path: str) -> dict[str, Any] | None:
    """The configuration of a folder's weights; None where it is no folder, or cannot be read.
    Raises nothing.
    """
    if not os.path.isdir(model_path):  # as Path's, but for forbidden folders and long names
        return None
    try:
        return _config_of(model_path) or None
    except (AttributeError, TypeError):  # a config.json that is no object
        return None


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder's configuration says of its weights' quantization, empty where they have none;
    None where that is no object.
    """
    said = config.get("quantization_config") or {}
    return said if isinstance(said, dict) else None


def sizes_of(config: dict[str, Any]) -> dict[str, int]:
    """The sizes by which SGLang makes a model's parameters, as far as a configuration names them;
    of a vision model, its decoder's.
    """
    nested = config.get("text_config")
    named = {**config, **(nested if isinstance(nested, dict) else {})}
    return {name: named[name] for name in _SIZES if type(named.get(name)) is int}


def architectures(args: Any) -> tuple[str, ...]:
    """Names of model classes that the named model asks for."""
    return tuple(checkpoint_config(args).get("architectures") or ())


def has_sinks(args: Any) -> bool:
    """Whether the named model is one of those with attention sinks, as gpt-oss."""
    from sglang.srt.configs.model_config import SWA_SINK_ARCHS

    return not SWA_SINK_ARCHS.isdisjoint(architectures(args))


def has_two_pools(model: Any) -> bool:
    """Whether SGLang would keep layers with a window in a K/V pool of their own.

    Args:
        model: SGLang's ModelConfig, which says so itself unless one pool was asked for.
    """
    from sglang.srt.configs.model_config import is_hybrid_swa_model

    return bool(is_hybrid_swa_model(model.hf_config.architectures, model.hf_text_config))
