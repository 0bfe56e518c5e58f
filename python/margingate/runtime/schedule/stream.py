"""Nothing past the settled length leaves: settled tokens only, in order, each once."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.config import GateConfig
from margingate.runtime.compat.kv import routed_experts
from margingate.runtime.observe.fingerprint import Fingerprint
from margingate.runtime.request.open_requests import OpenRequests
from margingate.runtime.request.record import INFO_KEY, is_gated
from margingate.runtime.verify.retraction import Retractions


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

    def sendable(self, reqs: list[Any]) -> list[Any]:
        """`reqs` without those of which `accept` would send nothing now, whatever they have."""
        if not self._muted.on:
            return reqs
        return [req for req in reqs if req.finished_reason is not None or not is_gated(req)]

    def accept(self, original: Any, accumulator: Any, req: Any) -> None:
        """AROUND _GenerationStreamAccumulator.accept: send the settled part of a request."""
        if req.finished():
            self._send_last(original, accumulator, req)
        elif not is_gated(req):
            original(accumulator, req=req)
        elif req.stream and not self._muted.on:
            self._send_settled(original, accumulator, req)

    def accept_failed(self, original: Any, accumulator: Any, req: Any) -> None:
        """After a failure of `accept`: the end is told, and nothing else."""
        if req.finished():
            original(accumulator, req=req)
            self._requests.close(req)

    def _send_last(self, original: Any, accumulator: Any, req: Any) -> None:
        gate = getattr(req, "gate", None)
        if gate is not None:
            if gate.key in self._requests and isinstance(req.finished_reason, FINISH_ABORT):
                self._cut_to_settled(req)
            summary = gate.summary(self._config)
            seen = gate.generations(len(req.output_ids))
            summary["weight_generations"] = seen
            if gate.gated:
                routed_experts.fit(req)
                summary |= self._fingerprint.of(seen)
                if _is_scored(req):
                    summary["scores"] = self._scores
            req.customized_info = {INFO_KEY: _WithLastToken([summary])}
        original(accumulator, req=req)
        if gate is not None:
            self._requests.close(req)

    def _cut_to_settled(self, req: Any) -> None:
        """An aborted request ends with what was settled."""
        if req.gate.kept is not None:
            self._retractions.give_back(req)
        settled = 0 if req.gate.failed else self._requests.ledger.settled_length(req.gate.key)
        req.finished_len = min(max(settled, req.send_token_offset), len(req.output_ids))

    def _send_settled(self, original: Any, accumulator: Any, req: Any) -> None:
        if req.gate.kept is not None:  # retracted: what it had is set aside until it is prefilled
            return
        ledger, key = self._requests.ledger, req.gate.key
        settled, sent = ledger.settled_length(key), req.send_token_offset
        interval = req.sampling_params.stream_interval or accumulator.default_stream_interval
        if settled <= sent or (sent > 0 and settled - sent < interval):
            return  # SGLang would say the same of a copy
        tokens = req.output_ids
        if settled < len(tokens):  # a copy of the whole output: not where all of it is settled
            req.output_ids = tokens[:settled]
        try:
            original(accumulator, req=req)
        finally:
            req.output_ids = tokens
        ledger.mark_sent(key, req.send_token_offset)


def _is_scored(req: Any) -> bool:
    """Whether the client asked for log-probs of the prompt's tokens."""
    return bool(req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids))
