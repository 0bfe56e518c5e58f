"""Overlap scheduling: a step's results are processed while the next step already runs.

So a flagged row is known one step late, and nothing of a request may be changed while a forward
holds it. The controller therefore commits results as they come, and whenever there is something to
verify, replay or release, it first brings the one result in flight in: nothing runs then, and all
is as without overlap. With canonical steps that is rare; most steps never wait.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch

from margingate.runtime.compat.process import ranks

_PROCESSED = object()  # stands in SGLang's queue for a result that was brought in early


class InFlight:
    """The steps of one scheduler whose results are still to be processed."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.overlaps = bool(scheduler.enable_overlap)
        self._is_alone = self.overlaps and ranks.tp_size(scheduler) == 1
        self._processed: Any = None  # the batch being processed, or last; without overlap alone

    def arrived(self, batch: Any, result: Any) -> None:
        """A result is about to be processed: it is on the CPU afterwards."""
        if not self.overlaps:
            self._processed = batch
        elif result.copy_done is not None:
            result.copy_done.synchronize()  # as SGLang is about to: margins came with the tokens

    def batches(self) -> list[Any]:
        """Their batches: at most the last one before a step is launched, two after."""
        return [batch for batch, _ in self._pending()]

    def around(self) -> list[Any]:
        """The batches between two steps that may hold a request, each once."""
        scheduler = self._scheduler
        found = (self._processed, scheduler.running_batch, scheduler.last_batch)
        return list({id(batch): batch for batch in found if batch is not None}.values())

    def _pending(self) -> list[tuple[Any, Any]]:
        queue = getattr(self._scheduler, "result_queue", ()) if self.overlaps else ()
        return [each for each in queue if each[1] is not _PROCESSED]

    def bring_in(self) -> None:
        """Process the result in flight, if there is one. Only between two steps.

        SGLang's loop takes it from the queue later; `is_processed` tells it apart then. Until then
        its place holds a batch of no requests: SGLang leaves requests out of the next decode step
        that the queued batch is about to bring to their length, and theirs have come already.
        """
        if not self.batches():
            return
        queue = self._scheduler.result_queue
        batch, result = queue.popleft()
        self._scheduler.process_batch_result(batch, result)
        queue.appendleft((ScheduleBatch(reqs=[]), _PROCESSED))

    def bring_in_prefill(self) -> None:
        """Process a prefill that is in flight, if it is computed. Only between two steps.

        Its first tokens then leave before the next step is launched, and not behind it. Ranks may
        not see it at the same time, and must go on alike: so not where there are several.
        """
        pending = self._pending() if self._is_alone else ()
        if not pending:
            return
        batch, result = pending[0]
        if not batch.forward_mode.is_extend():  # most are decode steps, and need not be asked for
            return
        if result.copy_done is not None and result.copy_done.query():
            self.bring_in()

    @staticmethod
    def is_processed(result: Any) -> bool:
        """Whether this is no result, but the place of one that was brought in."""
        return result is _PROCESSED
