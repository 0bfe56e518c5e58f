"""What follows from verified rows: verdicts in the ledger, counts, repairs, rollbacks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any

from margingate.core.ledger import Outcome, Row
from margingate.runtime import constraints, ends, guard, rollback
from margingate.runtime.request import now
from margingate.runtime.rows import first_token, row_input
from margingate.runtime.verifier import RowInput, RowResult

if TYPE_CHECKING:
    from margingate.runtime.controller import GateController

logger = logging.getLogger(__name__)


def run_pass(controller: GateController, rows: Sequence[Row], due: str) -> None:
    """Verify `rows` in a forward of their own. Only with nothing in flight."""
    start = now()
    inputs = inputs_of(controller, rows)
    found = controller.verifier.run(inputs) if inputs else []
    enter(controller, rows, by_row(rows, found), start, due)


def inputs_of(controller: GateController, rows: Sequence[Row]) -> list[RowInput]:
    """What a pass is given: all of `rows` but first ones, which the prefill computed."""
    size = controller.scheduler.model_config.vocab_size
    inputs = []
    for key, span in groupby((row for row in rows if row.index > 1), lambda row: row.rid):
        req, of_req = controller.requests[key], list(span)
        found: Iterable[Any] = repeat(None)
        if constraints.constrained(req):
            found = constraints.of_rows(req, [row.index for row in of_req], size)
        inputs += [row_input(req, *each) for each in zip(of_req, found, strict=False)]
    return inputs


def by_row(rows: Sequence[Row], found: Iterable[RowResult]) -> list[RowResult | None]:
    """The results of `inputs_of`, with None for first rows: the prefill's choice is the verdict."""
    results = iter(found)
    return [None if row.index == 1 else next(results) for row in rows]


def enter(
    controller: GateController,
    rows: Sequence[Row],
    results: Sequence[RowResult | None],
    start: float,
    due: str,
) -> None:
    """Enter the verdicts of a pass. A flip needs nothing in flight.

    Args:
        results: of each row, as `by_row`.
        start: of the pass, `request.now`.
    """
    controller.totals.passes += 1
    controller.dues[due] = controller.dues.get(due, 0) + 1
    for req in {id(req): req for row in rows if (req := _failed(controller, row))}.values():
        ends.give_up(controller, req)
    open_rows = [each for each in zip(rows, results, strict=True) if _is_open(controller, each[0])]
    keys = dict.fromkeys(row.rid for row, _ in open_rows)
    for key in keys:
        controller.requests[key].gate.counts.passes += 1
    for row, result in open_rows:
        with guard.request(of(controller, row), "a verdict"):
            _judge(controller, row, verdict(controller, row, result))
    reqs = [controller.requests[key] for key in keys]
    for req in reqs:
        controller.queue.settle(controller.ledger, req.gate.key, controller.step)
        controller.note_settled(req)
    guard.tell(controller.observers, "passed", len(rows), len(reqs), now() - start, due)


def of(controller: GateController, row: Row) -> Any:
    """The row's request, None if it is gone."""
    return controller.requests.get(row.rid)


def _failed(controller: GateController, row: Row) -> Any:
    """The row's request if its grammar failed and left the row without a mask; row 1 needs none."""
    req = of(controller, row)
    current = req is not None and controller.ledger.epoch(row.rid) == row.epoch
    return req if current and row.index > 1 and req.gate.grammar_failed else None


def _is_open(controller: GateController, row: Row) -> bool:
    """Whether the row's request is there, and was not given up."""
    req = of(controller, row)
    return req is not None and not (req.gate.grammar_failed and req.finished())


def matches(controller: GateController, row: Row, result: RowResult | None) -> bool:
    """Whether this verdict takes nothing back: it agrees, or its row is not there any more."""
    req = of(controller, row)
    if req is None or controller.ledger.epoch(row.rid) != row.epoch:
        return True
    if _failed(controller, row):
        return False
    token: int = req.output_ids[row.index - 1]
    return token == verdict(controller, row, result).token


def verdict(controller: GateController, row: Row, result: RowResult | None) -> RowResult:
    """The result that counts: the verifier's, the prefill's, or a simulated one."""
    req = controller.requests[row.rid]
    if result is None:
        result = first_token(req)
    return controller.simulator.verdict(req, row, result)


def _judge(controller: GateController, row: Row, result: RowResult) -> None:
    req, ledger = controller.requests[row.rid], controller.ledger
    emitted = ledger.emitted(row.rid)
    epoch_is_current = ledger.epoch(row.rid) == row.epoch
    agrees = epoch_is_current and req.output_ids[row.index - 1] == result.token
    emitted_token = req.output_ids[row.index - 1] if epoch_is_current else -1
    outcome = ledger.verdict(row, agrees)
    counts = req.gate.counts
    told = (req, row.index, outcome, emitted_token, result.token)
    guard.tell(controller.observers, "judged", *told)
    counts.verified += 1
    if outcome is Outcome.STALE:  # an earlier row of this pass flipped, or it was retracted
        return
    counts.repaired += row.index > 1
    counts.replayed += not req.gate.flags[row.index - 1]
    if outcome is Outcome.FLIP:
        counts.flips += 1
        controller.histogram.add_flip(req.gate.margins[row.index - 1])
        req.gate.forget_rows(row.index)
        counts.rolled_back += emitted - row.index + 1
        _roll_back(controller, req, row.index, result)
    elif outcome is Outcome.MATCH:
        rollback.replace_logprobs(req, row.index, result)
    elif outcome is Outcome.MISSED:
        counts.missed += 1
        logger.warning(
            "margingate: token %d of request %s was sent but its replay says otherwise: "
            "raise --gate-threshold, or use --gate-guarantee exact.",
            row.index,
            req.rid,
        )


def _roll_back(controller: GateController, req: Any, row: int, result: RowResult) -> None:
    scheduler = controller.scheduler
    batches = (controller.batch, scheduler.running_batch, scheduler.last_batch)
    ejected = not rollback.to_row(scheduler, batches, req, row, result)
    ends.let_go(controller, req)
    req.update_finish_state(1)
    if req.finished():
        ends.end(controller, req)
    elif ejected:
        controller.rejoining.append(req)
