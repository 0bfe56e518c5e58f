"""Memory that an operator takes away for a while: refused where SGLang's scheduler would end.

It asserts that nothing runs, and looks for tags that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqInput,
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqInput,
)

from margingate.runtime.client.control import UNFINISHED, NotReleased, NotResumed
from margingate.runtime.compat.model import weights


def refusal(scheduler: Any, received: Any) -> NotReleased | NotResumed | None:
    """SGLang's answer with one sentence, or None where it may go on. Nothing has been changed."""
    if isinstance(received, ResumeMemoryOccupationReqInput):
        because = not_away(_tags(received), scheduler.weight_updater.offload_tags)
        if because:
            return NotResumed(message=f"The memory was not resumed, because {because}")
    if isinstance(received, ReleaseMemoryOccupationReqInput):
        tags = _tags(received)
        because = (
            _on_a_cpu() or _unknown(tags) or _shared(scheduler, tags) or _unfinished(scheduler)
        )
        if because:
            return NotReleased(message=f"The memory was not released, because {because}")
    return None


def release(original: Callable[..., Any], manager: Any, received: Any) -> Any:
    """SGLang's release of what is not away yet: its memory saver ends a process over what is."""
    tags = [tag for tag in _tags(received) if tag not in manager.offload_tags]
    if not tags:
        return ReleaseMemoryOccupationReqOutput()
    return original(manager, msgspec.structs.replace(received, tags=tags))


def _on_a_cpu() -> str:
    """There SGLang has none to release, and waits for the GPU that torch was made for."""
    there = torch.get_device_module().is_available()
    return "" if there else "this server computes on a CPU: do without."


def _shared(scheduler: Any, tags: Sequence[str]) -> str:
    said = weights.shared(scheduler) if GPU_MEMORY_TYPE_WEIGHTS in tags else ""
    rest = [tag for tag in GPU_MEMORY_ALL_TYPES if tag != GPU_MEMORY_TYPE_WEIGHTS]
    return said and f"{said}: give tags of {', '.join(rest)}."


def _unfinished(scheduler: Any) -> str:
    if weights.may_flush(scheduler):
        return ""
    return f"{UNFINISHED}: let them finish, abort them, or retract them by a pause."


def not_away(tags: Sequence[str], away: Collection[str]) -> str:
    """Why these cannot be resumed, or an empty text."""
    twice = next((tag for tag in tags if tags.count(tag) > 1), None)
    if twice is not None:
        return f"tags has {twice} twice: give it once."
    name = next((tag for tag in tags if tag not in away), None)
    if name is None:
        return ""
    if not away:
        return f"{name} was not released: release it first."
    return f"{name} was not released: give tags of {', '.join(sorted(away))}."


def _unknown(tags: Sequence[str]) -> str:
    for tag in tags:
        if tag not in GPU_MEMORY_ALL_TYPES:
            return f"tags has {tag!r}: give tags of {', '.join(GPU_MEMORY_ALL_TYPES)}."
    return ""


def _tags(received: Any) -> Sequence[str]:
    """Those of one request; none stand for all."""
    return received.tags or GPU_MEMORY_ALL_TYPES
