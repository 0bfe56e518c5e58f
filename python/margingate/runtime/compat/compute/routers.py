"""SGLang's routers and experts in a model, and what routers say of themselves."""

from __future__ import annotations

from typing import Any

from margingate.runtime.compat.release import of_release


def _shared_slots(topk_config: Any) -> int:
    found: int = topk_config.num_shared_topk_slots
    return found


_shared_slots_of = of_release("shared_slots", _shared_slots)


def routed_experts(topk_config: Any) -> int:
    """How many experts a router chooses for a row, less those that every row goes to."""
    return int(topk_config.top_k) - _shared_slots_of(topk_config)


def routers(model: Any) -> list[tuple[str, Any]]:
    """SGLang's TopK modules, by name."""
    from sglang.srt.layers.moe.topk import TopK

    return [each for each in model.named_modules() if isinstance(each[1], TopK)]


def use_linear_kernels(model: Any) -> None:
    """Let the routers of gpt-oss be linear layers in forwards of any size.

    A kernel of few rows would take their weights at up to 128 rows, past the method that is
    measured and kept to row counts. Mutates the modules.
    """
    for module in model.modules():
        if getattr(module, "_use_tinygemm", False):
            module._use_tinygemm = False


def experts(model: Any) -> list[tuple[str, Any]]:
    """SGLang's FusedMoE modules, by name."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return [each for each in model.named_modules() if isinstance(each[1], FusedMoE)]
