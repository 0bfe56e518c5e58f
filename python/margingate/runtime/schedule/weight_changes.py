"""Around what replaces the weights of a running server, in whatever way and however it is paused.

What waits is settled by the weights that emitted it. Then columns and answers belong to the next
generation: the radix tree is parted, and a request that holds columns is one of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from margingate.runtime.compat.model import images, weights
from margingate.runtime.observe.fingerprint import Fingerprint
from margingate.runtime.request import guard
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.schedule import memory, weight_refusals
from margingate.runtime.schedule.radix import GateTree


class WeightChanges:
    """What one scheduler's requests and columns have to do with changes of its weights."""

    def __init__(
        self,
        scheduler: Any,
        requests: OpenRequests,
        holders: ColumnHolders,
        fingerprint: Fingerprint,
        settle: Callable[[], None],
    ) -> None:
        """`settle`: verifies whatever waits."""
        self._scheduler, self._requests, self._holders = scheduler, requests, holders
        self._fingerprint, self._settle = fingerprint, settle

    def around(self, original: Any, manager: Any, received: Any) -> Any:
        """AROUND what replaces weights in SchedulerWeightUpdaterManager, failures included."""
        if weight_refusals.looks_only(received):
            return original(manager, received)
        self._settle_all()
        refused = weight_refusals.refusal(self._scheduler, received)
        refused = refused or memory.refusal(self._scheduler, received)
        if refused is not None:
            return refused
        try:
            return original(manager, received)
        finally:
            self._changed()

    def _settle_all(self) -> None:
        """What waits; with exact each row so far, which the next weights would not verify."""
        self._settle()
        if self._requests.ledger.guarantee != "exact":
            return
        for req in self._requests:
            if req.gate.kept is None and not req.finished():
                self._requests.want_tail(req)
        self._settle()

    def begun(self, adder: Any, req: Any) -> None:
        """If `req` was just admitted to a prefill: its columns are of the weights in memory."""
        if not adder.can_run_list or adder.can_run_list[-1] is not req:
            return
        req.gate.begins(self._admitted(), _emitted(req))

    def _admitted(self) -> int:
        """The generation. While the weights cannot be read, answers have no fingerprint."""
        try:
            return self._fingerprint.admit()
        except Exception as error:
            guard.note("reading the weights", error)
            return self._fingerprint.generation

    def relabelled(self, label: str | None) -> None:
        """SGLang's label of the weights is about to change: it notes that of the requests in its
        batches and its queue, by their output. What the gate keeps apart is noted here.
        """
        if not weights.is_another(label):
            return
        for req in self._requests:
            if req.gate.kept is not None:
                weights.note_version(req, len(req.gate.kept.tokens))
        for req in (*self._requests.held, *self._requests.rejoining):
            weights.note_version(req, len(req.output_ids))

    def _changed(self) -> None:
        """The weights may be others now."""
        updating = weights.session_is_open(self._scheduler)
        if not self._fingerprint.weights_changed(updating=updating):
            return
        images.forget_embeddings()
        generation = self._fingerprint.generation
        for req in self._holders.recorded():
            req.gate.crosses(generation, _emitted(req))
        cache = self._scheduler.tree_cache
        if isinstance(cache, GateTree):  # else there is none
            cache.part(generation)


def _emitted(req: Any) -> int:
    """Tokens of its answer, which are kept apart while its prompt is prefilled again."""
    kept = req.gate.kept
    return len(req.output_ids if kept is None else kept.tokens)
