"""The gate of one scheduler: margin, policy, ledger, queue, verifier, repair, output."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from margingate.config import GateConfig
from margingate.core.histogram import MarginHistogram
from margingate.core.ledger import Ledger
from margingate.core.policy import INJECTED, GatePolicy
from margingate.core.queue import MicroBatchQueue
from margingate.runtime import (
    canonical_prefill,
    constraints,
    ends,
    fingerprint,
    guard,
    integrity,
    own_attention,
    penalties,
    retraction,
    rollback,
    verdicts,
    verifier,
)
from margingate.runtime.audit import Auditor
from margingate.runtime.canonical import CanonicalSteps, check_padding, measure
from margingate.runtime.invariance import largest_rows
from margingate.runtime.observer import Observer
from margingate.runtime.overlap import InFlight, passed_over
from margingate.runtime.radix import GateRadixCache, is_gated
from margingate.runtime.request import Counts, GateRequest, now
from margingate.runtime.rides import Rides
from margingate.runtime.rows import inject_fault
from margingate.runtime.simulate import Simulator
from margingate.runtime.study import force

logger = logging.getLogger(__name__)


class GateController:
    """Owns the ledger and the queue; SGLang's objects change in `rollback` and `retraction` only.

    All methods run on the scheduler's thread.
    """

    def __init__(self, scheduler: Any, config: GateConfig) -> None:
        assert config.rows is not None and config.prefill_chunk is not None
        self.scheduler = scheduler
        self.config = config
        self.prefill_chunk: int = config.prefill_chunk
        self.policy = GatePolicy(config.policy, config.threshold)
        self.simulator = Simulator(config)
        self.ledger = Ledger(config.guarantee, config.repair)
        self.queue = MicroBatchQueue(config.rows, config.max_delay or 0)
        runner = scheduler.tp_worker.model_runner
        self.verifier = verifier.build(runner, config)
        self.canonical: CanonicalSteps | None = None  # None: no decode step is taken to be
        if config.invariant:
            self.canonical = measure(self.verifier, scheduler, largest_rows(runner.device))
        elif config.policy != "observe":
            check_padding(self.verifier, scheduler)
        self.prefill = canonical_prefill.measure(
            scheduler, self.verifier, config.invariant and config.prefill == "auto"
        )
        own = own_attention.of(self.verifier.backend)
        if own is not None:
            own.confirm(prefill=self.prefill.together)
        if self.prefill.as_decoded and self.canonical is not None:
            self.canonical.extend()
        if isinstance(scheduler.tree_cache, GateRadixCache):
            scheduler.tree_cache.share(self.prefill)
        self.fingerprint = fingerprint.make(scheduler, config, self.verifier, self.prefill)
        self.auditor = Auditor(self)
        pages = runner.req_to_token_pool.req_to_token
        vocabulary = scheduler.model_config.vocab_size
        self.penalties = penalties.Table(len(pages), vocabulary, pages.device)
        self.totals = Counts()
        self.histogram = MarginHistogram()
        self.reasons: dict[str, int] = {}
        self.dues: dict[str, int] = {}
        self.requests: dict[str, Any] = {}  # open gated requests by key
        self.held: dict[str, Any] = {}  # those whose end is withheld
        self.rejoining: list[Any] = []  # flipped after they had left the batch
        self.prefilled_again: list[Any] = []  # retracted, their prompt just computed anew
        self.ended: list[Any] = []  # to be told, with the next `stream`
        self.batch: Any = None  # the one being processed
        self.step = 0  # batches processed
        self.canonical_steps = 0  # decode steps that needed no verification
        self.largest_batch = 0  # requests in one decode step
        self.in_flight = InFlight(scheduler)
        self.integrity = integrity.Reports()
        self.observes_only = config.policy == "observe"
        self.rides = Rides(self)
        self.failed = False  # an exception of ours ended a request since the last batch
        self.processing = False  # inside SGLang's own result processing
        self.observers: tuple[Observer, ...] = ()

    # -- around one batch result

    def process(self, original: Any, batch: Any, result: Any) -> None:
        """AROUND Scheduler.process_batch_result; with overlap, `settle` waits for next_batch."""
        if self.in_flight.is_processed(result):
            return
        gated = self._commit(original, batch, result)
        self.rides.land(result)
        if self.in_flight.overlaps:
            self.stream(gated)
        elif gated or self.rides.landed:
            self.settle(batch, gated)
        if self.config.debug:
            integrity.check(self)

    def _commit(self, original: Any, batch: Any, result: Any) -> list[Any]:
        """Enter a result into the ledger, let SGLang process it; the gated requests in it."""
        gated = [req for req in batch.reqs if is_gated(req)]
        if not self.in_flight.overlaps:
            self.batch = batch
        elif result.copy_done is not None:
            result.copy_done.synchronize()  # as SGLang is about to: margins came with the tokens
        if batch.forward_mode.is_decode():
            self.largest_batch = max(self.largest_batch, len(batch.reqs))
        canonical = self._record(batch, result)
        behind = [req for req in gated if self.is_held(req)]  # rows behind their end
        self.processing = True
        try:
            with passed_over(behind):
                original(self.scheduler, batch, result)
        finally:
            self.processing = False
        if batch.forward_mode.is_extend():
            constraints.abort_failed(gated)
        for req in behind:
            rollback.drop_last_column(self.scheduler, req)
        self.step += 1
        guard.tell(self.observers, "stepped", batch, len(gated), canonical)
        return gated

    def settle(self, batch: Any, reqs: list[Any]) -> None:
        """With nothing in flight: replay what `batch` prefilled again, verify, repair, send."""
        retraction.restore(self, batch)
        self._want_streaming_tails(reqs)
        self.verify_due(idle=False)
        self.stream(reqs)

    def waits(self) -> bool:
        """Whether anything is to be done that needs nothing in flight."""
        return bool(
            self.held
            or self.rejoining
            or self.prefilled_again
            or self.rides.landed
            or self._due(idle=False)
            or any(self._full_tails(self.requests.values()))
        )

    def _due(self, idle: bool) -> str | None:
        """Why a pass of its own is due, if one is: none that a decode step will carry."""
        due = self.queue.due(self.ledger, self.step, idle)
        return None if self.rides.expected(due) and not idle else due

    def verify_due(self, idle: bool) -> None:
        """With nothing in flight: enter what is known, run every pass that is due and does not
        ride, then end the requests that waited for them.
        """
        self.rides.enter()
        while due := self._due(idle):
            verdicts.run_pass(self, self.queue.next_batch(self.ledger), due)
        for key in [key for key in self.held if not self.ledger.pending(key)]:
            ends.release(self, self.held[key])

    # -- margins in

    def _record(self, batch: Any, result: Any) -> bool:
        """Enter this forward's rows into the ledger, before SGLang sees whether they end.

        Returns whether the forward was canonical.
        """
        best = getattr(getattr(result, "logits_output", None), "gate", None)
        prefill = batch.forward_mode.is_extend()
        canonical = prefill or self._is_canonical(batch, result)
        margins = best.margin.tolist() if best is not None else None
        if margins is not None and not prefill:
            self.histogram.add_steps(margins)
        for i, req in enumerate(batch.reqs):
            gate: GateRequest | None = getattr(req, "gate", None)
            if gate is None or req.is_retracted or req.finished() or gate.hold is not None:
                continue  # with overlap, a row behind the end
            if prefill and req.inflight_middle_chunks > 0:
                continue
            if gate.kept is not None:
                self.prefilled_again.append(req)
                continue
            margin = margins[i] if margins is not None else float("inf")
            if gate.gated:
                relay = None if self.in_flight.overlaps else self.scheduler.future_map
                fault = bool(gate.faults) and inject_fault(relay, req, result, i)
                try:
                    self._emit(req, gate, margin, canonical, fault)
                except Exception as error:  # no context manager: this runs for each token
                    guard.note("a row of the ledger", error)
                    guard.end(req, "a row of the ledger", error)
            elif self.observes_only:
                self._observe(gate, margin)
                if self.config.study:
                    force(self.scheduler.future_map, req, result, i, margin)
        return canonical

    def _is_canonical(self, batch: Any, result: Any) -> bool:
        """Whether this decode step gave its rows the bits that a verify pass would."""
        if self.canonical is None:
            return False
        held = self.canonical.holds(len(batch.reqs), bool(result.can_run_cuda_graph))
        self.canonical_steps += held
        return held

    def _emit(
        self, req: Any, gate: GateRequest, margin: float, canonical: bool, fault: bool
    ) -> None:
        if gate.key not in self.requests:
            self.ledger.open(gate.key)
            self.requests[gate.key] = req
            constraints.begin(req)
        # A canonical computation on columns that are not is no better than any other, and a margin
        # that is no number says that this was none.
        canonical &= self.ledger.canonical(gate.key) == self.ledger.emitted(gate.key)
        canonical &= not math.isnan(margin)
        simulated = self.simulator.flag(req, self.ledger.emitted(gate.key) + 1)
        verdict = self.policy.decide(margin, canonical=canonical, simulated=simulated)
        decision = INJECTED if fault else verdict
        self.reasons[decision.reason] = self.reasons.get(decision.reason, 0) + 1
        self.ledger.emit(gate.key, flagged=decision.flagged, canonical=canonical and not fault)
        gate.margins.append(margin)
        gate.flags.append(decision.flagged)
        gate.canonical.append(canonical)
        gate.counts.steps += 1
        if decision.flagged:
            gate.counts.flagged += 1
            self.queue.note(gate.key, self.step)
            told = (req, len(gate.flags), margin, decision.reason)
            guard.tell(self.observers, "flagged", *told)
        if gate.waits_since is None and not self._is_settled(gate):
            gate.waits_since = now()

    def _observe(self, gate: GateRequest, margin: float) -> None:
        """Count what the threshold would have flagged; change nothing."""
        flagged = not margin >= self.config.threshold
        self.reasons["observed"] = self.reasons.get("observed", 0) + 1
        self.totals.steps += 1
        self.totals.flagged += flagged
        gate.counts.steps += 1
        gate.counts.flagged += flagged

    def _want_streaming_tails(self, reqs: list[Any]) -> None:
        """Exact: a stream's rows settle by replay; ask for one whenever a micro-batch is full."""
        for req in self._full_tails(reqs):
            self.ledger.request_tail(req.gate.key)
            self.queue.note(req.gate.key, self.step)

    def _full_tails(self, reqs: Iterable[Any]) -> Iterator[Any]:
        if self.config.guarantee != "exact":
            return
        for req in reqs:
            key = req.gate.key
            open_ = key in self.requests and req.gate.kept is None
            if req.stream and open_ and not self.ledger.stopped(key):
                waiting = self.ledger.emitted(key) - self.ledger.canonical(key)
                if waiting >= self.verifier.rows:
                    yield req

    def _is_settled(self, gate: GateRequest) -> bool:
        return self.ledger.frontier(gate.key) == self.ledger.emitted(gate.key)

    def note_settled(self, req: Any) -> None:
        """A wait ends when the frontier reaches what was emitted; whatever waits on starts anew."""
        gate = req.gate
        if gate.waits_since is None or not self._is_settled(gate):
            return
        waited, gate.waits_since = now() - gate.waits_since, None
        gate.counts.settle_s += waited
        guard.tell(self.observers, "settled", req, waited)

    # -- output

    def stream(self, reqs: list[Any]) -> None:
        """Send what is settled of `reqs`, and the ends that came up since the last call."""
        ended, self.ended = self.ended, []
        known = {id(req) for req in reqs}
        reqs = reqs + [req for req in ended if id(req) not in known]
        # A prompt that is prefilled in chunks has no row yet, and nothing to send.
        opened = [req for req in reqs if req.finished() or req.gate.key in self.requests]
        reqs = [req for req in opened if not req.finished_output and (req.finished() or req.stream)]
        if reqs:
            logprobs = any(req.return_logprob for req in reqs)
            self.scheduler.output_streamer.stream_output(reqs, logprobs)

    def settle_all(self) -> None:
        """Verify whatever waits, full micro-batch or not."""
        self.in_flight.bring_in()
        self.verify_due(idle=True)
        self.stream([req for req in self.requests.values() if req.stream])

    def queue_waits(self) -> bool:
        return any(self.ledger.pending(key) for key in self.requests)

    def is_held(self, req: Any) -> bool:
        """Whether the end of the request is withheld."""
        return is_gated(req) and req.gate.key in self.held
