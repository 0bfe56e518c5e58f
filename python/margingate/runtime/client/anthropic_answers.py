"""Anthropic's messages: the gate's record in `metadata.gate`, and which stop sequence ended them.

Anthropic's schema has no `metadata` in answers; its clients keep what they do not know. In a stream
it is beside the delta of the `message_delta` event.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse

from margingate.runtime.client import switch
from margingate.runtime.client.openai_answers import records_of
from margingate.runtime.request.record import INFO_KEY

_END = "event: message_delta\n"


class _Message(AnthropicMessagesResponse):
    metadata: dict[str, Any] | None = None


async def handle(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND AnthropicServing.handle_messages: `deterministic` beside Anthropic's parameters."""
    if sentence := await switch.note(raw_request):
        kind = "invalid_request_error"
        return serving._error_response(status_code=400, error_type=kind, message=sentence)
    return await original(serving, request, raw_request)


def message(result: Any, _serving: Any, response: Any) -> Any:
    """AFTER AnthropicServing._convert_response."""
    fields = {name: getattr(result, name) for name in type(result).model_fields}
    fields |= _stop(response.choices[0].matched_stop)
    if found := (response.metadata or {}).get(INFO_KEY):
        fields["metadata"] = {INFO_KEY: found[0]}
    return _Message.model_construct(**fields)


def _stop(matched: Any) -> dict[str, str]:
    """Token ids, such as that of the end of a turn, are no stop sequences."""
    if isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    return {}


async def stream(
    original: Any, serving: Any, adapted_request: Any, *requests: Any
) -> AsyncIterator[str]:
    """AROUND AnthropicServing._generate_anthropic_stream."""
    frames = original(serving, adapted_request, *requests)
    async with aclosing(frames):
        async for frame in frames:
            yield _ended(frame, adapted_request) if frame.startswith(_END) else frame


def _ended(frame: str, adapted_request: Any) -> str:
    records, matched = records_of(adapted_request)
    body = json.loads(frame.removeprefix(_END).removeprefix("data: "))
    body["delta"] |= _stop(matched.get(0))
    if record := records.get(0):
        body["metadata"] = {INFO_KEY: record}
    return f"{_END}data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
