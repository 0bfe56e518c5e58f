"""What an exception inside a hook ends: a request, an observation, or the process.

Every hook is wrapped where it is registered. SGLang's scheduler ends at the first exception, with
the requests of all clients; so where a hook's work belongs to requests, theirs is the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch

from margingate.runtime.request.record import GateRequest

logger = logging.getLogger(__name__)
_FROM_SGLANG = "_margingate_from_sglang"  # on an exception that an original raised
_FAILED = "margingate failed on it"  # why a request is not gated


class Policy(Enum):
    """What an exception of ours inside a hook ends."""

    FATAL = "process"  # start-up, and what no request's content can make raise
    REQUEST = "request"  # the one that the hook is given
    BATCH = "batch"  # the gated requests of the batches and lists that it is given
    FORWARD = "forward"  # the gated requests of the forward that runs; the others' tokens go on
    OPEN = "open"  # all open gated requests
    OBSERVE = "nothing"  # what it would have told is lost, and counted
    CLIENT = "answer"  # the web server answers this client with HTTP 400 or 500


@dataclass(slots=True)
class Tally:
    """How often a hook ran in this process, and how often it raised."""

    fired: int = 0
    failed: int = 0


_tallies: dict[str, Tally] = {}
_forward: Sequence[Any] = ()  # the requests of the batch that was launched last
_open: Iterable[Any] = ()  # the open requests of this process's gate


def serve(open_requests: Iterable[Any]) -> None:
    """From now on these are the open requests; read anew at each failure."""
    global _open  # noqa: PLW0603
    _open = open_requests


def launches(batch: Any) -> None:
    """SGLang's next forward is that of this batch, if it is not None."""
    global _forward  # noqa: PLW0603
    _forward = () if batch is None else batch.reqs


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
_PASSING = (Policy.FATAL, Policy.CLIENT)  # their exceptions go on to SGLang


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
    if around and policy not in _PASSING:
        return _contained(tally, target, function, policy, instead or _call)
    return _counted(tally, target, function, policy)


def _counted(
    tally: Tally, target: str, function: Callable[..., Any], policy: Policy
) -> Callable[..., Any]:
    """A hook without an original to be called instead, or whose exceptions pass."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        tally.fired += 1
        try:
            return function(*args, **kwargs)
        except Exception as error:
            tally.failed += not hasattr(error, _FROM_SGLANG)
            if policy in _PASSING or hasattr(error, _FROM_SGLANG):
                raise
            _contain(target, policy, error, (*args, *kwargs.values()))
            return None

    return counted


def _contained(
    tally: Tally,
    target: str,
    function: Callable[..., Any],
    policy: Policy,
    instead: Callable[..., Any],
) -> Callable[..., Any]:
    """An AROUND hook whose exceptions end no more than its policy says."""

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
            return instead(original, *args, **kwargs)

    return contained


def _call(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def _contain(target: str, policy: Policy, error: Exception, given: tuple[Any, ...]) -> None:
    logger.error("margingate: the hook on %s failed.", target, exc_info=error)
    if policy is Policy.REQUEST:
        for req in given:
            if isinstance(req, Req):
                end(req, target, error)
        return
    for req in _gated(_concerned(policy, given)):
        end(req, target, error)


def _concerned(policy: Policy, given: tuple[Any, ...]) -> Iterable[Any]:
    """The requests that the policy names, whether gated or not."""
    if policy is Policy.FORWARD:
        return _forward
    if policy is Policy.OPEN:
        return _open
    if policy is not Policy.BATCH:
        return ()
    batches = (each.reqs if isinstance(each, ScheduleBatch) else each for each in given)
    return [req for batch in batches if isinstance(batch, list) for req in batch]


def _gated(reqs: Iterable[Any]) -> list[Any]:
    """Those of them that are gated, each once."""
    unique = {id(req): req for req in reqs}
    return [req for req in unique.values() if getattr(getattr(req, "gate", None), "gated", False)]


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


def refuse(req: Any) -> None:
    """Make a gated request that `end` ended before its prefill one that SGLang refuses.

    Its prompt was matched with gated columns; prefilled beside others it must not join them.
    """
    reason = req.to_finish
    req.set_finish_with_abort(reason.message)  # a prompt of one token
    req.to_finish = reason
    req.gate.gated, req.gate.ungated_because = False, _FAILED
    req.extra_key = f"not-{req.extra_key}"


def _ungated(req: Any) -> GateRequest:
    """For a request whose constructor's hook failed; its columns must not meet gated ones."""
    req.extra_key = f"not-{req.extra_key}" if req.extra_key else None
    return GateRequest(f"failed:{id(req)}:{req.rid}", False, _FAILED)


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
