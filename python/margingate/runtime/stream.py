"""Nothing past the frontier leaves: settled tokens only, in order, each once."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from margingate.runtime import ends, guard, retraction, state
from margingate.runtime.radix import is_gated

INFO_KEY = "gate"


class _WithLastToken(list[Any]):
    """SGLang slices customized info by output token; this goes out whole with the last slice."""

    def __getitem__(self, _index: Any) -> Any:
        return list(self)


def accept(original: Any, accumulator: Any, *, req: Any) -> None:
    """AROUND _GenerationStreamAccumulator.accept: send the settled part of a request."""
    controller = state.controller()
    if req.finished():
        _send_last(original, accumulator, req)
    elif not is_gated(req):
        original(accumulator, req=req)
    elif req.stream and not controller.processing:
        _send_settled(original, accumulator, req)


def accept_failed(original: Any, accumulator: Any, *, req: Any) -> None:
    """After a failure of `accept`: the end is told, and nothing else."""
    if req.finished():
        original(accumulator, req=req)
        ends.forget(state.controller(), req)


def _send_last(original: Any, accumulator: Any, req: Any) -> None:
    controller = state.controller()
    gate = getattr(req, "gate", None)
    if gate is not None:
        if gate.key in controller.requests and isinstance(req.finished_reason, FINISH_ABORT):
            _cut_to_frontier(req)
        summary = gate.summary(controller.config)
        if gate.gated:
            summary |= controller.fingerprint.of(gate.generation)
        req.customized_info = {INFO_KEY: _WithLastToken([summary])}
    original(accumulator, req=req)
    if gate is not None:
        ends.forget(controller, req)


def _cut_to_frontier(req: Any) -> None:
    """An aborted request ends with what was settled."""
    if req.gate.kept is not None:
        retraction.give_back(req)
    frontier = 0 if req.gate.failed else state.controller().ledger.frontier(req.gate.key)
    req.finished_len = min(max(frontier, req.send_token_offset), len(req.output_ids))


def _send_settled(original: Any, accumulator: Any, req: Any) -> None:
    if req.gate.kept is not None:  # retracted: what it had is set aside until it is prefilled
        return
    ledger, key = state.controller().ledger, req.gate.key
    frontier, sent = ledger.frontier(key), req.send_token_offset
    params = req.sampling_params
    interval = params.stream_interval or accumulator.default_stream_interval
    if frontier <= sent or (sent > 0 and frontier - sent < interval):
        return
    tokens, own_interval = req.output_ids, params.stream_interval
    # SGLang sends where the length is a multiple of the interval; a frontier may jump past it.
    params.stream_interval = 1
    if frontier < len(tokens):  # a copy of the whole output: not where all of it is settled
        req.output_ids = tokens[:frontier]
    try:
        original(accumulator, req=req)
    finally:
        req.output_ids, params.stream_interval = tokens, own_interval
    ledger.mark_sent(key, req.send_token_offset)


class _Merged(dict[str, Any]):
    """What the tokenizer process accumulates per request: it extends lists, this is one record."""

    def extend(self, entries: list[Any]) -> None:
        for entry in entries:
            self.update(entry or {})

    def __getitem__(self, key: Any) -> Any:
        return self if isinstance(key, slice) else super().__getitem__(key)


async def handle_batch_output(original: Any, manager: Any, received: Any) -> None:
    """AROUND TokenizerManager._handle_batch_output: `meta_info["gate"]` is a record, not a list."""
    try:
        _merge(manager, received)
    except Exception as error:  # raised here it would end the loop that serves all clients
        guard.note("TokenizerManager._handle_batch_output", error)
    await original(manager, received)


def _merge(manager: Any, received: Any) -> None:
    if getattr(received, "customized_info", None) is not None:
        for rid in received.rids:
            request_state = manager.rid_to_state.get(rid)
            if request_state is not None:
                request_state.customized_info_accumulated.setdefault(INFO_KEY, _Merged())
