"""SGLang's sessions of weight updates, and the versions of weights that it notes by request."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.weight_versions import (
    WeightVersionEvent,
    truncate_weight_version_events,
)

from margingate.runtime.compat.arguments import settings


def session_is_open(scheduler: Any) -> bool:
    """Whether weights may be written now, by other processes too: between begin and end."""
    return scheduler.weight_updater._session is not None


def may_flush(scheduler: Any) -> bool:
    """Whether SGLang would flush its cache now: while it is paused, requests may wait."""
    return bool(scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused))


def shared(scheduler: Any) -> str:
    """What a sentence says of weights of which other servers have the same memory, or nothing.

    SGLang raises over each change of them, and its scheduler ends.
    """
    mode = settings.view(scheduler.server_args).weight_cache_mode
    if mode == "off":
        return ""
    return f"--weight-cache-mode is {mode}, so that other servers have the same weights"


def is_another(label: str | None) -> bool:
    """Whether SGLang takes this to be another version than the one in memory."""
    return label is not None and label != get_serving().weight_version


def note_version(req: Any, tokens: int) -> None:
    """The first `tokens` of its output are of the version in memory, at the latest."""
    event = WeightVersionEvent(old_version=get_serving().weight_version, num_output_tokens=tokens)
    req.weight_version_events.append(event)


def forget_versions(req: Any, kept: int) -> None:
    """Tokens behind the first `kept` are dropped: what they were computed with is not theirs."""
    if req.weight_version_events:
        req.weight_version_events = truncate_weight_version_events(req.weight_version_events, kept)
