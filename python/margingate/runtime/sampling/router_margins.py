"""How near a forward came to other experts, by row: the smallest router margin of all layers.

Only where decode steps are not canonical, on the stock fast path, and only of a model that routes
tokens to experts. On the invariant path a router's margin decides nothing where a row is canonical.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from margingate.config import GateConfig, GateError
from margingate.runtime.compat.compute.routers import experts, routed_experts, routers
from margingate_kernels import Routing, router_margin

TARGET = "layers.moe.topk.TopK.forward"  # of the hook, below sglang.srt
ROWS = 16384  # of a forward whose margins are kept; a larger one's last rows are unknown
_ATTRIBUTE = "margingate_router"  # of SGLang's TopK, and of the model


@dataclass(frozen=True, slots=True)
class _Router:
    """One layer's, in the buffer of all."""

    least: torch.Tensor
    routing: Routing | None  # None: a choice that nobody knows how to measure
    reset: bool  # the first of a forward


class RouterMargins:
    """The buffer that the routers of one model fold their margins into.

    Its address is in CUDA graphs. The first router of a forward resets it, so that nothing has to
    be done before one. All on the stream of the forward, and nothing waits.
    """

    def __init__(self, every: Sequence[Any], device: torch.device | str) -> None:
        """Mutates all of SGLang's TopK modules: each knows its place from here on."""
        # NaN until a router was seen to run: a row of which nobody knows is verified.
        with torch.inference_mode(False):  # forwards of both modes write to it
            self._least = torch.full((ROWS,), math.nan, device=device)
        for i, topk in enumerate(every):
            setattr(topk, _ATTRIBUTE, _Router(self._least, routing_of(topk), reset=i == 0))

    def sampled(self, forward_batch: Any, rows: int) -> torch.Tensor:
        """Of the rows that get a token in the forward that ran last: float32 [rows], a copy.

        Args:
            forward_batch: SGLang's ForwardBatch; a decode step's rows, or each prompt's last one.
        """
        if forward_batch.forward_mode.is_decode():
            known = self._least[:rows]
            return torch.nn.functional.pad(known, (0, rows - len(known)), value=math.nan)
        last = torch.cumsum(forward_batch.extend_seq_lens, 0) - 1
        found = self._least[last.clamp(max=ROWS - 1)]
        return found.masked_fill(last >= ROWS, math.nan)


def before_topk(
    topk: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    *_args: Any,
    dynamic_expert_bias: torch.Tensor | None = None,
    **_kwargs: Any,
) -> None:
    """BEFORE TopK.forward: fold this layer's margins, in decode graphs too.

    A graph replays the kernel and not this function.
    """
    router: _Router | None = getattr(topk, _ATTRIBUTE, None)
    if router is None:  # of another model
        return
    if router.routing is None:
        router.least[: len(hidden_states)].fill_(math.nan)
        return
    routing, bias = router.routing, topk.topk_config.correction_bias
    if dynamic_expert_bias is not None:
        routing, bias = routing._replace(scoring="sigmoid"), dynamic_expert_bias[:ROWS]
    router_margin(router_logits[:ROWS], routing, router.least, bias=bias, reset=router.reset)


def of(model: Any) -> RouterMargins | None:
    """The margins of this model's routers, where they are looked at."""
    found: RouterMargins | None = getattr(model, _ATTRIBUTE, None)
    return found


def unseen(model: Any) -> float:
    """The router margin of a row where none is looked at: +inf, or NaN if the model has routers."""
    return math.nan if routers(model) or experts(model) else math.inf


def watch(model: Any, config: GateConfig, device: torch.device | str) -> bool:
    """Whether the model has routers; their margins are looked at from here on.

    Before its first forward. Mutates the model.

    Raises:
        GateError: `config` would let rows go by margins that say too little of such a model.
    """
    every = [topk for _, topk in routers(model)]
    layers = [layer for _, layer in experts(model)]
    if not every and not layers:
        return False
    _refuse(config, _unknown(every, layers))
    setattr(model, _ATTRIBUTE, RouterMargins(sorted(every, key=_layer), device))
    return True


def _refuse(config: GateConfig, unknown: str) -> None:
    if config.policy != "margin" or config.guarantee == "exact":
        return
    way_out = "use --gate-guarantee exact, or --gate-policy always"
    if unknown:
        raise GateError(
            f"--gate-guarantee sparse is not served with this model, because {unknown}, so that a "
            f"near-tie of experts would go unseen: {way_out}."
        )
    if config.router_threshold is None:
        raise GateError(
            "--gate-guarantee sparse is not served with this model on --gate-fast-path stock, "
            "because its tokens are routed to experts, and a near-tie of a router moves logits by "
            f"more than --gate-threshold allows for: {way_out}, or measure a "
            "--gate-router-threshold for it with margingate study."
        )


def _unknown(every: Sequence[Any], of_layers: Sequence[Any]) -> str:
    """What of a model's routing cannot be measured; empty: nothing."""
    layers = Counter(map(_layer, every))
    for topk in every:
        if routing_of(topk) is None:
            return f"the router of layer {_layer(topk)} chooses in a way of its own"
        if layers[_layer(topk)] > 1:
            return f"layer {_layer(topk)} has {layers[_layer(topk)]} routers"
    for layer in map(_layer, of_layers):
        if layer not in layers:
            return f"the experts of layer {layer} have a router of their own"
    return ""


def _layer(module: Any) -> int:
    return int(module.layer_id)


def routing_of(topk: Any) -> Routing | None:
    """How one of SGLang's TopK modules chooses; None where its margin cannot be measured."""
    topk_config = topk.topk_config
    # A module that was given a forward of its own goes around our hook.
    if topk_config.custom_routing_function is not None or "forward" in vars(topk):
        return None
    k = routed_experts(topk_config)
    if topk_config.use_grouped_topk:  # with a bias SGLang takes the sigmoid here in any case
        return Routing(k, "sigmoid", topk_config.num_expert_group or 1, topk_config.topk_group or 1)
    if topk_config.correction_bias is None:  # all scores that it knows have the order of the logits
        return Routing(k)
    scoring = topk_config.scoring_func
    return Routing(k, scoring) if scoring in ("softmax", "sigmoid") else None
