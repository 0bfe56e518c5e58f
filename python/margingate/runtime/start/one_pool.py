"""One K/V pool for models whose windows SGLang would give one of their own.

A rollback, a repair and the tree know one pool. SGLang has a switch for it, which the gate sets: a
layer with a window then keeps the columns that have left it, too.
"""

from __future__ import annotations

import logging
from typing import Any

from margingate.runtime.compat import settings
from margingate.runtime.compat.architectures import has_two_pools

logger = logging.getLogger(__name__)


def choose(server_args: Any) -> None:
    """Before SGLang resolves the arguments; for a model with one pool this changes nothing."""
    settings.choose(server_args, disable_hybrid_swa_memory=True)


def log_room(runner: Any) -> None:
    """What it costs, once the pool is there; says nothing of a model that has one anyway."""
    if not has_two_pools(runner.model_config):
        return
    ratio = float(settings.in_effect("swa_full_tokens_ratio"))
    size, shares = runner.token_to_kv_pool.size, layers_of_each_kind(runner.model_config)
    logger.info(
        "margingate sets --disable-hybrid-swa-memory: one K/V pool has room for %d tokens, where "
        "SGLang's two would have room for %d (--swa-full-tokens-ratio %g).",
        *(size, room_of_two(size, *shares, ratio), ratio),
    )


def layers_of_each_kind(model: Any) -> tuple[int, int]:
    """How many see everything, and how many a window, of SGLang's ModelConfig."""
    from sglang.srt.configs.model_config import get_hybrid_layer_ids

    windowed, full = get_hybrid_layer_ids(model.hf_config.architectures, model.hf_text_config)
    return len(full or ()), len(windowed or ())


def room_of_two(tokens: int, full: int, windowed: int, ratio: float) -> int:
    """Tokens that the layers without a window have room for, of the memory of one pool.

    Args:
        tokens: room of the one pool.
        full, windowed: layers of each kind, of columns of one size.
        ratio: room of the windowed layers' pool over that of the others.
    """
    return int(tokens * (full + windowed) / (full + ratio * windowed))
