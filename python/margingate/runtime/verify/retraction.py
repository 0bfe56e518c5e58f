"""A request that lost its columns to memory pressure answers as if it had kept them.

SGLang would prefill prompt and output together, and prefilled columns of output tokens have other
bits than decoded ones. So only the prompt is prefilled again (canonically, as before); then the
settled output is replayed as verifier rows.
"""

from __future__ import annotations

import logging
from array import array
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.core.queue import Due
from margingate.runtime.compat.kv import columns, window_pool
from margingate.runtime.compat.model import weights
from margingate.runtime.request import guard
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import Kept, is_gated, logprob_lists
from margingate.runtime.sampling import constraints
from margingate.runtime.sampling.penalties import Table
from margingate.runtime.verify import rollback
from margingate.runtime.verify.merged_passes import MergedPasses
from margingate.runtime.verify.passes import Passes

logger = logging.getLogger(__name__)


class Retractions:
    """Takes requests of one scheduler out of their columns and puts them back in."""

    def __init__(
        self,
        scheduler: Any,
        requests: OpenRequests,
        passes: Passes,
        merged: MergedPasses,
        *,
        penalties: Table,
        holders: ColumnHolders,
    ) -> None:
        self._scheduler, self._requests, self._holders = scheduler, requests, holders
        self._passes, self._merged, self._penalties = passes, merged, penalties

    def release(self, original: Any, req: Any, **kwargs: Any) -> bool:
        """AROUND schedule_batch.release_req: keep the settled tokens apart, forget the rest.

        Returns what SGLang says: whether the request can go on later. It aborts one that cannot.
        """
        if not is_gated(req) or req.gate.key not in self._requests:
            return bool(original(req=req, **kwargs))
        kept = self._requests.retract(req)
        resumable = bool(original(req=req, **kwargs))
        if _is_given_up(req) or not resumable:
            self._requests.close(req)
            return resumable
        req.gate.counts.retractions += 1
        if req.gate.kept is None and kept > 0:
            _set_aside(req, kept)
        req.output_ids = array("q")
        for values in logprob_lists(req).values():
            values.clear()
        req.full_untruncated_fill_ids = array("q")
        constraints.follow(req, self._penalties)
        req.gate.forget_rows(kept)
        weights.forget_versions(req, kept)
        req.gate.waits_since = None
        return resumable

    def give_back(self, req: Any) -> None:
        """Put the kept tokens and log-probs back as the request's output."""
        kept = req.gate.kept
        req.gate.kept = None
        req.output_ids = kept.tokens
        for name, values in kept.logprobs.items():
            setattr(req.logprob, name, values)
        constraints.follow(req, self._penalties)

    def restore(self, batch: Any) -> None:
        """After the prompt's new prefill: give the output back and want its columns replayed."""
        replayed = [
            req
            for req in self._requests.take_prefilled_again()
            if not req.finished() and self._restored(batch, req)  # not aborted meanwhile
        ]
        if replayed:
            self._replay(replayed)

    def _replay(self, reqs: list[Any]) -> None:
        """Compute the columns of what was kept, whatever else waits: the next step reads them."""
        self._merged.enter()
        for req in reqs:
            self._requests.queue.drain(req.gate.key)  # first in each pass
        while any(map(self._waits, reqs)):
            self._passes.run(self._requests.next_batch(), Due.DRAINING)

    def _waits(self, req: Any) -> bool:
        ledger, key = self._requests.ledger, req.gate.key
        # One whose grammar failed is finished, and its rows are never computed.
        return ledger.is_open(key) and bool(ledger.wanted(key)) and not req.finished()

    def _restored(self, batch: Any, req: Any) -> bool:
        """As `_restore_one`; what raises there ends the request."""
        with guard.request(req, "a retraction's end"):
            return self._restore_one(batch, req)
        return False

    def _restore_one(self, batch: Any, req: Any) -> bool:
        """Returns whether there was room."""
        tokens = req.gate.kept.tokens
        more = len(tokens) - 1
        if more and not rollback.extend_columns(self._scheduler, req, more):
            if not self._holders.others(batch, req):  # no more room to wait for
                raise RuntimeError(self._does_not_fit(len(tokens)))
            self._retract_again(batch, req)
            return False
        if req.output_ids[0] != tokens[0] and not req.gate.stands:
            req.gate.counts.missed += 1
            logger.warning(
                "margingate: request %s chose another first token after a retraction: its prefill "
                "is not canonical on this machine; please report it.",
                req.rid,
            )
        self.give_back(req)
        req.full_untruncated_fill_ids = array("q")
        req.decode_batch_idx += more
        rollback.set_running_tail(self._scheduler, (batch,), req)
        rollback.recount_reasoning(self._scheduler, req)
        self._requests.replay(req)
        return True

    def _does_not_fit(self, tokens: int) -> str:
        pool, way_out = "K/V pool", "--mem-fraction-static"
        if window_pool.is_split(self._scheduler.token_to_kv_pool_allocator.get_kvcache()):
            pool, way_out = "K/V pool of layers with a window", "--swa-full-tokens-ratio"
        kept = f"the {tokens} tokens that were kept of its answer"
        return f"{kept} do not fit into the {pool} at once: raise {way_out}"

    def _retract_again(self, batch: Any, req: Any) -> None:
        """No room for the replay: wait in the queue for the running requests to end."""
        index = batch.reqs.index(req)
        columns.retract(batch, index)
        stay = [i for i in range(len(batch.reqs)) if i != index]
        batch.filter_batch(keep_indices=stay)
        self._scheduler._add_request_to_queue(req, is_retracted=True)


def _is_given_up(req: Any) -> bool:
    """Whether SGLang ends it here: no memory even alone. Other aborts go back to the queue; those
    with this status, of a grammar or of the gate, name a type of error.
    """
    reason = req.to_finish
    if not isinstance(reason, FINISH_ABORT):
        return False
    return reason.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and reason.err_type is None


def _set_aside(req: Any, kept: int) -> None:
    lists = logprob_lists(req)
    req.gate.kept = Kept(req.output_ids[:kept], {n: v[:kept] for n, v in lists.items()})
