"""What each attention layer of a model asks of a kernel, and whether the gate's kernels do it.

Layers of one model differ: Gemma 3 has five with a window to one without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from margingate.config import GateError
from margingate.runtime.compat.host.attention import attends_row_by_row
from margingate.runtime.compat.kv import window_pool
from margingate_kernels import Rules
from margingate_kernels.attention_checks import HEAD_SIZES, MOST_GROUPED

DTYPES = (torch.bfloat16, torch.float16)


def attention_layers(model: Any) -> list[Any]:
    """SGLang's attention layers of a model."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def window_of(layer: Any) -> int | None:
    """Keys before its own that a row of this layer sees; None: all."""
    window: int | None = layer.sliding_window_size
    return None if window is None or window < 0 else window


def windows_of(model: Any) -> list[int]:
    """Those of a model's layers, in keys before a row's own."""
    found = map(window_of, attention_layers(model))
    return [window for window in found if window is not None]


def declared(layer: Any) -> Rules:
    """What a layer asks for by its own attributes; sinks come with its calls."""
    return Rules(window_of(layer), float(layer.logit_cap or 0.0))


def rules_of(layer: Any, extras: Mapping[str, Any]) -> Rules:
    """What a layer asks for, with what SGLang's backend passes on.

    Raises:
        RuntimeError: something that the kernels do not do, or that is not the layer's own.
    """
    rules = declared(layer)._replace(sinks=extras.get("sinks"))
    window = extras.get("sliding_window_size", -1 if rules.window is None else rules.window)
    if extras.get("score_mod") is not None:
        raise RuntimeError("margingate: attention with a function of its own on scores")
    if (window if window is not None and window >= 0 else None) != rules.window:
        raise RuntimeError(f"margingate: attention with the window {window}, not {rules.window}")
    if (extras.get("logit_cap") or 0.0) != rules.cap:
        raise RuntimeError(
            f"margingate: attention with the cap {extras.get('logit_cap')}, not {rules.cap}"
        )
    return rules


def unfit(backend: Any, runner: Any) -> str:
    """Why the kernels cannot serve this backend and model; empty where they can."""
    layers = attention_layers(runner.model)
    if type(backend).__name__ != "TritonAttnBackend" or runner.device != "cuda":
        return "the attention backend is not Triton's on CUDA"
    if not layers:
        return "the model has no attention layers that are known"
    pool = window_pool.whole(runner.token_to_kv_pool)
    if runner.dtype not in DTYPES or getattr(pool, "store_dtype", None) != runner.dtype:
        return "the K/V cache has not the model's dtype"
    if getattr(backend, "use_mla", True) or getattr(backend, "dcp_size", 1) > 1:
        return "columns are latent or spread over ranks"
    if len({(each.tp_q_head_num, each.qk_head_dim) for each in layers}) > 1:
        return "layers have other heads than others"
    return next(filter(None, map(_unfit_layer, layers)), "")


def _unfit_layer(layer: Any) -> str:
    if layer.qk_head_dim != layer.v_head_dim or layer.qk_head_dim not in HEAD_SIZES:
        return f"a head has {layer.qk_head_dim} lanes, not one of {HEAD_SIZES}"
    if layer.tp_q_head_num > MOST_GROUPED * layer.tp_k_head_num:
        return f"more than {MOST_GROUPED} heads share a K/V head"
    plain = (
        (not layer.logit_cap or layer.logit_capping_method == "tanh")
        and not layer.is_cross_attention
        and layer.attn_type == AttentionType.DECODER
        and (layer.k_scale is None or layer.k_scale_float == layer.v_scale_float == 1.0)
        and layer.xai_temperature_len <= 0
    )
    return "" if plain else "its attention has a cap that is no tanh, a scale or a mask"


def refuse_others(backend: Any, runner: Any) -> None:
    """A window or a cap where neither the gate's kernels nor SGLang's backend do it rightly.

    SGLang's Triton decode leaves out the first key of a window, which its prefill sees: a verifier
    with it would repair answers to wrong ones. Its torch-native attention knows no caps. Of other
    backends this is not known.

    Raises:
        GateError: the model has a layer of that kind, and the kernels cannot serve it.
    """
    reason, name = unfit(backend, runner), type(backend).__name__
    for layer in attention_layers(runner.model) if reason else ():
        window = None if attends_row_by_row(backend) else window_of(layer)
        has = f"sees {window + 1} tokens" if window is not None else ""
        has = f"caps scores at {layer.logit_cap:g}" if layer.logit_cap else has
        if has:
            raise GateError(
                f"--deterministic-gate does not serve a layer that {has} by {name}, and its own "
                f"attention cannot take its place, since {reason}: use --attention-backend triton "
                "on a GPU, or serve this model without the flag."
            )


def refuse_short_windows(runner: Any) -> None:
    """Windows of a server that decodes by SGLang's Triton kernel. Raises GateError."""
    if windows := set(windows_of(runner.model)):
        raise GateError(
            "--gate-fast-path is stock, but SGLang's Triton decode leaves out the first key of "
            f"each window, and this model has windows of {', '.join(map(str, sorted(windows)))} "
            "keys before a token: use --gate-fast-path invariant, or --attention-backend "
            "flashinfer."
        )
