"""Whether a request is gated, refused or neither, from its own parameters."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from margingate.config import GateConfig
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.compat.model import embeddings, images, vision
from margingate.runtime.request.record import (
    CACHE_NAMESPACE,
    COLUMNS,
    FAULT_ROWS,
    FORCED_IDS,
    SWITCH,
    ColumnsWanted,
    GateRequest,
    not_a_switch,
    not_an_object,
)
from margingate.runtime.request.sampling_params import (
    LARGEST_SEED,
    Draw,
    draw_nothing,
    draw_of,
    is_score,
    take,
)

_UNGATED = "not-"
_ANY = embeddings.Taken()
_serial = itertools.count(1)


def attach(req: Any, config: GateConfig) -> None:
    """Set `req.gate` from the request's own parameters, and its radix-tree namespace.

    Mutates the parameters of a gated request: its penalties are the gate's from here on, and one
    that draws nothing has no temperature, by which SGLang scales log-probs in a batch that samples.
    """
    _drop_unknown_stops(req)
    gate = _classify(req, config)
    req.gate = gate
    _name_prompt(req)
    if config.study:
        gate.columns_wanted = _columns_wanted(req)
    if gate.gated:
        gate.penalties = take(req.sampling_params)
        if gate.draw is None:
            draw_nothing(req.sampling_params)
        req.extra_key = CACHE_NAMESPACE + (req.extra_key or "")
    elif (req.extra_key or "").startswith((CACHE_NAMESPACE, _UNGATED)):
        req.extra_key = _UNGATED + req.extra_key  # also those that have it: no two may meet


def queue(req: Any, images_fail: str, taken: embeddings.Taken = _ANY) -> None:
    """As it is queued: its media are named, and one that cannot be served is aborted: HTTP 400.

    Args:
        images_fail: why no image is encoded canonically on this server; empty where they are.
        taken: whether the model takes embeddings in the place of tokens.
    """
    gate = getattr(req, "gate", None)
    if gate is None or req.to_finish is not None:
        return
    clip(req)
    if vision.has_media(req) and not gate.media:
        images.name_all(req)
        gate.media, gate.shift = True, images.shift(req)
        _name_prompt(req)  # two images are two prompts
    elif len(req.origin_input_ids or ()) != gate.prompt_length:  # --allow-auto-truncate
        _name_prompt(req)
    refusal = gate.refusal or without_room(req) or with_media(req, images_fail)
    if refusal := refusal or without_experts(req) or embeddings.refusal(req, taken):
        req.set_finish_with_abort(refusal)  # it goes on as a prompt of one token
        req.input_embeds = req.positional_embed_overrides = None


def _drop_unknown_stops(req: Any) -> None:
    """Those outside the vocabulary, gated or not: they never come, and where any request of a batch
    has a least length, SGLang's penalty writes to the logits of all stop tokens in it.
    """
    params, size = req.sampling_params, req.vocab_size
    if params.stop_token_ids and size:
        params.stop_token_ids = {
            token for token in params.stop_token_ids if token is not None and 0 <= token < size
        }


def _name_prompt(req: Any) -> None:
    req.gate.prompt = digest(req.origin_input_ids)
    req.gate.prompt_length = len(req.origin_input_ids or ())


def clip(req: Any) -> None:
    """Once SGLang has cut `max_new_tokens`: the least length, which the gate has, is no more."""
    penalties, room = req.gate.penalties, req.sampling_params.max_new_tokens
    if penalties is not None and penalties.min_new_tokens > room:
        req.gate.penalties = replace(penalties, min_new_tokens=room)


def with_media(req: Any, images_fail: str) -> str:
    """Once SGLang has attached them: the sentence for media of a gated request that depend on
    others.
    """
    if not (req.gate.gated and vision.has_media(req)):
        return ""
    what = f"images, and {images_fail}" if images_fail else images.not_alone(req)
    if not what:
        return ""
    instead = "text alone" if images_fail else "images as files or URLs"
    return (
        f"this request has {what}, whose embeddings may depend on what is encoded beside them: "
        f'send {instead}, or "{SWITCH}": false, in sampling_params or beside OpenAI\'s parameters, '
        "to be served without the gate."
    )


def without_room(req: Any) -> str:
    """Once SGLang has cut `max_new_tokens`: the sentence for faults that can be nowhere."""
    if not req.gate.faults or req.sampling_params.max_new_tokens > 0:
        return ""
    return (
        f"{FAULT_ROWS} is {sorted(req.gate.faults)}, but a prompt of {len(req.origin_input_ids)} "
        "tokens leaves no room for an answer: shorten the prompt, or raise --context-length."
    )


def without_experts(req: Any) -> str:
    """The sentence for a gated request that wants its experts of a server that keeps none."""
    if not (req.gate.gated and req.return_routed_experts) or routed_experts.are_kept():
        return ""
    return (
        "return_routed_experts is true, but this server keeps no experts: start it with "
        "--enable-return-routed-experts, or drop the parameter."
    )


def digest(ids: Iterable[int]) -> str:
    """16 hexadecimal digits of token ids; ids that no vocabulary has included."""
    try:
        content = array("q", ids).tobytes()
    except (OverflowError, TypeError):  # refused: it stands for no answer
        return ""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _classify(req: Any, config: GateConfig) -> GateRequest:
    key = f"{next(_serial)}:{req.rid}"
    params = req.sampling_params
    custom = params.custom_params or {}
    if refusal := not_an_object(custom):
        return GateRequest(key, False, "refused", refusal)
    wanted = custom.get(SWITCH, config.default == "on")
    faults = custom.get(FAULT_ROWS, ())
    forced = custom.get(FORCED_IDS, ())
    refusal = (
        _malformed(wanted, faults, config)
        or _not_forcible(forced, req, config)
        or _outside_vocabulary(req.origin_input_ids, req.vocab_size)
    )
    if refusal:
        return GateRequest(key, False, "refused", refusal)
    score = is_score(params)
    elsewhere = _unserved(req) or req.multi_item_delimiter_indices  # scores by other kernels
    # Of several choices that sample without a seed SGLang sends a score first: it fills the prefix
    # cache for them, and has to be where they look.
    warms_up = score and params.n > 1
    seedless = params.top_k > 1 and params.sampling_seed is None
    ungated = (
        (not wanted, f"{SWITCH} is false" if SWITCH in custom else f"{SWITCH} is not set"),
        (config.policy == "observe", "policy observe"),
        (seedless and (warms_up or not score), "sampling has no seed"),
        (score and bool(elsewhere), "no token is generated"),
    )
    for applies, because in ungated:
        if applies:
            return GateRequest(key, False, because, forced=tuple(forced))
    draw = None if score else draw_of(params)
    if draw is not None and (refusal := _not_drawable(draw, params.n)):
        return GateRequest(key, False, "refused", refusal)
    if refusal := _not_yet_served(req):
        return GateRequest(key, False, "refused", refusal)
    return GateRequest(key, True, draw=draw, faults=frozenset(() if score else faults))


def _not_drawable(draw: Draw, copies: int) -> str:
    if type(draw.seed) is not int or not 0 <= draw.seed <= LARGEST_SEED:
        return f"sampling_seed is {draw.seed!r}: give a whole number from 0 to {LARGEST_SEED}."
    if copies > 1:  # none of SGLang's ways in does that: each choice came with its own and n 1
        return (
            f"n is {copies} with sampling_seed {draw.seed}, and this choice has no seed of its "
            f"own: send {copies} requests with a seed each, or drop the seed."
        )
    return ""


def _malformed(wanted: Any, faults: Any, config: GateConfig) -> str:
    if sentence := not_a_switch(wanted):
        return sentence
    if faults and not config.inject_faults:
        return f"custom_params.{FAULT_ROWS} needs a server started with --gate-inject-faults."
    rows = isinstance(faults, list | tuple) and all(type(row) is int for row in faults)
    return "" if rows else f"custom_params.{FAULT_ROWS} is {faults!r}: give a list of row numbers."


def _not_forcible(forced: Any, req: Any, config: GateConfig) -> str:
    if forced and not (config.study and config.policy == "observe"):
        return (
            f"custom_params.{FORCED_IDS} needs a server started with --gate-study and "
            "--gate-policy observe."
        )
    if not isinstance(forced, list | tuple) or any(type(token) is not int for token in forced):
        return f"custom_params.{FORCED_IDS} is {forced!r}: give a list of token ids."
    return _outside_vocabulary(forced, req.vocab_size, f"custom_params.{FORCED_IDS}")


def _columns_wanted(req: Any) -> ColumnsWanted | None:
    """From {"keep": key} or {"against": key}; anything else is not asking."""
    custom = req.sampling_params.custom_params
    wanted = custom.get(COLUMNS) if isinstance(custom, dict) else None
    if not isinstance(wanted, dict) or len(wanted) != 1:
        return None
    ((what, key),) = wanted.items()
    return ColumnsWanted(str(key), what == "keep") if what in ("keep", "against") else None


def _outside_vocabulary(ids: Any, size: int, name: str = "input_ids") -> str:
    if not ids or not size or (min(ids) >= 0 and max(ids) < size):
        return ""
    bad = next(token for token in ids if not 0 <= token < size)
    return f"{name} holds {bad}, but the model's vocabulary is 0 to {size - 1}."


def _not_yet_served(req: Any) -> str:
    feature = _unserved(req)
    if not feature:
        return ""
    return (
        f"this request uses {feature}, which the deterministic gate cannot roll back yet: drop it, "
        f'or send "{SWITCH}": false, in sampling_params or beside OpenAI\'s parameters, to be '
        "served without the gate."
    )


def _unserved(req: Any) -> str:
    """The first feature of the request that the gate does not serve, or an empty string."""
    features = (
        (req.custom_logit_processor is not None, "custom_logit_processor"),
        (req.input_embeds is not None, "input_embeds"),
        (req.positional_embed_overrides is not None, "embedding overrides"),
        (req.lora_id is not None, "a LoRA adapter"),
        (req.session is not None, "a session"),
        (bool(req.return_hidden_states), "return_hidden_states"),
        (req.return_sampling_mask, "return_sampling_mask"),
        (req.token_indices_to_pool is not None, "token_indices_to_pool"),
    )
    return next((name for applies, name in features if applies), "")
