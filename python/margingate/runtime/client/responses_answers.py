"""OpenAI's `/v1/responses`: the gate's record in `metadata["gate"]`, and the switch.

Values of that field are texts in OpenAI's schema, and its clients read them as such; so the record
is JSON in a text. It is there once the answer is: not yet in the first events of a stream.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from margingate.runtime.client import switch
from margingate.runtime.request.record import INFO_KEY


async def create(original: Any, serving: Any, request: Any, raw_request: Any = None) -> Any:
    """AROUND OpenAIServingResponses.create_responses: `deterministic` in the body."""
    if sentence := await switch.note(raw_request):
        return serving.create_error_response(sentence)
    return await original(serving, request, raw_request)


async def answer(
    original: Any, serving: Any, request: Any, params: Any, contexts: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND OpenAIServingResponses.responses_full_generator.

    Mutates the request's `metadata`, which SGLang copies into its answers.
    """
    noting = _noting(contexts, request)
    return await original(serving, request, params, noting, *args, **kwargs)


async def stream(
    original: Any, serving: Any, request: Any, params: Any, contexts: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """AROUND its stream of events; mutates the same."""
    noting = _noting(contexts, request)
    async with aclosing(original(serving, request, params, noting, *args, **kwargs)) as events:
        async for event in events:
            yield event


async def _noting(contexts: Any, request: Any) -> AsyncIterator[Any]:
    async with aclosing(contexts):
        async for context in contexts:
            if record := context.last_output["meta_info"].get(INFO_KEY):
                request.metadata = {**(request.metadata or {}), INFO_KEY: json.dumps(record)}
            yield context
