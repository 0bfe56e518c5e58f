"""The gate's attention kernels against float64, on this device, with what the model's layers ask.

No GPU had run them with windows, caps, sinks or 256 lanes when they were written. So for a model
that has those, each start runs both kernels on a made-up sequence, around the ends of the window,
and ends where they are wrong or disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from margingate.config import GateError
from margingate.runtime.attention import invariant_attention, layer_rules
from margingate.runtime.attention.invariant_attention import OwnAttention
from margingate.runtime.probe.checks.attention_error import (
    Found,
    LayerKind,
    measure,
    measure_shared,
)
from margingate_kernels import Rules
from margingate_kernels.attention import GLUON_LANES

logger = logging.getLogger(__name__)

# Of a row in a head: norm of the difference / norm of the oracle. A key that is left out of a
# window of 4,096 is 0.016 or more; roundings of weights and of results take up to half of it.
BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check(runner: Any, backend: Any) -> None:
    """After forwards of the model: each kind of its layers that asks for what is new.

    Raises:
        GateError: an error above BOUND, or bits that depend on the kernel or on company.
    """
    own = invariant_attention.of(backend)
    if own is None:
        return
    every = kinds(layer_rules.attention_layers(runner.model), own.seen)
    for kind in filter(is_new, every):
        found = measure(kind, runner.dtype, runner.device, runner.model_config.context_len)
        logger.info(
            "margingate: attention with %s: error %.4f of float64, %s bits in prefill and decode.",
            *(kind, found.error, "the same" if found.same_bits else "other"),
        )
        refuse(kind, found, BOUND[runner.dtype])
    share_keys(runner, own, every)


def share_keys(runner: Any, own: OwnAttention, every: Sequence[LayerKind]) -> None:
    """Let programs share the keys of a row in prefills of few rows, if that changes no bit."""
    longest = runner.model_config.context_len
    shared = False
    for kind in every:
        same = measure_shared(kind, runner.dtype, runner.device, longest)
        if same is False:
            logger.warning(
                "margingate: attention with %s has other bits where programs share the keys of a "
                "row, so they never do: short prompts behind long cached ones take longer.",
                kind,
            )
            return
        shared = shared or same is not None
    if shared:
        own.share_keys()


def kinds(layers: Iterable[Any], seen: dict[int, Rules]) -> list[LayerKind]:
    """A layer of each kind, with the rules that it was seen with."""
    found: dict[object, LayerKind] = {}
    for layer in layers:
        rules = seen.get(layer.layer_id, layer_rules.declared(layer))
        shape = (layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim)
        key = (*shape, layer.scaling, rules.window, rules.cap, rules.sinks is not None)
        found.setdefault(key, LayerKind(*shape, layer.scaling, rules))
    return list(found.values())


def is_new(kind: LayerKind) -> bool:
    """Whether layers of this kind ask for what no GPU had run when it was written."""
    rules = kind.rules
    asks = rules.sinks is not None or rules.window is not None or bool(rules.cap)
    return asks or kind.head_size > GLUON_LANES


def refuse(kind: LayerKind, found: Found, bound: float) -> None:
    """Raises GateError for attention that must not serve."""
    if not found.error <= bound:
        raise GateError(
            f"--deterministic-gate computes attention with {kind} with an error of "
            f"{found.error:.4f} on this device, where {bound} is allowed: serve this model without "
            "the flag, and report it."
        )
    if not found.same_bits:
        raise GateError(
            f"--deterministic-gate computes attention with {kind} with other bits in decode than "
            "in prefill, or in other company, on this device: serve this model without the flag, "
            "and report it."
        )
