"""What a scheduler refuses of an operator's request whose answer in SGLang has no words for it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers import io_struct


class NotReleased(io_struct.ReleaseMemoryOccupationReqOutput):
    """The memory is as it was."""

    message: str


class NotResumed(io_struct.ResumeMemoryOccupationReqOutput):
    """The memory is as it was."""

    message: str


class NotRecorded(io_struct.ExpertDistributionReqOutput):
    """Of the experts of tokens nothing is counted."""

    message: str


class NotProfiled(io_struct.ProfileReqOutput):
    """No profile is in progress. SGLang's own such answer is HTTP 500 without its message."""


class RefusedError(HTTPException, ValueError):
    """HTTP 400 in routes that catch exceptions and in those that do not."""

    def __init__(self, sentence: str) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, sentence)

    def __str__(self) -> str:
        return str(self.detail)


async def answers(original: Any, communicator: Any, obj: Any) -> Any:
    """AROUND FanOutCommunicator.__call__. Raises RefusedError where a scheduler refused."""
    found = await original(communicator, obj)
    for answer in found:
        if isinstance(answer, NotReleased | NotResumed | NotRecorded | NotProfiled):
            raise RefusedError(answer.message)
    return found
