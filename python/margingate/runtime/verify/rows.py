"""From a ledger's row to the verifier's input, and the rows that tests corrupt."""

from __future__ import annotations

from typing import Any

from margingate.core.ledger import Row
from margingate.runtime.compat.kv import columns
from margingate.runtime.request.forward_record import record_of
from margingate.runtime.request.record import GateRequest
from margingate.runtime.sampling.constraints import Constraint
from margingate.runtime.verify.verifier import RowInput, RowResult

_ONE_CHOICE = 1e29  # a greedy margin is inf there; seeded_top2 takes masked logits as -1e30


def row_input(req: Any, row: Row, constraint: Constraint | None = None) -> RowInput:
    """Row j >= 2 predicts token j from token j-1, which stands at position prompt + j - 2."""
    position = len(req.origin_input_ids) + row.index - 2
    assert position >= columns.protected(req), "a shared column must not be rewritten"
    wanted = None
    if req.return_logprob:
        ids = req.logprob.token_ids_logprob
        wanted = (req.logprob.top_logprobs_num, None if ids is None else tuple(ids))
    token = req.output_ids[row.index - 2]
    gate: GateRequest = req.gate
    return RowInput(columns.row(req), position, token, wanted, gate.draw, constraint, gate.shift)


def first_token(req: Any) -> RowResult:
    """Prefill is canonical, so its own choice is the verdict on row 1."""
    chosen = req.gate.injected_first
    return RowResult(req.output_ids[0] if chosen is None else chosen, 0.0, None)


def inject_fault(relay: Any, req: Any, result: Any, i: int) -> bool:
    """Test hook: make the fast path emit its runner-up in row `i` of a result, as a flip would.

    The faults are row numbers; a negative one hides its row, so that an audit alone can find it.
    Mutates the result, the request's list of faults and the token relay, which is None where the
    next step has read it already. Returns whether the row is to be flagged.
    """
    gate: GateRequest = req.gate
    row = len(req.output_ids) + 1
    due = gate.faults & {row, -row}
    if not due:
        return False
    record = record_of(result)
    best = None if record is None else record.best
    if best is None:
        return False  # nothing was chosen: there is no room for a token
    if float(best.margin[i]) > _ONE_CHOICE:
        return False  # its grammar leaves one token
    gate.faults -= due
    wrong = int(best.runner_up[i])
    if row == 1:
        gate.injected_first = int(result.next_token_ids[i])
    result.next_token_ids[i] = wrong
    if relay is not None:
        relay.output_tokens_buf[columns.row(req)] = wrong
    return row in due
