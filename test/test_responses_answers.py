"""`/v1/responses`: SGLang's own answers and events, of made-up outputs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.context import SimpleContext

from margingate.runtime.client import responses_answers, switch

RECORD = {"gated": True, "fingerprint": "0123456789abcdef"}


async def contexts(**finish_reason: str) -> AsyncIterator[Any]:
    """Of an answer in two outputs, the second of which has the record."""
    for i, text in enumerate(("今日", "今日は😀")):
        ended = {"finish_reason": finish_reason or {"type": "stop"}, "gate": RECORD}
        meta: dict[str, Any] = ended if i else {}
        context = SimpleContext()
        context.append_output({"text": text, "meta_info": meta})
        yield context


def serving_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own, as much of it as answers need."""
    from sglang.srt.entrypoints.openai import serving_responses

    settings = SimpleNamespace(incremental_streaming_output=False)
    monkeypatch.setattr(serving_responses, "get_serving", lambda: settings)
    serving = serving_responses.OpenAIServingResponses.__new__(
        serving_responses.OpenAIServingResponses
    )
    serving.tool_call_parser = serving.reasoning_parser = serving._encoding_adapter = None
    serving.enable_prompt_tokens_details = serving.enable_response_store = False
    serving.use_harmony = serving.is_disaggregated = False
    return serving


def events_of(monkeypatch: pytest.MonkeyPatch, metadata: Any, **finish_reason: str) -> list[Any]:
    """SGLang's own stream of events, with the gate's around it."""
    from sglang.srt.entrypoints.openai.protocol import RequestResponseMetadata, ResponsesRequest

    serving = serving_of(monkeypatch)
    asked = ResponsesRequest(input="x", stream=True, store=False, metadata=metadata)

    async def events() -> list[Any]:
        stream = responses_answers.stream(
            type(serving).responses_stream_generator_non_harmony,
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

    async def original(_serving: Any, request: Any, _params: Any, outputs: Any, _: Any) -> Any:
        texts = [context.last_output["text"] async for context in outputs]
        return texts, request.metadata

    answered = responses_answers.answer(original, None, asked, {}, contexts(), SimpleContext())
    assert asyncio.run(answered) == (["今日", "今日は😀"], {"gate": json.dumps(RECORD)})


class _Parser(SimpleNamespace):
    """Of harmony's messages, whose vocabulary would have to be fetched: one message a token."""

    def __init__(self) -> None:
        super().__init__(messages=[], current_content="")

    def process(self, token: int) -> None:
        from openai_harmony import Message, Role

        said = Message.from_role_and_content(Role.ASSISTANT, str(token))
        self.messages.append(said.with_channel("final"))


def of_gpt_oss(
    monkeypatch: pytest.MonkeyPatch, record: Any, metadata: Any, *, streamed: bool
) -> tuple[Any, ...]:
    """SGLang's own methods and contexts, of two outputs of which the second has the record."""
    from sglang.srt.entrypoints import context as contexts
    from sglang.srt.entrypoints.openai.protocol import RequestResponseMetadata, ResponsesRequest

    monkeypatch.setattr(contexts, "get_streamable_parser_for_assistant", _Parser)
    monkeypatch.setattr(contexts, "get_encoding", lambda: None)
    original = contexts.HarmonyContext._record_finish_reason

    def hooked(self: Any, meta_info: Any) -> None:
        responses_answers.harmony_output(original(self, meta_info), self, meta_info)

    monkeypatch.setattr(contexts.HarmonyContext, "_record_finish_reason", hooked)

    async def generate_request(_obj: Any, _request: Any) -> AsyncIterator[Any]:
        if streamed:
            yield {"output_ids": [5], "meta_info": {"completion_tokens": 1, "finish_reason": None}}
        ended = {"completion_tokens": 2, "finish_reason": {"type": "stop"}}
        yield {"output_ids": [5, 6], "meta_info": ended | ({"gate": record} if record else {})}

    serving = serving_of(monkeypatch)
    serving.use_harmony = True
    serving.tokenizer_manager = SimpleNamespace(generate_request=generate_request)
    kind = contexts.StreamingHarmonyContext if streamed else contexts.HarmonyContext
    asked = ResponsesRequest(input="x", stream=streamed, store=False, metadata=metadata)
    context = kind([], {})
    outputs = serving._generate_with_builtin_tools("resp_1", [1], None, {}, context)
    return serving, asked, {}, outputs, context, "m", None, RequestResponseMetadata(request_id="r")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("metadata", [None, {"mine": "1"}])
@pytest.mark.parametrize("record", [None, RECORD])
def test_an_answer_of_gpt_oss_has_the_record(monkeypatch, record, metadata, streamed):
    serving, *rest = of_gpt_oss(monkeypatch, record, metadata, streamed=streamed)
    Serving = type(serving)  # noqa: N806
    full = Serving.responses_full_generator

    async def answered(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await responses_answers.answer(full, self, *args, **kwargs)

    monkeypatch.setattr(Serving, "responses_full_generator", answered)

    async def response() -> dict[str, Any]:
        if not streamed:
            whole = await serving.responses_full_generator(*rest, require_reasoning=False)
            return whole.model_dump()
        stream = serving.responses_stream_generator(*rest, require_reasoning=False)
        events = [json.loads(event.split("data: ")[1]) async for event in stream]
        assert events[0]["response"]["metadata"] == (metadata or {})
        return events[-1]["response"]

    found = asyncio.run(response())
    assert found["status"] == "completed"
    assert [item["content"][0]["text"] for item in found["output"]] == ["5", "6"]
    told = {"gate": json.dumps(RECORD)} if record else {}
    assert found["metadata"] == {**(metadata or {}), **told}


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
