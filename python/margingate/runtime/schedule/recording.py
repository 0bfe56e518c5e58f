"""The rows of a forward become rows of the ledger: canonical, flagged or neither."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from margingate.config import GateConfig
from margingate.core.policy import INJECTED, Evidence, GatePolicy
from margingate.runtime.observe.study import force
from margingate.runtime.probe.checks.check_decode import CanonicalSteps
from margingate.runtime.request import guard
from margingate.runtime.request.forward_record import ForwardRecord, record_of
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.sampling import constraints
from margingate.runtime.verify.rows import inject_fault
from margingate.runtime.verify.simulation import Simulator


class Recorder:
    """Judges each row of a result by its evidence, and enters it with the open requests."""

    def __init__(
        self,
        scheduler: Any,
        config: GateConfig,
        requests: OpenRequests,
        in_flight: InFlight,
        simulator: Simulator,
        *,
        decode: CanonicalSteps | None,
        unseen: float,
    ) -> None:
        """
        Args:
            decode: which decode steps are canonical; None: none is.
            unseen: the router margin of rows that come without one.
        """
        self._scheduler, self._requests, self._in_flight = scheduler, requests, in_flight
        self._decode, self._simulator, self._unseen = decode, simulator, unseen
        self._policy = GatePolicy(config.policy, config.threshold, config.router_threshold)
        self._observes, self._studies = config.policy == "observe", config.study

    def record(self, batch: Any, result: Any) -> tuple[bool, list[Any]]:
        """Enter this forward's rows into the ledger, before SGLang sees whether they end.

        Returns whether the forward was canonical, and the gated requests that may have a row to be
        verified.
        """
        prefill = batch.forward_mode.is_extend()
        canonical = prefill or self._is_canonical(batch, result)
        record = record_of(result)
        margins, routers = self._margins(record, len(batch.reqs))
        if record is not None and record.best is not None and not prefill:
            self._requests.histogram.add_steps(margins)
        rows = _emitting(batch.reqs)
        if canonical and not prefill:
            rows = self._requests.enter_canonical(rows, margins)
        for i, req in rows:
            self._record_row(req, result, i, Evidence(margins[i], routers[i], canonical), prefill)
        return canonical, [req for _, req in rows if req.gate.gated]

    def _record_row(self, req: Any, result: Any, i: int, evidence: Evidence, prefill: bool) -> None:
        """What `enter_canonical` leaves, one by one. `evidence`: canonical as the forward is."""
        gate = req.gate
        if prefill and req.inflight_middle_chunks > 0:
            return
        if gate.kept is not None:
            self._requests.mark_prefilled_again(req)
        elif gate.gated:
            try:
                self._record_gated(req, result, i, evidence)
            except Exception as error:  # no context manager: this may run for each token
                guard.failed(req, "a row of the ledger", error)
        elif self._observes:
            margin, router = evidence.margin, evidence.router_margin
            flagged = self._policy.judge(margin, router).flagged
            self._requests.count_observed(req, flagged=flagged)
            if self._studies:
                force(self._scheduler.future_map, req, result, i, (margin, router))

    def _margins(
        self, record: ForwardRecord | None, rows: int
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Of each row, its own and that of the routers; on the CPU by now."""
        best = None if record is None else record.best
        margins = [math.inf] * rows if best is None else best.margin.tolist()
        if record is None or record.router is None:
            return margins, [self._unseen] * rows
        return margins, record.router.tolist()

    def _is_canonical(self, batch: Any, result: Any) -> bool:
        """Whether this decode step gave its rows the bits that a verify pass would."""
        if self._decode is None:
            return False
        return self._decode.is_canonical(len(batch.reqs), bool(result.can_run_cuda_graph))

    def _record_gated(self, req: Any, result: Any, i: int, evidence: Evidence) -> None:
        """`evidence`: of row `i`; canonical as far as the forward is."""
        requests, gate = self._requests, req.gate
        relay = None if self._in_flight.overlaps else self._scheduler.future_map
        fault = bool(gate.faults) and inject_fault(relay, req, result, i)
        if not gate.margins and gate.key not in requests:  # once a request, not once a token
            requests.open(req)
            constraints.begin(req)
        # Batch-invariant arithmetic on K/V that is not canonical gives no canonical bits, and a
        # margin that is no number means that the row itself is broken.
        margin, router, canonical, _ = evidence
        canonical = canonical and requests.columns_are_canonical(req) and not math.isnan(margin)
        simulated = self._simulator.flag(req, len(gate.margins) + 1)
        # The threshold is for logits as the model gives them.
        narrowed = margin * (1.0 if gate.penalties is None else gate.penalties.narrowing)
        verdict = self._policy.decide(Evidence(narrowed, router, canonical, simulated))
        requests.enter_row(req, margin, INJECTED if fault else verdict, canonical=canonical)


def _emitting(reqs: Sequence[Any]) -> list[tuple[int, Any]]:
    """Index and request of the rows that count; with overlap, there are some behind an end."""
    return [
        (i, req)
        for i, req in enumerate(reqs)
        if req.finished_reason is None
        and not req.is_retracted
        and (gate := getattr(req, "gate", None)) is not None
        and gate.hold is None
    ]
