"""Memory that an operator takes away for a while: refused where SGLang's scheduler would end.

It asserts that nothing runs, and looks for tags that are not there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
)

from margingate.runtime.client.control import NotReleased, NotResumed
from margingate.runtime.compat.model import weights


def refusal(scheduler: Any, received: Any) -> NotReleased | NotResumed | None:
    """SGLang's answer with one sentence, or None where it may go on. Nothing has been changed."""
    if isinstance(received, ResumeMemoryOccupationReqInput):
        because = not_away(_tags(received), scheduler.weight_updater.offload_tags)
        if because:
            return NotResumed(message=f"The memory was not resumed, because {because}")
    if isinstance(received, ReleaseMemoryOccupationReqInput):
        because = _on_a_cpu(scheduler.tp_worker.model_runner) or not_there(
            _tags(received), scheduler.weight_updater.offload_tags
        )
        if because := because or _unfinished(scheduler):
            return NotReleased(message=f"The memory was not released, because {because}")
    return None


def _on_a_cpu(runner: Any) -> str:
    """There SGLang has none to release, and waits for a GPU that is not there."""
    return "this server computes on a CPU: do without." if runner.device == "cpu" else ""


def _unfinished(scheduler: Any) -> str:
    if weights.may_flush(scheduler):
        return ""
    return "requests are not finished: let them finish, abort them, or retract them by a pause."


def not_away(tags: Sequence[str], away: Collection[str]) -> str:
    """Why these cannot be resumed, or an empty text."""
    name = next((tag for tag in tags if tag not in away), None)
    if name is None:
        return ""
    if not away:
        return f"{name} was not released: release it first."
    return f"{name} was not released: give tags of {', '.join(sorted(away))}."


def not_there(tags: Sequence[str], away: Collection[str]) -> str:
    """Why these cannot be released, or an empty text."""
    for tag in tags:
        if tag not in GPU_MEMORY_ALL_TYPES:
            return f"tags has {tag!r}: give tags of {', '.join(GPU_MEMORY_ALL_TYPES)}."
        if tag in away:
            return f"{tag} was released before: resume it first."
    return ""


def _tags(received: Any) -> Sequence[str]:
    """Those of one request; none stand for all."""
    return received.tags or GPU_MEMORY_ALL_TYPES
