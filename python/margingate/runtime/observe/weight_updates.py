"""An update of the weights that flushes the cache is refused while requests are not finished."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import io_struct


def refusal(scheduler: Any, received: Any) -> Any:
    """SGLang's answer "not done" with one sentence, or None where the update may go on.

    SGLang flushes after it has replaced the weights, and ends where requests wait, as after a
    pause that retracts them. Here nothing has been changed yet.
    """
    kind = _ANSWERS.get(type(received))
    if kind is None or not received.flush_cache or scheduler.is_fully_idle():
        return None
    return kind(
        success=False,
        message="The weights were not updated, because the update flushes the cache and requests "
        "are not finished: let them finish, abort them, or send flush_cache false.",
    )


_ANSWERS: dict[type, type] = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}
