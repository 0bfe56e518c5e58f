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


async def contexts(**finish_reason: str) -> AsyncIterator[Any]:
    """Of an answer in two outputs, the second of which has the record."""
    for i, text in enumerate(("今日", "今日は😀")):
        ended = {"finish_reason": finish_reason or {"type": "stop"}, "gate": RECORD}
        meta: dict[str, Any] = ended if i else {}
        yield SimpleNamespace(last_output={"text": text, "meta_info": meta})


def events_of(monkeypatch: pytest.MonkeyPatch, metadata: Any, **finish_reason: str) -> list[Any]:
    """SGLang's own stream of events, with the gate's around it."""
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
            contexts(**finish_reason),
            "m",
            None,
            RequestResponseMetadata(request_id="resp_1"),
            require_reasoning=False,
        )
        return [json.loads(event.split("data: ")[1]) async for event in stream]

    return asyncio.run(events())


@pytest.mark.parametrize("metadata", [None, {"mine": "1"}])
def test_the_last_event_has_the_record_as_text_beside_what_was_sent(monkeypatch, metadata):
    from openai.types.responses import Response

    first, *_, last = events_of(monkeypatch, metadata)
    assert first["response"]["metadata"] == (metadata or {})
    found = Response.model_validate(last["response"])
    assert found.output_text == "今日は😀"
    assert json.loads(found.metadata.pop("gate")) == RECORD
    assert found.metadata == (metadata or {})


def test_a_cut_answer_says_so_and_has_the_record(monkeypatch):
    *_, last = events_of(monkeypatch, None, type="length")
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert json.loads(last["response"]["metadata"]["gate"]) == RECORD


def test_what_is_refused_once_a_stream_has_begun_has_its_sentence(monkeypatch):
    *_, last = events_of(monkeypatch, None, type="abort", message="the gate cannot: drop it.")
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "the gate cannot: drop it."


def test_an_answer_has_two_tokens_fewer_than_were_asked_for():
    """SGLang's; docs/limits.md says so, and would be wrong where this fails."""
    from sglang.srt.entrypoints.openai.protocol import ResponsesRequest

    asked = ResponsesRequest(input="x", max_output_tokens=40)
    assert asked.to_sampling_params(500)["max_new_tokens"] == 38


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
