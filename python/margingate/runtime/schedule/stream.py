"""Nothing past the settled length leaves: settled tokens only, in order, each once."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.config import GateConfig
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.observe.fingerprint import Fingerprint
from margingate.runtime.request import guard
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import INFO_KEY
from margingate.runtime.request.sampling_params import is_score
from margingate.runtime.verify.retraction import Retractions

_PLACE = "the output of a request"  # where something of ours raised


class _WithLastToken(list[Any]):
    """SGLang slices customized info by output token; this goes out whole with the last slice."""

    def __getitem__(self, _index: Any) -> Any:
        return list(self)


class _Muted:
    """A context in which `on` is true. Each step enters it."""

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_raised: object) -> None:
        self.on = False


class SettledStream:
    """What SGLang's output streamer takes of a request."""

    def __init__(
        self,
        config: GateConfig,
        requests: OpenRequests,
        retractions: Retractions,
        fingerprint: Fingerprint,
        scores: str = "",
    ) -> None:
        """`scores`: what the log-probs of a prompt's tokens are, for the record."""
        self._config, self._requests = config, requests
        self._retractions, self._fingerprint = retractions, fingerprint
        self._scores = scores
        self._muted = _Muted()

    def muted(self) -> _Muted:
        """SGLang sends as it processes results, when nothing is known of the new tokens yet: only
        ends are taken meanwhile, and requests that are not gated.
        """
        return self._muted

    def send(
        self, original: Any, streamer: Any, reqs: list[Any], return_logprob: bool, skip_req: Any
    ) -> None:
        """AROUND SchedulerOutputStreamer.stream_output: SGLang is given the requests that may send
        something, and in their outputs nothing that is not settled. It is not asked for nobody.

        What raises for one of them ends that one.
        """
        ended, ungated, streams = self._sorted(reqs, skip_req)
        if reqs and not (ended or ungated or streams):
            return  # as while most results are processed
        for req in ended:
            with guard.request(req, _PLACE):
                self._complete(req)
        settled, whole = self._settled(streams)
        try:
            if (shown := ended + ungated + settled) or not reqs:
                original(streamer, shown, return_logprob, skip_req)
        finally:
            for req, tokens in whole:
                req.output_ids = tokens
        self._note_sent(settled)
        self._close(ended)

    def send_failed(
        self, original: Any, streamer: Any, reqs: list[Any], return_logprob: bool, skip_req: Any
    ) -> None:
        """After a failure of `send`: ends are told, and what is not gated; nothing else."""
        ended, ungated, _ = self._sorted(reqs, skip_req)
        original(streamer, ended + ungated, return_logprob, skip_req)
        self._close(ended)

    def _sorted(self, reqs: list[Any], skip_req: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """Those that ended and were not told, those that are not gated, and those that stream."""
        ended, ungated, streams, muted = [], [], [], self._muted.on
        for req in reqs:  # each of each step
            if req.finished_reason is not None:
                if req is not skip_req and not req.finished_output:
                    ended.append(req)
            elif (gate := getattr(req, "gate", None)) is None or not gate.gated:
                ungated.append(req)
            elif req.stream and not muted and gate.kept is None:  # or retracted: it is set aside
                streams.append(req)
        return ended, ungated, streams

    def _settled(self, streams: list[Any]) -> tuple[list[Any], list[tuple[Any, Any]]]:
        """Those with settled tokens that were not sent, and the whole outputs of those whose last
        tokens are not settled: a copy without them is in its place, which takes time. One whose end
        is withheld waits for it: what it stopped at is no text, and SGLang knows that by the end.
        """
        found, whole = [], []
        settled_length = self._requests.ledger.settled_length
        for req in streams:
            try:  # no context manager: this runs for each token
                tokens, settled = req.output_ids, settled_length(req.gate.key)
                if settled <= req.send_token_offset or req.gate.hold is not None:
                    continue
                if settled < len(tokens):
                    req.output_ids = tokens[:settled]
                    whole.append((req, tokens))
                found.append(req)
            except Exception as error:
                guard.failed(req, _PLACE, error)
        return found, whole

    def _note_sent(self, reqs: list[Any]) -> None:
        mark_sent = self._requests.ledger.mark_sent
        for req in reqs:
            try:
                mark_sent(req.gate.key, req.send_token_offset)
            except Exception as error:
                guard.failed(req, _PLACE, error)

    def _close(self, ended: list[Any]) -> None:
        for req in ended:
            if getattr(req, "gate", None) is not None:
                with guard.request(req, _PLACE):
                    self._requests.close(req)

    def _complete(self, req: Any) -> None:
        """The record goes with the last output, and an aborted one has what was settled."""
        gate = getattr(req, "gate", None)
        if gate is None:
            return
        if gate.gated and isinstance(req.finished_reason, FINISH_ABORT):
            self._cut_to_settled(req)
        elif gate.key in self._requests and not self._requests.is_settled(req):
            raise RuntimeError("SGLang found its end where rows of it are to be verified")
        summary = gate.summary(self._config)
        seen = gate.generations(len(req.output_ids))
        summary["weight_generations"] = seen
        if gate.gated:
            routed_experts.fit(req)
            summary |= self._fingerprint.of(seen)
            if req.return_logprob and is_score(req.sampling_params):
                _drop_chosen(req)
            if _is_scored(req):
                summary["scores"] = self._scores
        req.customized_info = {INFO_KEY: _WithLastToken([summary])}

    def _cut_to_settled(self, req: Any) -> None:
        """An aborted request ends with what was settled."""
        if req.gate.kept is not None:
            self._retractions.give_back(req)
        known = req.gate.key in self._requests and not req.gate.failed
        settled = self._requests.ledger.settled_length(req.gate.key) if known else 0
        req.finished_len = min(max(settled, req.send_token_offset), len(req.output_ids))


def _drop_chosen(req: Any) -> None:
    """Of a request for which no token is generated: the log-prob of one that nobody gets. SGLang
    has none of it alone.
    """
    req.logprob.output_token_logprobs_val, req.logprob.output_token_logprobs_idx = [], []


def _is_scored(req: Any) -> bool:
    """Whether the client asked for log-probs of the prompt's tokens."""
    return bool(req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids))
