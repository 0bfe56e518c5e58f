"""Who has K/V columns: which of the scheduler's batches and of the gate's lists may hold them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from margingate.runtime.compat.kv import columns
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests


class ColumnHolders:
    """The requests of one scheduler that hold columns, gated or not. Asked between two steps."""

    def __init__(self, scheduler: Any, requests: OpenRequests, in_flight: InFlight) -> None:
        self._scheduler, self._requests, self._in_flight = scheduler, requests, in_flight

    def all(self) -> list[Any]:
        """Whoever owns slots, one in the batch that was just processed included."""
        return self._holding(self._in_flight.around())

    def recorded(self) -> list[Any]:
        """Those that compute on with their columns and carry the gate's record."""
        scheduler = self._scheduler
        batches = (scheduler.running_batch, scheduler.last_batch)
        found = self._holding(batch for batch in batches if batch is not None)
        return [req for req in found if hasattr(req, "gate")]

    def others(self, batch: Any, req: Any) -> bool:
        """Whether one holds columns beside `req`, of `batch`, and may give them up later.

        Results in flight have been brought in. One that is open counts wherever it waits.
        """
        found = [*batch.reqs, *self._scheduler.running_batch.reqs, *self._requests]
        found += self._in_chunks()
        return any(columns.holds(other) for other in found if other is not req)

    def _holding(self, batches: Iterable[Any]) -> list[Any]:
        """Each once: of the batches and those in flight, of what waits, and in chunks."""
        found = [req for batch in (*batches, *self._in_flight.batches()) for req in batch.reqs]
        found += [*self._requests.held, *self._requests.rejoining, *self._in_chunks()]
        return [req for req in {id(req): req for req in found}.values() if columns.holds(req)]

    def _in_chunks(self) -> list[Any]:
        """The request of whose prompt a part is computed, if there is one."""
        chunked = self._scheduler.chunked_req
        return [] if chunked is None else [chunked]
