"""OpenAI's `/v1/responses`: the gate's record in `metadata["gate"]`, and the switch.

Values of that field are texts in OpenAI's schema, and its clients read them as such; so the record
is JSON in a text. It is there once the answer is: not yet in the first events of a stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.context import SimpleContext

from margingate.runtime.client import switch
from margingate.runtime.request.record import INFO_KEY

_RECORD = "_margingate_record"  # on contexts of gpt-oss


async def create(original: Any, serving: Any, request: Any, raw_request: Any = None) -> Any:
    """AROUND OpenAIServingResponses.create_responses: `deterministic` in the body."""
    if sentence := await switch.note(raw_request):
        return serving.create_error_response(sentence)
    return await original(serving, request, raw_request)


async def answer(  # noqa: PLR0917  SGLang's own parameters
    original: Any,
    serving: Any,
    request: Any,
    params: Any,
    contexts: Any,
    context: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND OpenAIServingResponses.responses_full_generator.

    Mutates the request's `metadata`, which SGLang copies into its answers. At the end of a stream
    of gpt-oss there are no contexts left, and the record is on the one that they were.
    """
    _note(context, request)
    noting = _noting(contexts, request)
    return await original(serving, request, params, noting, context, *args, **kwargs)


async def stream(
    original: Any, serving: Any, request: Any, params: Any, contexts: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """AROUND its stream of events for other models; mutates the same."""
    noting = _noting(contexts, request)
    async with aclosing(original(serving, request, params, noting, *args, **kwargs)) as events:
        async for event in events:
            yield event


def harmony_output(_result: Any, context: Any, meta_info: dict[str, Any]) -> None:
    """AFTER HarmonyContext._record_finish_reason, once an output: gpt-oss's contexts keep none.

    Of several turns with SGLang's tools, the last one's record remains, as does its reason.
    """
    if record := meta_info.get(INFO_KEY):
        setattr(context, _RECORD, record)


async def _noting(contexts: Any, request: Any) -> AsyncIterator[Any]:
    async with aclosing(contexts):
        async for context in contexts:
            _note(context, request)
            yield context


def _note(context: Any, request: Any) -> None:
    """Changes nothing as long as there is no record."""
    if record := _record_of(context):
        request.metadata = {**(request.metadata or {}), INFO_KEY: json.dumps(record)}


def _record_of(context: Any) -> Any:
    if isinstance(context, SimpleContext):
        return ((context.last_output or {}).get("meta_info") or {}).get(INFO_KEY)
    return getattr(context, _RECORD, None)
