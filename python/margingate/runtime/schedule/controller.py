"""The gate of one scheduler: margin, policy, ledger, queue, verifier, repair, output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from margingate.config import GateConfig
from margingate.runtime.compat.kv import window_pool
from margingate.runtime.compat.model import embeddings
from margingate.runtime.observe import fingerprint, integrity
from margingate.runtime.observe.audit import Auditor
from margingate.runtime.observe.tally import Tally
from margingate.runtime.probe.startup_checks import StartupChecks
from margingate.runtime.request import aborts, guard, lifecycle
from margingate.runtime.request.column_holders import ColumnHolders
from margingate.runtime.request.in_flight import InFlight
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import gated_of
from margingate.runtime.sampling import constraints, penalties, router_margins
from margingate.runtime.sampling.sampler import Sampling
from margingate.runtime.schedule.prefill_admission import Admission
from margingate.runtime.schedule.recording import Recorder
from margingate.runtime.schedule.stream import SettledStream
from margingate.runtime.schedule.weight_changes import WeightChanges
from margingate.runtime.verify import rollback
from margingate.runtime.verify.merged_passes import MergedPasses
from margingate.runtime.verify.passes import Passes
from margingate.runtime.verify.retraction import Retractions
from margingate.runtime.verify.simulation import Simulator

_NOBODY = nullcontext()


class GateController:
    """Leads each result through the stages; what these know, they own.

    All methods run on the scheduler's thread.
    """

    def __init__(self, scheduler: Any, config: GateConfig, checks: StartupChecks) -> None:
        assert config.prefill_chunk is not None
        self.scheduler, self.config, self.checks = scheduler, config, checks
        self.observes_only, simulator = config.policy == "observe", Simulator(config)
        self.requests = requests = OpenRequests(config)
        self.in_flight = in_flight = InFlight(scheduler)
        model, pool = checks.verifier.runner.model, checks.verifier.runner.req_to_token_pool
        self.takes = embeddings.taken_by(type(model), checks.verifier.runner.dtype)
        self.penalties = _penalties(pool, scheduler.model_config.vocab_size)
        self.sampling = Sampling(
            self.penalties, observes=self.observes_only, routers=router_margins.of(model)
        )
        self.passes = Passes(
            scheduler,
            requests,
            checks.verifier,
            simulator=simulator,
            in_flight=in_flight,
            penalties=self.penalties,
        )
        unseen = router_margins.unseen(model)
        self.recorder = Recorder(
            scheduler, config, requests, in_flight, simulator, decode=checks.decode, unseen=unseen
        )
        merges = checks.decode is None and not self.observes_only
        self.merged = MergedPasses(scheduler, requests, self.passes, checks.verifier, serves=merges)
        holders = ColumnHolders(scheduler, requests, in_flight)
        self.retractions = Retractions(
            scheduler, requests, self.passes, self.merged, penalties=self.penalties, holders=holders
        )
        self.admission = Admission(checks.prefill, config.prefill_chunk)
        self.fingerprint = fingerprint.make(scheduler, config, checks.verifier, checks.prefill)
        self.weights = WeightChanges(
            scheduler, requests, holders, self.fingerprint, self.verify_everything
        )
        scores, retractions = checks.scores(config), self.retractions
        self.output = SettledStream(config, requests, retractions, self.fingerprint, scores)
        self.auditor = Auditor(scheduler, config, checks, requests, self.fingerprint)
        self.integrity = integrity.Reports(scheduler, requests, in_flight)
        self.tally = Tally(exact=config.guarantee == "exact")
        self._windows = window_pool.is_split(checks.verifier.runner.token_to_kv_pool)

    # -- a result's way to the clients

    def process(self, original: Any, batch: Any, result: Any) -> None:
        """AROUND Scheduler.process_batch_result: from margins to tokens that are sent.

        With overlap a step is in flight already, and what must not meet one (a pass, a flip, the
        end of a wait) is done before the next batch, if there is anything to do: `verify`.
        """
        if self.in_flight.is_processed(result):
            return
        try:
            self._process(original, batch, result)
        except Exception:
            self.merged.put_back(result)
            raise

    def _process(self, original: Any, batch: Any, result: Any) -> None:
        gated = gated_of(batch.reqs)
        self.in_flight.arrived(batch, result)
        canonical, unsettled = self.recorder.record(batch, result)
        told = _with_whole_prompts(batch, gated)  # SGLang counts their chunks as it appends
        self._append(original, batch, result, gated, unsettled)
        self.requests.stepped(batch, len(gated), canonical)
        self.merged.process_results(result)
        if not self.in_flight.overlaps and (gated or self._is_open()):
            self.verify(batch, gated)
        self.send(told)
        if self.config.debug:
            self.check_integrity()

    def before_next_batch(self, last: Any) -> None:
        """The rest of `process` with overlap, where anything waits for it. `last`: the last batch
        whose result came, or is on its way.
        """
        self.in_flight.bring_in_prefill()
        if self._is_quiet():
            self.merged.note_due(None)
            return
        if self.in_flight.overlaps:
            self._verify_what_waits(last)
        if self.requests.failed():
            self.in_flight.bring_in()
            lifecycle.end_failed(self.requests, self.scheduler.tree_cache)
            self.send([])

    def _is_quiet(self) -> bool:
        """Whether nothing at all waits, as after most steps; not known at so little cost where rows
        that nothing flagged may be (`_full_tails`).
        """
        requests = self.requests
        waits = self._is_open() or requests.any_retracted() or requests.queue.waits()
        unflagged = self.config.guarantee == "exact" or (self._windows and self.checks.drift)
        return not waits and not unflagged

    def _is_open(self) -> bool:
        """Whether something is begun that needs nothing in flight to be ended, due or not."""
        requests = self.requests
        return bool(requests.outside() or requests.prefilled_again or self.merged.waiting)

    def _verify_what_waits(self, last: Any) -> None:
        due = self.requests.due(idle=False)
        self.merged.note_due(due)
        if self._waits(due) or (self.requests.any_retracted() and _any_kept(last)):
            self.in_flight.bring_in()
            reqs = list(self.requests)
            self.verify(last, reqs)
            self.send(reqs)

    def verify(self, batch: Any, reqs: list[Any]) -> None:
        """With nothing in flight: replay what `batch` prefilled again, verify, repair, release."""
        self.retractions.restore(batch)
        for req in self._full_tails(reqs):
            self.requests.want_tail(req)
        self.verify_due(idle=False)

    def send(self, reqs: list[Any]) -> None:
        """Send what is settled of `reqs`, and the ends that came up since the last call."""
        if ended := self.requests.take_ended():
            known = {id(req) for req in reqs}
            reqs = reqs + [req for req in ended if id(req) not in known]
        reqs = [req for req in reqs if (req.stream or req.finished()) and not req.finished_output]
        # A prompt that is prefilled in chunks has no row yet, and nothing to send.
        if reqs := self.requests.opened(reqs):
            logprobs = any(req.return_logprob for req in reqs)
            self.scheduler.output_streamer.stream_output(reqs, logprobs)

    # -- its stages

    def _append(
        self, original: Any, batch: Any, result: Any, gated: list[Any], unsettled: list[Any]
    ) -> None:
        """SGLang appends the tokens and looks for ends, which are withheld where rows are pending.

        With overlap a withheld request may have one row more, whose token nobody wants.
        """
        requests = self.requests
        behind = list(filter(requests.is_held, gated)) if requests.held else []
        withheld = lifecycle.ends_withheld(requests, unsettled) if unsettled else _NOBODY
        passed_over = lifecycle.passed_over(behind) if behind else _NOBODY
        with self.output.muted(), withheld, passed_over:
            original(self.scheduler, batch, result)
        if batch.forward_mode.is_extend():
            constraints.abort_failed(gated)
        for req in behind:
            with guard.request(req, "a row behind the end"):
                rollback.drop_last_column(self.scheduler, req)

    def verify_due(self, idle: bool) -> None:
        """With nothing in flight: enter what is known, run every pass that is due and is not
        merged, then end the requests that waited for them.
        """
        self.merged.enter()
        while due := self._next_due(idle):
            self.passes.run(self.requests.next_batch(), due)
        for req in self.requests.to_release():
            with guard.request(req, "the end of a request"):
                lifecycle.release(self.requests, self.scheduler.tree_cache, req)

    def _next_due(self, idle: bool) -> str | None:
        """Why a pass of its own is due, if one is: none that a decode step will carry."""
        due = self.requests.due(idle=idle)
        self.merged.note_due(due)
        return due if idle or not self.merged.will_merge() else None

    def _waits(self, due: str | None) -> bool:
        """Whether anything is to be done that needs nothing in flight; `due` as was noted."""
        return (
            self._is_open()
            or (due is not None and not self.merged.will_merge())
            or any(self._full_tails(self.requests))
        )

    def _full_tails(self, reqs: Iterable[Any]) -> Iterator[Any]:
        """Those with so many rows to be replayed that a micro-batch is full: streams of exact, and
        all where the windows of such rows fill a pool of their own.
        """
        if self.config.guarantee != "exact" and not self._windows:
            return
        requests, ledger = self.requests, self.requests.ledger
        for req in reqs:
            key = req.gate.key
            looked_at = key in requests and (req.stream or self._windows)
            if not looked_at or req.gate.kept is not None:
                continue
            if not ledger.stopped(key):
                waiting = ledger.emitted(key) - ledger.canonical(key)
                if waiting >= self.checks.verifier.rows:
                    yield req

    # -- between steps

    def verify_everything(self) -> None:
        """Verify whatever waits, full micro-batch or not."""
        self.in_flight.bring_in()
        self.verify_due(idle=True)
        self.send([req for req in self.requests if req.stream])

    def idle(self) -> None:
        """SGLang has nothing to do: drop what a vanished request left behind; audit."""
        self.requests.close_all()
        if self.auditor.idle() and self.config.debug:
            self.check_integrity()

    def abort(self, original: Any, received: Any) -> None:
        """AROUND Scheduler.abort_request."""
        aborts.abort_request(self.requests, original, self.scheduler, received)
        self.send([])

    def check_integrity(self) -> None:
        """Raises AssertionError with a sentence on the first thing that does not agree."""
        integrity.check(self.scheduler, self.requests, self.in_flight)


def _penalties(pool: Any, vocabulary: int) -> penalties.Table:
    """Of as many requests as SGLang's page table has rows, on its device."""
    pages = pool.req_to_token
    return penalties.Table(len(pages), vocabulary, pages.device)


def _with_whole_prompts(batch: Any, reqs: list[Any]) -> list[Any]:
    """Without a prompt whose chunk is not the last: if it is aborted, SGLang has said so."""
    if not batch.forward_mode.is_extend():
        return reqs
    return [req for req in reqs if req.inflight_middle_chunks <= 0]


def _any_kept(batch: Any) -> bool:
    """Whether a request in `batch` was retracted and waits for its output to be given back."""
    return batch is not None and any(req.gate.kept is not None for req in gated_of(batch.reqs))
