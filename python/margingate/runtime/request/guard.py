"""What an exception inside a hook ends: a request, an observation, or the process.

Every hook is wrapped where it is registered. SGLang's scheduler ends at the first exception, with
the requests of all clients; so where a hook's work belongs to requests, theirs is the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from margingate.runtime.request.record import GateRequest

logger = logging.getLogger(__name__)
_FROM_SGLANG = "_margingate_from_sglang"  # on an exception that an original raised


class Policy(Enum):
    """What an exception of ours inside a hook ends."""

    FATAL = "process"  # start-up and arithmetic: what follows could not be trusted
    REQUEST = "request"  # the one that the hook is given
    BATCH = "batch"  # the gated requests of the batches that it is given
    OBSERVE = "nothing"  # what it would have told is lost, and counted
    CLIENT = "answer"  # the web server answers this client with HTTP 400 or 500


@dataclass(slots=True)
class Tally:
    """How often a hook ran in this process, and how often it raised."""

    fired: int = 0
    failed: int = 0


_tallies: dict[str, Tally] = {}


def tallies() -> dict[str, Tally]:
    """By target, of the hooks registered in this process."""
    return _tallies


def failures() -> dict[str, int]:
    """By target or place: exceptions so far, where there were any."""
    return {name: tally.failed for name, tally in _tallies.items() if tally.failed}


class _Original:
    """SGLang's function within an AROUND hook: whether it was called, and what it returned."""

    __slots__ = ("called", "function", "result")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.called, self.result = function, False, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        try:
            self.result = self.function(*args, **kwargs)
        except Exception as error:
            setattr(error, _FROM_SGLANG, True)
            raise
        return self.result


Instead = Callable[..., Any] | None


def wrap(
    target: str,
    function: Callable[..., Any],
    policy: Policy,
    *,
    around: bool,
    instead: Instead = None,
) -> Callable[..., Any]:
    """The hook function under its policy; `__wrapped__` is the function itself.

    An original is called once, whatever the hook does: its result is returned if it came, it is
    called with the target's own arguments if not, and its exceptions pass.

    Args:
        instead: of calling the original after a failure of an AROUND hook; called as the hook is.
    """
    tally = _tallies.setdefault(target, Tally())
    contains = policy in (Policy.REQUEST, Policy.BATCH, Policy.OBSERVE)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        tally.fired += 1
        try:
            return function(*args, **kwargs)
        except Exception as error:
            tally.failed += not hasattr(error, _FROM_SGLANG)
            if not contains or hasattr(error, _FROM_SGLANG):
                raise
            _contain(target, policy, error, (*args, *kwargs.values()))
            return None

    @functools.wraps(function)
    def contained(original: Any, *args: Any, **kwargs: Any) -> Any:
        tally.fired += 1
        once = _Original(original)
        try:
            return function(once, *args, **kwargs)
        except Exception as error:
            if hasattr(error, _FROM_SGLANG):
                raise
            tally.failed += 1
            _contain(target, policy, error, (*args, *kwargs.values()))
            if once.called:
                return once.result
            return (instead or _call)(original, *args, **kwargs)

    return contained if around and contains else counted


def _call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _contain(target: str, policy: Policy, error: Exception, given: tuple[Any, ...]) -> None:
    logger.error("margingate: the hook on %s failed.", target, exc_info=error)
    if policy is Policy.REQUEST:
        for req in given:
            if isinstance(req, Req):
                end(req, target, error)
    elif policy is Policy.BATCH:
        for req in _gated_of(given):
            end(req, target, error)


def _gated_of(given: tuple[Any, ...]) -> list[Any]:
    """The gated requests of the batches among a hook's arguments, each once."""
    batches = [each for each in given if isinstance(each, ScheduleBatch)]
    reqs = {id(req): req for batch in batches for req in batch.reqs}
    return [req for req in reqs.values() if getattr(getattr(req, "gate", None), "gated", False)]


def end(req: Any, place: str, error: BaseException) -> None:
    """End the request with its next finish check: HTTP 500 and a sentence, nothing more sent.

    One that ended a moment ago and was not told yet ends so too: its last rows may be unverified.
    """
    gate = getattr(req, "gate", None)
    if gate is None:
        gate = req.gate = _ungated(req)
    gate.failed = True
    reason = FINISH_ABORT(
        f"margingate failed on this request in {place} ({type(error).__name__}: {error}): "
        "send it again, and report it with the server's log.",
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "InternalServerError",
    )
    if not req.finished():
        req.to_finish = req.to_finish or reason
    elif not req.finished_output and not isinstance(req.finished_reason, FINISH_ABORT):
        req.finished_reason, req.finished_len = reason, req.send_token_offset


def _ungated(req: Any) -> GateRequest:
    """For a request whose constructor's hook failed; its columns must not meet gated ones."""
    req.extra_key = f"not-{req.extra_key}" if req.extra_key else None
    return GateRequest(f"failed:{id(req)}:{req.rid}", False, "margingate failed on it")


@contextmanager
def request(req: Any, place: str) -> Iterator[None]:
    """What is done here for one request of several ends that one where it raises."""
    try:
        yield
    except Exception as error:
        if hasattr(error, _FROM_SGLANG):
            raise
        failed(req, place, error)


def failed(req: Any, place: str, error: BaseException) -> None:
    """What was done at `place` for one request of several raised: note it, and end the request."""
    note(place, error)
    end(req, place, error)


def note(place: str, error: BaseException) -> None:
    """Count and log what was caught within a hook."""
    _tallies.setdefault(place, Tally()).failed += 1
    logger.error("margingate: %s failed.", place, exc_info=error)


def tell(observers: tuple[Any, ...], method: str, *told: Any) -> None:
    """Call an observer's method on all of them; one that raises loses what it was told."""
    for observer in observers:
        try:
            getattr(observer, method)(*told)
        except Exception as error:
            note(f"{type(observer).__name__}.{method}", error)
