"""Finished requests are replayed while nothing else runs, and their tokens compared.

A replay is canonical throughout: the prompt is prefilled on the gate's grid from position 0, past
the radix tree and into slots of its own; then verify passes run over the recorded output. It lives
within one idle turn of the scheduler's loop and leaves nothing behind. Between two forwards it
looks for messages to the scheduler; if there is one it gives way, and starts anew another time.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.utils import is_health_check_generate_req

from margingate.calibration import miss_bound
from margingate.core.audit import Audits, Recorded
from margingate.runtime import constraints, integrity, rollback
from margingate.runtime.forwards import extend, internal_request, release
from margingate.runtime.observer import Observer
from margingate.runtime.verifier import RowInput

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95  # of the bound, one-sided


class Auditor(Observer):
    """Notes what ended, and replays it; all on the scheduler's thread."""

    def __init__(self, controller: GateController) -> None:
        self._controller = controller
        self._scheduler = controller.scheduler
        seed = self._scheduler.server_args.random_seed or 0
        self.audits = Audits(controller.config.audit_rate, seed)
        if self.audits.rate > 0:
            _bound(0, 1)  # SciPy takes a while to load: now, not while requests are served

    # -- while requests are served

    def ended(self, req: Any) -> None:
        """Note the request if it is chosen; none that is constrained, aborted or a health check."""
        reason = req.finished_reason
        if reason is None or isinstance(reason, FINISH_ABORT) or is_health_check_generate_req(req):
            return
        if constraints.constrained(req) or not self.audits.chooses(req.rid):
            return
        output = array("q", req.output_ids_through_stop)
        gate = req.gate
        prompt = array("q", req.origin_input_ids)
        self.audits.add(Recorded(req.rid, prompt, output, gate.draw, gate.generation))

    # -- while none are

    def idle(self) -> None:
        """Replay one request, if one waits. Only when SGLang is fully idle."""
        if not self.audits.waiting or self._is_called():
            return
        if self._scheduler.weight_updater.offload_tags:  # the memory was given back
            return
        recorded = self.audits.take(self._controller.fingerprint.generation)
        if recorded is None:
            return
        if not self._fits(recorded):
            self.audits.dropped += 1
            return
        with closing(self._replay(recorded)) as parts:
            self._compare(recorded, parts)
        for observer in self._controller.observers:
            observer.audited(recorded.rid)
        if self._controller.config.debug:
            integrity.check(self._controller)

    def _is_called(self) -> bool:
        """Whether a message waits for the scheduler: a request, an abort, a flush."""
        channels = self._scheduler.ipc_channels
        sockets = (channels.recv_from_tokenizer, channels.recv_from_rpc)
        return any(socket is not None and socket.poll(0, zmq.POLLIN) for socket in sockets)

    def _fits(self, recorded: Recorded) -> bool:
        """Whether there is room, counting what the radix tree can give up."""
        tree = self._scheduler.tree_cache
        free: int = self._scheduler.token_to_kv_pool_allocator.available_size()
        return recorded.size - 1 <= free + tree.evictable_size()

    def _compare(self, recorded: Recorded, parts: Iterable[list[int]]) -> None:
        """Hold the replay's tokens, a part for each forward, to the recorded ones."""
        output, done = recorded.output, 0
        for part in parts:
            for token in part:
                done += 1
                if token != output[done - 1]:
                    self._report(recorded, done, token)
                    self.audits.compared(done, mismatch=True)
                    return
            if done < len(output) and self._is_called():
                self.audits.interrupted(recorded)
                return
        self.audits.compared(done, mismatch=False)

    @staticmethod
    def _report(recorded: Recorded, row: int, token: int) -> None:
        logger.warning(
            "margingate: an audit of request %s found token %d to be %d where its client got %d: "
            "raise --gate-threshold, or use --gate-guarantee exact.",
            recorded.rid,
            row,
            token,
            recorded.output[row - 1],
        )

    # -- the forwards

    def _replay(self, recorded: Recorded) -> Generator[list[int]]:
        """Yields, after each forward, the tokens it chose. Frees its slots when closed."""
        req = internal_request(f"audit-{recorded.rid}", recorded.prompt)
        try:
            yield from self._prefill(req, recorded)
            yield from self._decode(req, recorded)
        finally:
            release(self._scheduler, req)

    def _prefill(self, req: Any, recorded: Recorded) -> Iterator[list[int]]:
        """The chunks that the gate would prefill for an empty cache, each alone."""
        length, step = len(recorded.prompt), self._controller.prefill_chunk
        tail = (length - 1) // step * step  # where the last chunk starts
        for start in range(0, tail, step):
            extend(self._scheduler, [(req, start, start + step)])
            yield []
        logits = extend(self._scheduler, [(req, tail, length)])
        last = RowInput(req.req_pool_idx, length - 1, recorded.prompt[-1], draw=recorded.draw)
        yield [result.token for result in self._controller.verifier.choose(logits, [last])]

    def _decode(self, req: Any, recorded: Recorded) -> Iterator[list[int]]:
        """Rows 2 to the last, as verify passes."""
        verifier, count = self._controller.verifier, len(recorded.output) - 1
        if count == 0:
            return
        found = rollback.extend_columns(self._scheduler, req, count)
        assert found, "an audit ran out of the memory that was there for it"
        rows = [
            RowInput(req.req_pool_idx, len(recorded.prompt) + i, token, draw=recorded.draw)
            for i, token in enumerate(recorded.output[:-1])
        ]
        for start in range(0, count, verifier.rows):
            results = verifier.run(rows[start : start + verifier.rows])
            yield [result.token for result in results]


def observers(controller: GateController) -> tuple[Observer, ...]:
    """The auditor, where there is something to audit."""
    return (controller.auditor,) if controller.config.audit_rate > 0 else ()


def report(audits: Audits) -> dict[str, Any]:
    """For `/server_info`."""
    return {
        "rate": audits.rate,
        "waiting": audits.waiting,
        "audited": audits.audited,
        "tokens": audits.tokens,
        "mismatches": audits.mismatches,
        "dropped": audits.dropped,
        "mismatch_bound": bound(audits),
        "confidence": CONFIDENCE,
    }


def bound(audits: Audits) -> float:
    """With CONFIDENCE, the share of requests that an audit would find wrong is at most this."""
    return _bound(audits.mismatches, audits.audited)


@lru_cache(maxsize=1)
def _bound(mismatches: int, audited: int) -> float:
    return miss_bound(mismatches, audited, CONFIDENCE)
