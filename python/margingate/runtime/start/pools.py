"""One K/V pool, or two, for models whose windows SGLang gives one of their own.

With two a column may be given up in the layers that see a window, once it has left it. No row that
sees it may be computed again after that. Where decode steps are canonical, rows that are replayed
are few and young, and the tree holds back what they see. There a server has two if it is asked to
by their ratio. Elsewhere a row may be replayed however old it is: then, and if nobody asks, the
gate sets SGLang's switch to one pool, and a layer with a window keeps all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from margingate.config import GateConfig, GateError
from margingate.runtime.attention.layer_rules import windows_of
from margingate.runtime.compat.arguments import settings
from margingate.runtime.compat.kv import window_pool
from margingate.runtime.compat.kv.tree import LimitedWindowCache
from margingate.runtime.compat.model.architectures import checkpoint_config, has_two_pools

logger = logging.getLogger(__name__)

ATTENTION = frozenset({None, "triton", "torch_native"})  # None: one of these is chosen
KINDS = frozenset({"full_attention", "sliding_attention"})


def choose(server_args: Any, config: GateConfig) -> None:
    """Before SGLang resolves the arguments, and behind the choice of attention.

    For a model with one pool this changes nothing.
    """
    if why_one(settings.view(server_args), config):
        settings.choose(server_args, disable_hybrid_swa_memory=True)


def why_one(args: Any, config: GateConfig) -> str:
    """Why a server has one pool whatever its model has; empty where it may have two."""
    backends = {
        args.attention_backend,
        args.prefill_attention_backend,
        args.decode_attention_backend,
    }
    reasons = {
        "no --swa-full-tokens-ratio asks for two": args.swa_full_tokens_ratio is None,
        "with --gate-fast-path stock a row may be replayed however old it is": not config.invariant,
        "a study replays all rows": config.study,
        "--gate-repair column leaves rows behind that are never canonical": config.repair != "span",
        "an audit compares all columns of an answer": config.audit_rate > 0,
        "two pools take the gate's radix tree": args.disable_radix_cache,
        "two pools take attention by triton": not backends <= ATTENTION,
        "its layers are not some with a window and others without": not _has_both(args),
        "--disable-hybrid-swa-memory is set": args.disable_hybrid_swa_memory,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _has_both(args: Any) -> bool:
    """Whether config.json names layers of both kinds, and no others."""
    config = checkpoint_config(args)
    text: Mapping[str, Any] = config.get("text_config") or config
    return set(text.get("layer_types") or ()) == KINDS


def confirm(scheduler: Any, config: GateConfig) -> None:
    """Once the pools are there: the log says what there is, and what one pool costs.

    Says nothing of a model that has one anyway.

    Raises:
        GateError: there are two pools, and not as the gate knows them.
    """
    runner = scheduler.tp_worker.model_runner
    if not has_two_pools(runner.model_config):
        return
    pool, ratio = runner.token_to_kv_pool, float(settings.in_effect("swa_full_tokens_ratio"))
    why = why_one(settings.view(scheduler.server_args), config)
    if not window_pool.is_split(pool):
        if runner.model_config.is_hybrid_swa:
            raise GateError(
                "SGLang made a K/V pool for this model's windows of a kind that the gate does not "
                f"know ({type(pool).__name__}): use --disable-hybrid-swa-memory."
            )
        logger.info(
            "margingate serves one K/V pool, because %s: it has room for %d tokens, where SGLang's "
            "two would have room for %d (--swa-full-tokens-ratio %g).",
            *(why, pool.size),
            *(room_of_two(pool.size, *layers_of_each_kind(runner.model_config), ratio), ratio),
        )
        return
    if reason := _unfit(scheduler, config, why):
        raise GateError(
            f"SGLang made two K/V pools, but {reason}: use --disable-hybrid-swa-memory."
        )
    logger.info(
        "margingate serves two K/V pools: %d tokens in layers that see everything, and %d in those "
        "with a window (--swa-full-tokens-ratio %g).",
        *(pool.size, pool.size_swa, ratio),
    )


def _unfit(scheduler: Any, config: GateConfig, why_one_pool: str) -> str:
    """Why two pools that are there are not served; empty where they are."""
    runner, tree = scheduler.tp_worker.model_runner, scheduler.tree_cache
    if why_one_pool:
        return why_one_pool
    if unknown := window_pool.why_unknown(
        runner.token_to_kv_pool, scheduler.token_to_kv_pool_allocator
    ):
        return f"they are of kinds that the gate does not know ({unknown})"
    if not isinstance(tree, LimitedWindowCache):
        return f"their radix tree is {type(tree).__name__}, not the gate's"
    widest = max(windows_of(runner.model), default=0)
    if tree.sliding_window_size < widest:
        return f"they keep {tree.sliding_window_size} tokens of a window of {widest}"
    chunk, rows = config.prefill_chunk or 0, config.rows or 0  # rows that wait for a pass
    room = runner.token_to_kv_pool.size_swa
    least = 2 * (chunk + widest) + rows + window_pool.given_up_at_once()
    if room < least:
        return f"that of windows has room for {room} tokens, where a request may need {least}"
    return ""


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
