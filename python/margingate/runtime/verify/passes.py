"""Verify passes and what follows from them: verdicts in the ledger, counts, repairs, rollbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from time import monotonic as now
from typing import Any

from margingate.core.ledger import Outcome, Row
from margingate.runtime.request import guard, lifecycle
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.sampling import constraints
from margingate.runtime.sampling.penalties import Table
from margingate.runtime.verify import rollback
from margingate.runtime.verify.rows import first_token, row_input
from margingate.runtime.verify.simulation import Simulator
from margingate.runtime.verify.verifier import RowInput, RowResult, Verifier

logger = logging.getLogger(__name__)


def by_row(rows: Sequence[Row], found: Iterable[RowResult]) -> list[RowResult | None]:
    """The results of `inputs_of`, with None for first rows: the prefill's choice is the verdict."""
    results = iter(found)
    return [None if row.index == 1 else next(results) for row in rows]


class Passes:
    """Runs verify passes of one scheduler, and enters what they say."""

    def __init__(
        self,
        scheduler: Any,
        requests: OpenRequests,
        verifier: Verifier,
        *,
        simulator: Simulator,
        in_flight: InFlight,
        penalties: Table,
    ) -> None:
        self._scheduler, self._requests = scheduler, requests
        self._verifier, self._simulator = verifier, simulator
        self._in_flight, self._penalties = in_flight, penalties

    def run(self, rows: Sequence[Row], due: str) -> None:
        """Verify `rows` in a forward of their own. Only with nothing in flight."""
        start = now()
        results = self._computed(rows)
        self.enter(list(results), list(results.values()), start, due)

    def _computed(self, rows: Sequence[Row]) -> dict[Row, RowResult | None]:
        """As `by_row`, without rows of a request that raises: it ends.

        Where the pass itself raises, each request's rows are computed in a pass of their own, so
        that the one that is the cause is found; a row's bits are the same in any.
        """
        kept, inputs = self.inputs_of(rows)
        try:
            found = self._verifier.run(inputs) if inputs else []
            return dict(zip(kept, by_row(kept, found), strict=True))
        except Exception as error:
            keys = dict.fromkeys(row.rid for row in kept)
            if len(keys) == 1:
                self.failed(kept, error)
                return {}
            guard.note("a verify pass", error)
            alone = [self._computed([row for row in kept if row.rid == key]) for key in keys]
            return {row: result for results in alone for row, result in results.items()}

    def failed(self, rows: Iterable[Row], error: Exception) -> None:
        """A pass of these rows raised: their requests end. The rows stay in flight until then."""
        for key in dict.fromkeys(row.rid for row in rows):
            guard.failed(self._requests[key], "a verify pass", error)

    def inputs_of(self, rows: Sequence[Row]) -> tuple[tuple[Row, ...], list[RowInput]]:
        """What a pass is given: all of `rows` but first ones, which the prefill computed.

        Returns:
            `rows` without those of requests that raised here, which end; and the inputs of these.
        """
        kept: list[Row] = []
        inputs: list[RowInput] = []
        for key, span in groupby(rows, lambda row: row.rid):
            req, of_req = self._requests[key], list(span)
            with guard.request(req, "a row to be verified"):
                inputs += self._inputs(req, [row for row in of_req if row.index > 1])
                kept += of_req
        return tuple(kept), inputs

    def _inputs(self, req: Any, rows: Sequence[Row]) -> list[RowInput]:
        size = self._scheduler.model_config.vocab_size
        found: Iterable[Any] = repeat(None)
        if constraints.constrained(req):
            found = constraints.of_rows(req, [row.index for row in rows], size)
        return [row_input(req, *each) for each in zip(rows, found, strict=False)]

    def enter(
        self, rows: Sequence[Row], results: Sequence[RowResult | None], start: float, due: str
    ) -> None:
        """Enter the verdicts of a pass. A flip needs nothing in flight.

        Args:
            results: of each row, as `by_row`.
            start: of the pass, seconds of time.monotonic.
        """
        requests = self._requests
        for req in {id(req): req for row in rows if (req := self._failed(row))}.values():
            with guard.request(req, "an end without a verdict"):
                lifecycle.give_up(requests, self._scheduler.tree_cache, req)
        judged = [each for each in zip(rows, results, strict=True) if self._is_open(each[0])]
        reqs = [requests[key] for key in dict.fromkeys(row.rid for row, _ in judged)]
        requests.pass_began(reqs, due)
        for row, result in judged:
            with guard.request(requests.of_row(row), "a verdict"):
                self._judge(row, self._verdict(row, result))
        requests.pass_entered(reqs)
        requests.observers.passed(len(rows), len(reqs), now() - start, due)

    def matches(self, row: Row, result: RowResult | None) -> bool:
        """Whether this verdict takes nothing back: it agrees, or its row is not there any more."""
        req = self._requests.of_row(row)
        if req is None or not self._requests.is_current(row):
            return True
        if self._failed(row):
            return False
        with guard.request(req, "a verdict"):
            token: int = req.output_ids[row.index - 1]
            return row.index <= req.gate.stands or token == self._verdict(row, result).token
        return True

    def _failed(self, row: Row) -> Any:
        """The row's request if its grammar failed and left the row without a mask; not row 1's."""
        req = self._requests.of_row(row)
        current = req is not None and self._requests.is_current(row)
        return req if current and row.index > 1 and req.gate.grammar_failed else None

    def _is_open(self, row: Row) -> bool:
        """Whether the row's request is there, and was not given up."""
        req = self._requests.of_row(row)
        return req is not None and not (req.gate.grammar_failed and req.finished())

    def _verdict(self, row: Row, result: RowResult | None) -> RowResult:
        """The result that counts: the verifier's, the prefill's, or a simulated one."""
        req = self._requests[row.rid]
        return self._simulator.verdict(req, row, first_token(req) if result is None else result)

    def _judge(self, row: Row, result: RowResult) -> None:
        req, ledger = self._requests[row.rid], self._requests.ledger
        emitted = ledger.emitted(row.rid)
        # -1: an earlier row of this pass flipped, or it was retracted.
        token = req.output_ids[row.index - 1] if self._requests.is_current(row) else -1
        stands = row.index <= req.gate.stands  # other weights emitted it: only its column is new
        outcome = ledger.verdict(row, stands or token == result.token)
        self._requests.judged(req, row, outcome, token, result.token)
        if outcome is Outcome.FLIP:
            self._flip(req, row.index, result, emitted)
        elif outcome is Outcome.MATCH and not stands:
            rollback.replace_logprobs(req, row.index, result)
        elif outcome is Outcome.MISSED:
            logger.warning(
                "margingate: token %d of request %s was sent but its replay says otherwise: "
                "raise --gate-threshold, or use --gate-guarantee exact.",
                row.index,
                req.rid,
            )

    def _flip(self, req: Any, row: int, result: RowResult, emitted: int) -> None:
        """The verifier's token takes the place of the one at `row`; what was behind it is undone.

        Changes the record, SGLang's request and its row in the batches that hold it. The request
        then decodes on, or ends if the new token ends it.
        """
        self._requests.flipped(req, row, emitted)
        batched = rollback.to_row(self._scheduler, self._in_flight.around(), req, row, result)
        constraints.follow(req, self._penalties, newest=False)
        self._requests.unhold(req)
        lifecycle.check_finish(self._requests, req)
        if not (req.finished() or constraints.take_newest(req)):
            lifecycle.check_finish(self._requests, req)
        if req.finished():
            lifecycle.end(self._requests, self._scheduler.tree_cache, req)
        elif not batched:
            self._requests.mark_rejoining(req)
