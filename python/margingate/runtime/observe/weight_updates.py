"""An update of the weights that flushes the cache is refused where SGLang would not flush it."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import io_struct

from margingate.runtime.compat.model import weights


def refusal(scheduler: Any, received: Any) -> Any:
    """SGLang's answer "not done" with one sentence, or None where the update may go on.

    SGLang flushes after it has replaced the weights, and answers "not done" where requests hold
    columns, or wait without a pause. Here nothing has been changed yet.
    """
    kind = _ANSWERS.get(type(received))
    if kind is None or not received.flush_cache or weights.may_flush(scheduler):
        return None
    return kind(
        success=False,
        message="The weights were not updated, because the update flushes the cache and requests "
        "are not finished: let them finish, abort them, retract them by a pause, or send "
        "flush_cache false.",
    )


def looks_only(received: Any) -> bool:
    """Whether it is SGLang's check_weights, asked to change nothing."""
    return getattr(received, "action", "") in ("snapshot", "compare", "checksum")


_ANSWERS: dict[type, type] = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}
