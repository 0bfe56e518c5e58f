"""The gate of one scheduler: margin, policy, ledger, queue, verifier, repair, output."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.common import release_kv_cache

from margingate.config import GateConfig
from margingate.core.histogram import MarginHistogram
from margingate.core.ledger import Ledger, Outcome, Row
from margingate.core.policy import INJECTED, GatePolicy
from margingate.core.queue import MicroBatchQueue
from margingate.runtime import integrity, retraction, rollback
from margingate.runtime.canonical import CanonicalSteps, measure
from margingate.runtime.invariance import largest_rows
from margingate.runtime.radix import is_gated
from margingate.runtime.request import Counts, GateRequest, Hold, now
from margingate.runtime.rows import first_token, inject_fault, row_input
from margingate.runtime.verifier import RowResult, Verifier

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
        self.ledger = Ledger(config.guarantee, config.repair)
        self.queue = MicroBatchQueue(config.rows, config.max_delay)
        runner = scheduler.tp_worker.model_runner
        self.verifier = Verifier(runner, config.rows, use_graphs=config.invariant)
        self.canonical: CanonicalSteps | None = None  # None: no decode step is taken to be
        if config.invariant:
            self.canonical = measure(self.verifier, scheduler, largest_rows(runner.device))
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
        self.observes_only = config.policy == "observe"
        self.processing = False  # inside SGLang's own result processing

    # -- around one batch result

    def process(self, original: Any, batch: Any, result: Any) -> None:
        """AROUND Scheduler.process_batch_result: commit, verify, settle, send."""
        gated = [req for req in batch.reqs if is_gated(req)]
        self.batch = batch
        if batch.forward_mode.is_decode():
            self.largest_batch = max(self.largest_batch, len(batch.reqs))
        self._record(batch, result)
        self.processing = True
        try:
            original(self.scheduler, batch, result)
        finally:
            self.processing = False
        self.step += 1
        if gated:
            retraction.restore(self, batch)
            self._want_streaming_tails(gated)
            self.verify_due(idle=False)
            self.stream(gated)
        if self.config.debug:
            integrity.check(self)

    def verify_due(self, idle: bool) -> None:
        """Run every verify pass that is due, then end the requests that waited for them."""
        while due := self.queue.due(self.ledger, self.step, idle):
            self.dues[due] = self.dues.get(due, 0) + 1
            self._verify(self.queue.next_batch(self.ledger))
        for key in [key for key in self.held if not self.ledger.pending(key)]:
            self._release(self.held.pop(key))

    # -- margins in

    def _record(self, batch: Any, result: Any) -> None:
        """Enter this forward's rows into the ledger, before SGLang sees whether they end."""
        best = getattr(getattr(result, "logits_output", None), "gate", None)
        prefill = batch.forward_mode.is_extend()
        canonical = prefill or self._is_canonical(batch, result)
        margins = best.margin.tolist() if best is not None else None
        if margins is not None and not prefill:
            self.histogram.add_steps(margins)
        for i, req in enumerate(batch.reqs):
            gate: GateRequest | None = getattr(req, "gate", None)
            if gate is None or req.is_retracted or req.finished():
                continue
            if prefill and req.inflight_middle_chunks > 0:
                continue
            if gate.kept is not None:
                self.prefilled_again.append(req)
                continue
            margin = margins[i] if margins is not None else float("inf")
            if gate.gated:
                fault = bool(gate.faults) and inject_fault(self.scheduler, req, result, i)
                self._emit(req, gate, margin, canonical, fault)
            elif self.observes_only:
                self._observe(gate, margin)

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
        # A canonical computation on columns that are not is no better than any other.
        canonical &= self.ledger.canonical(gate.key) == self.ledger.emitted(gate.key)
        decision = INJECTED if fault else self.policy.decide(margin, canonical=canonical)
        self.reasons[decision.reason] = self.reasons.get(decision.reason, 0) + 1
        self.ledger.emit(gate.key, flagged=decision.flagged, canonical=canonical and not fault)
        gate.margins.append(margin)
        gate.flags.append(decision.flagged)
        gate.counts.steps += 1
        if decision.flagged:
            gate.counts.flagged += 1
            self.queue.note(gate.key, self.step)

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
        if self.config.guarantee != "exact":
            return
        for req in reqs:
            key = req.gate.key
            if req.stream and key in self.requests and not self.ledger.stopped(key):
                waiting = self.ledger.emitted(key) - self.ledger.canonical(key)
                if waiting >= self.verifier.rows:
                    self.ledger.request_tail(key)
                    self.queue.note(key, self.step)

    # -- verify passes

    def _verify(self, rows: tuple[Row, ...]) -> None:
        inputs = [row_input(self.requests[row.rid], row) for row in rows if row.index > 1]
        found = self.verifier.run(inputs) if inputs else []
        results = iter(found)
        self.totals.passes += 1
        for key in dict.fromkeys(row.rid for row in rows):
            self.requests[key].gate.counts.passes += 1
        for row in rows:
            first = first_token(self.requests[row.rid]) if row.index == 1 else None
            self._judge(row, first or next(results))
        for key in dict.fromkeys(row.rid for row in rows):
            self.queue.settle(self.ledger, key, self.step)

    def _judge(self, row: Row, result: RowResult) -> None:
        req = self.requests[row.rid]
        emitted = self.ledger.emitted(row.rid)
        epoch_is_current = self.ledger.epoch(row.rid) == row.epoch
        matches = epoch_is_current and req.output_ids[row.index - 1] == result.token
        outcome = self.ledger.verdict(row, matches)
        counts = req.gate.counts
        if outcome is Outcome.STALE:  # an earlier row of this pass flipped
            counts.verified += 1
            return
        counts.verified += 1
        counts.repaired += row.index > 1
        counts.replayed += not req.gate.flags[row.index - 1]
        if outcome is Outcome.FLIP:
            counts.flips += 1
            self.histogram.add_flip(req.gate.margins[row.index - 1])
            req.gate.forget_rows(row.index)
            counts.rolled_back += emitted - row.index + 1
            self._roll_back(req, row.index, result)
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

    def _roll_back(self, req: Any, row: int, result: RowResult) -> None:
        key = req.gate.key
        scheduler = self.scheduler
        batches = (self.batch, scheduler.running_batch, scheduler.last_batch)
        ejected = not rollback.to_row(scheduler, batches, req, row, result)
        if key in self.held:
            del self.held[key]
            req.gate.counts.drain_s += now() - req.gate.hold.since
            req.gate.hold = None
        req.update_finish_state(1)
        if req.finished():
            self._end(req)
        elif ejected:
            self.rejoining.append(req)

    # -- ends

    def hold_end(self, req: Any) -> None:
        """AFTER the request's own finish check: withhold its end while rows are pending."""
        key = req.gate.key
        if key not in self.requests or isinstance(req.finished_reason, FINISH_ABORT):
            return
        self.ledger.stop(key)
        if self.ledger.pending(key):
            req.gate.hold = Hold(req.finished_reason, req.finished_len, now())
            req.finished_reason = req.finished_len = None
            self.held[key] = req
            self.queue.note(key, self.step)
            self.queue.drain(key)

    def _release(self, req: Any) -> None:
        """All rows of a held request are settled: give it its end back."""
        hold = req.gate.hold
        req.gate.hold = None
        req.gate.counts.drain_s += now() - hold.since
        req.finished_reason, req.finished_len = hold.reason, hold.length
        self._end(req)

    def _end(self, req: Any) -> None:
        release_kv_cache(req, self.scheduler.tree_cache)
        req.time_stats.set_completion_time()
        self.ended.append(req)

    def abort_held(self, matches: Any) -> None:
        """A client gave up: end held and rejoining requests, which SGLang does not know of."""
        gone = [req for req in (*self.held.values(), *self.rejoining) if matches(req)]
        for req in gone:
            self.held.pop(req.gate.key, None)
            self.rejoining = [other for other in self.rejoining if other is not req]
            req.gate.hold = None
            req.finished_reason = FINISH_ABORT()
            self.queue.forget(req.gate.key)
            self._end(req)
        self.stream([])

    def close(self, req: Any) -> None:
        """The request's last output is on its way (or it vanished): forget it."""
        gate = req.gate
        if self.requests.pop(gate.key, None) is None:
            return
        self.held.pop(gate.key, None)
        self.ledger.close(gate.key)
        self.queue.forget(gate.key)
        counts = gate.counts
        passes, counts.passes = counts.passes, 0  # passes are shared: the total counts its own
        self.totals.add(counts)
        counts.passes = passes

    def reap(self) -> None:
        """When SGLang is idle nothing is open; drop what an abort in its queues left behind."""
        for req in list(self.requests.values()):
            self.close(req)

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

    # -- batches

    def next_batch(self, original: Any, running: Any, last: Any) -> Any:
        """AROUND Scheduler.get_next_batch_to_run: batches hold only what may decode on."""
        if self.held:
            for batch in (running, last):
                if batch is not None and batch.reqs:
                    self._eject(batch)
            if self._memory_is_short(running):
                self.settle_all()
        if self.rejoining:
            reqs, self.rejoining = self.rejoining, []
            running = rollback.rejoin(self.scheduler, running, reqs)
        plan = original(self.scheduler, running_batch=running, last_batch=last)
        if plan.batch_to_run is None and (self.held or self.queue_waits()):
            self.settle_all()  # nobody will join them: verify now, decode on in the next turn
        return plan

    def settle_all(self) -> None:
        """Verify whatever waits, full micro-batch or not."""
        self.verify_due(idle=True)
        self.stream([req for req in self.requests.values() if req.stream])

    def queue_waits(self) -> bool:
        """Whether any row waits for a verify pass."""
        return any(self.ledger.pending(key) for key in self.requests)

    def _eject(self, batch: Any) -> None:
        stay = [i for i, req in enumerate(batch.reqs) if not self._is_held(req)]
        if len(stay) < len(batch.reqs):
            batch.filter_batch(keep_indices=stay)
            batch.batch_is_full = False

    def _is_held(self, req: Any) -> bool:
        return is_gated(req) and req.gate.key in self.held

    def _memory_is_short(self, running: Any) -> bool:
        """Whether SGLang would soon retract requests for columns that held ones could free."""
        tree = self.scheduler.tree_cache
        free = self.scheduler.token_to_kv_pool_allocator.available_size()
        return free + tree.evictable_size() < 2 * len(running.reqs)
