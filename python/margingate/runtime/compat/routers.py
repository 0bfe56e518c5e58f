"""What SGLang's routers say of themselves, in the words of the newest release."""

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
