"""An operator's requests: what SGLang's scheduler would end over is not sent, what a scheduler
refuses is said, and what came while the last request ended is sent again.

SGLang's routes check types and words. Its gRPC server, and the methods of an Engine, do not.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from http import HTTPStatus
from typing import Any, Literal

from fastapi import HTTPException
from sglang.srt.managers import io_struct

from margingate.runtime.client.kinds import Kind, type_error

UNFINISHED = "requests are not finished"  # in a scheduler's sentence
_AGAIN = (0.02, 0.03, 0.05, 0.1, 0.2)  # seconds; SGLang drops a request a step behind its answer
_SECONDS: Kind = (lambda value: isinstance(value, int | float), "a number of seconds")


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


async def checked(original: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND TokenizerManager.pause_generation and open_session, which note it before they send."""
    check(obj)
    return await original(manager, obj, *args, **kwargs)


def check(obj: Any) -> None:
    """Raises RefusedError for a value that SGLang declares to be another."""
    kind: Any = type(obj)
    for name, words in _words(kind):
        value = getattr(obj, name)
        if value not in words:
            raise RefusedError(f"{name} is {value!r}: give {', '.join(words[:-1])} or {words[-1]}.")
    if isinstance(obj, io_struct.OpenSessionReqInput) and (
        sentence := type_error("timeout", obj.timeout, _SECONDS)
    ):
        raise RefusedError(sentence)


@cache
def _words(kind: type) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Fields of a message that are one of several words, with these."""
    hints = typing.get_type_hints(kind) if hasattr(kind, "__struct_fields__") else {}
    return tuple(
        (name, typing.get_args(hint))
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    )


async def answers(original: Any, communicator: Any, obj: Any) -> Any:
    """AROUND FanOutCommunicator.__call__. Raises RefusedError where a scheduler refused."""
    check(obj)
    found = await _asked(lambda: original(communicator, obj), _sentences)
    for answer in found:
        if isinstance(answer, NotReleased | NotResumed | NotRecorded | NotProfiled):
            raise RefusedError(answer.message)
    return found


async def update_from_disk(original: Any, manager: Any, obj: Any) -> tuple[Any, ...]:
    """AROUND TokenizerManager._wait_for_model_update_from_disk, which asks without that class."""
    done: tuple[Any, ...] = await _asked(
        lambda: original(manager, obj), lambda said: () if said[0] else (said[1],)
    )
    return done


async def _asked(ask: Callable[[], Awaitable[Any]], refusals: Callable[[Any], Any]) -> Any:
    """What schedulers answer; asked again where they are at the end of their last requests."""
    found = await ask()
    for pause in _AGAIN:
        if not any(UNFINISHED in said for said in refusals(found)):
            break
        await asyncio.sleep(pause)
        found = await ask()
    return found


def _sentences(found: Any) -> Iterator[str]:
    """Of schedulers that did not do it."""
    for answer in found:
        if isinstance(answer, NotReleased) or getattr(answer, "success", True) is False:
            yield getattr(answer, "message", None) or ""
