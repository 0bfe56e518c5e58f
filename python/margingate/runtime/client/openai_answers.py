"""The gate's record in OpenAI's answers: `metadata.gate`, and the standard `system_fingerprint`.

`metadata` is SGLang's own extra field; OpenAI's clients keep what they do not know. The record is
a list, one entry a choice of this answer or chunk; `system_fingerprint` is the gate's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse, CompletionResponse

from margingate.runtime.client import switch
from margingate.runtime.client.parameter_types import list_error
from margingate.runtime.request.record import INFO_KEY

# By index of the choice, on requests whose stream wants them.
_RECORDS = "_margingate_records"
_MATCHED = "_margingate_matched"  # the stop sequence or token that ended it


class _ChatCompletion(ChatCompletionResponse):
    system_fingerprint: str | None = None


class _Completion(CompletionResponse):
    system_fingerprint: str | None = None


def chat(result: Any, _serving: Any, _request: Any, ret: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER OpenAIServingChat._build_chat_response."""
    return _with_records(result, ChatCompletionResponse, _ChatCompletion, ret)


def completion(
    result: Any, _serving: Any, _request: Any, ret: Any, *_args: Any, **_kwargs: Any
) -> Any:
    """AFTER OpenAIServingCompletion._build_completion_response."""
    return _with_records(result, CompletionResponse, _Completion, ret)


def _with_records(result: Any, known: Any, ours: Any, outputs: Sequence[dict[str, Any]]) -> Any:
    """None, which leaves the result, where it is an error or has no records."""
    found = [output["meta_info"].get(INFO_KEY) for output in outputs]
    if not isinstance(result, known) or not all(found):
        return None
    fields = {name: getattr(result, name) for name in known.model_fields}
    fields["metadata"] = {**(result.metadata or {}), INFO_KEY: [dict(record) for record in found]}
    return ours.model_construct(**fields, system_fingerprint=_shared_fingerprint(found))


def _shared_fingerprint(records: Sequence[dict[str, Any]]) -> str | None:
    """The fingerprint of all records; None where they differ or one has none."""
    found = {record.get("fingerprint") for record in records}
    return found.pop() if len(found) == 1 else None


def generate_request(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND TokenizerManager.generate_request: note the records for a stream that wants them.

    Raises ValueError, which is HTTP 400, for lists that are not one for each prompt.
    """
    if sentence := list_error(obj):
        raise ValueError(sentence)
    switch.take_noted(obj, request)
    outputs = original(manager, obj, request)
    records = getattr(obj, _RECORDS, None)
    return outputs if records is None else _noting(outputs, records, getattr(obj, _MATCHED))


async def _noting(
    outputs: Any, records: dict[int, Any], matched: dict[int, Any]
) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            meta, index = output["meta_info"], output.get("index", 0)
            if record := meta.get(INFO_KEY):
                records[index] = dict(record)
            if reason := meta.get("finish_reason"):
                matched[index] = reason.get("matched")
            yield output


def records_of(adapted_request: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    """By index of the choice: the records so far, and the stop sequences or tokens that matched."""
    return getattr(adapted_request, _RECORDS, {}), getattr(adapted_request, _MATCHED, {})


async def stream(
    original: Any, serving: Any, adapted_request: Any, request: Any, raw_request: Any
) -> AsyncIterator[str]:
    """AROUND the streams of chat and completions: the record is in a choice's last chunk."""
    records: dict[int, Any] = {}
    setattr(adapted_request, _RECORDS, records)
    setattr(adapted_request, _MATCHED, {})
    chunks = original(serving, adapted_request, request, raw_request)
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _last_chunk(chunk, records) if records else chunk


def _last_chunk(chunk: str, records: dict[int, Any]) -> str:
    """The chunk, with the records of those of its choices that finish in it."""
    data = chunk.removeprefix("data: ")
    if not data.startswith("{"):
        return chunk
    body = json.loads(data)
    ended = [choice["index"] for choice in body.get("choices", ()) if choice.get("finish_reason")]
    found = [records[index] for index in ended if index in records]
    if not found:
        return chunk
    body["metadata"] = {INFO_KEY: found}
    body["system_fingerprint"] = _shared_fingerprint(found)
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
