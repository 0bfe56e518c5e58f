"""`/v1/responses`: SGLang's own answers and events, of made-up outputs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.runtime.client import responses_answers, switch

RECORD = {"gated": True, "fingerprint": "0123456789abcdef"}


async def contexts() -> AsyncIterator[Any]:
    """Of an answer in two outputs, the second of which has the record."""
    for i, text in enumerate(("今日", "今日は😀")):
        meta: dict[str, Any] = {"finish_reason": {"type": "stop"}, "gate": RECORD} if i else {}
        yield SimpleNamespace(last_output={"text": text, "meta_info": meta})


@pytest.mark.parametrize("metadata", [None, {"mine": "1"}])
def test_the_last_event_has_the_record_as_text_beside_what_was_sent(monkeypatch, metadata):
    from openai.types.responses import Response
    from sglang.srt.entrypoints.openai import serving_responses
    from sglang.srt.entrypoints.openai.protocol import RequestResponseMetadata, ResponsesRequest

    Serving = serving_responses.OpenAIServingResponses  # noqa: N806
    settings = SimpleNamespace(incremental_streaming_output=False)
    monkeypatch.setattr(serving_responses, "get_serving", lambda: settings)
    serving = Serving.__new__(Serving)
    serving.tool_call_parser = serving.reasoning_parser = serving._encoding_adapter = None
    serving.enable_prompt_tokens_details = serving.enable_response_store = False
    asked = ResponsesRequest(input="x", stream=True, store=False, metadata=metadata)

    async def events() -> list[Any]:
        stream = responses_answers.stream(
            Serving.responses_stream_generator_non_harmony,
            serving,
            asked,
            {},
            contexts(),
            "m",
            None,
            RequestResponseMetadata(request_id="resp_1"),
            require_reasoning=False,
        )
        return [json.loads(event.split("data: ")[1]) async for event in stream]

    first, *_, last = asyncio.run(events())
    assert first["response"]["metadata"] == (metadata or {})
    found = Response.model_validate(last["response"])
    assert found.output_text == "今日は😀"
    assert json.loads(found.metadata.pop("gate")) == RECORD
    assert found.metadata == (metadata or {})


def test_an_answer_has_the_record_too():
    asked = SimpleNamespace(metadata=None)

    async def original(_serving: Any, request: Any, _params: Any, outputs: Any) -> Any:
        texts = [context.last_output["text"] async for context in outputs]
        return texts, request.metadata

    found = asyncio.run(responses_answers.answer(original, None, asked, {}, contexts()))
    assert found == (["今日", "今日は😀"], {"gate": json.dumps(RECORD)})


@pytest.mark.parametrize(("value", "refused"), [(False, False), (None, False), ("no", True)])
def test_the_switch_in_the_body(value, refused):
    async def parsed() -> dict[str, Any]:
        return {"deterministic": value}

    async def original(_serving: Any, _request: Any, raw: Any) -> Any:
        obj = SimpleNamespace(sampling_params={"top_k": 1})
        switch.take_noted(obj, raw)
        return obj.sampling_params.get("deterministic")

    serving = SimpleNamespace(create_error_response=lambda sentence: ("400", sentence))
    raw = SimpleNamespace(state=SimpleNamespace(), json=parsed)
    said = asyncio.run(responses_answers.create(original, serving, None, raw))
    if refused:
        assert said == ("400", "custom_params.deterministic is 'no': give true or false.")
    else:
        assert said is value
