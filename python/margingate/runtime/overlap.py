"""Overlap scheduling: a step's results are processed while the next step already runs.

So a flagged row is known one step late, and nothing of a request may be changed while a forward
holds it. The controller therefore commits results as they come, and whenever there is something to
verify, replay or release, it first brings the one result in flight in: nothing runs then, and all
is as without overlap. With canonical steps that is rare; most steps never wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from margingate_kernels import Top2

_PROCESSED = object()  # stands in SGLang's queue for a result that was brought in early


class InFlight:
    """The steps of one scheduler whose results are still to be processed."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.overlaps = bool(scheduler.enable_overlap)

    def batches(self) -> list[Any]:
        """Their batches: at most the last one before a step is launched, two after."""
        return [batch for batch, _ in self._pending()]

    def _pending(self) -> list[tuple[Any, Any]]:
        queue = getattr(self._scheduler, "result_queue", ()) if self.overlaps else ()
        return [each for each in queue if each[1] is not _PROCESSED]

    def bring_in(self) -> None:
        """Process the result in flight, if there is one. Only between two steps.

        SGLang's loop takes it from the queue later; `is_processed` tells it apart then.
        """
        if not self.batches():
            return
        queue = self._scheduler.result_queue
        batch, result = queue.popleft()
        self._scheduler.process_batch_result(batch, result)
        queue.appendleft((batch, _PROCESSED))

    def bring_in_prefill(self) -> None:
        """Process a prefill that is in flight, if it is computed. Only between two steps.

        Its first tokens then leave before the next step is launched, and not behind it. Ranks may
        not see it at the same time, and must go on alike: so not where there are several.
        """
        pending = self._pending()
        if not pending or self._scheduler.server_args.tp_size > 1:
            return
        batch, result = pending[0]
        computed = result.copy_done is not None and result.copy_done.query()
        if computed and batch.forward_mode.is_extend():
            self.bring_in()

    @staticmethod
    def is_processed(result: Any) -> bool:
        """Whether this is no result, but the place of one that was brought in."""
        return result is _PROCESSED


@contextmanager
def passed_over(reqs: list[Any]) -> Iterator[None]:
    """SGLang's result processing skips `reqs`, as it does with requests that were retracted."""
    for req in reqs:
        req.is_retracted = True
    try:
        yield
    finally:
        for req in reqs:
            req.is_retracted = False


def before_copy(result: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE GenerationBatchResult.copy_to_cpu: margins go to the CPU with the token ids.

    Nothing waits here; the result's own `copy_done` event covers the copies. What they are copied
    from is kept until then.
    """
    output = result.logits_output
    best, ride = (getattr(output, name, None) for name in ("gate", "gate_ride"))
    if best is not None and best.margin.is_cuda:
        output.gate_on_device, output.gate = best, _on_cpu(best, "margin", "runner_up")
    if ride is not None and ride.best.margin.is_cuda:
        ride.on_device, ride.best = ride.best, _on_cpu(ride.best, "margin", "ids")


def _on_cpu(best: Top2, *names: str) -> Top2:
    copies = {name: getattr(best, name).to("cpu", non_blocking=True) for name in names}
    return best._replace(**copies)
