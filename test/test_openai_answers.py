"""The switch as clients write it, and the record in OpenAI's answers; without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

GATED = {"gated": True, "flips": 0, "fingerprint": "0123456789abcdef"}
OTHER = {"gated": False, "because": "deterministic is false"}


@pytest.fixture(scope="module")
def answers() -> Any:
    from margingate.runtime.client import openai_answers

    return openai_answers


@pytest.fixture(scope="module")
def switch() -> Any:
    from margingate.runtime.client import switch

    return switch


# The switch


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"deterministic": False}, {"custom_params": {"deterministic": False}}),
        ({"deterministic": None, "top_k": 1}, {"top_k": 1}),
        (
            {"deterministic": True, "custom_params": {"deterministic": False, "a": 1}},
            {"custom_params": {"deterministic": True, "a": 1}},
        ),
    ],
)
def test_deterministic_is_a_sampling_parameter(switch, given, taken):
    kept = json.loads(json.dumps(given))
    obj = SimpleNamespace(sampling_params=given)
    switch.tokenized_object(None, obj, "text", [1])
    assert obj.sampling_params == taken
    assert given == kept, "the caller's own"


@pytest.mark.parametrize("value", ["no", 0, {"a": {"b": 1}}])
def test_a_malformed_switch_is_refused(switch, value):
    obj = SimpleNamespace(sampling_params={"deterministic": value})
    with pytest.raises(
        ValueError, match=r"^custom_params.deterministic is .*: give true or false.$"
    ):
        switch.tokenized_object(None, obj, "text", [1])


@pytest.mark.parametrize(
    ("body", "custom"),
    [
        ({}, {"a": 1}),
        ({"deterministic": False}, {"a": 1, "deterministic": False}),
        ({"deterministic": None}, {"a": 1}),
        ({"deterministic": "no"}, "refused"),
    ],
)
def test_deterministic_beside_the_parameters_of_openai(switch, body, custom):
    async def parsed() -> dict[str, Any]:
        return body

    async def original(_serving: Any, request: Any, _raw: Any) -> Any:
        return request.custom_params

    serving = SimpleNamespace(create_error_response=lambda message: "refused")
    request = SimpleNamespace(custom_params={"a": 1})
    raw = SimpleNamespace(json=parsed)
    assert asyncio.run(switch.openai_request(original, serving, request, raw)) == custom


@pytest.mark.parametrize(
    ("default", "kind", "value", "answer"),
    [
        ("on", "application/json", True, "answered"),
        ("on", "application/json", None, "answered"),
        ("on", "application/json", False, "deterministic is false, but requests of this route are"),
        ("off", "application/json; charset=utf-8", True, "deterministic is true, but requests of"),
        ("off", "application/json", False, "answered"),
        ("on", "Application/JSON", False, "deterministic is false, but requests of this route are"),
        ("on", "application/json", "no", "custom_params.deterministic is 'no': give true or false"),
        ("on", "multipart/form-data", False, "answered"),
        (None, "application/json", False, "answered"),
    ],
)
def test_routes_without_sampling_parameters_are_as_the_default_says(
    switch, monkeypatch, default, kind, value, answer
):
    """/v1/score had `deterministic` and dropped it."""

    async def parsed() -> dict[str, Any]:
        assert "json" in kind.lower(), "a form is no JSON"
        return {"query": "a", "deterministic": value}

    async def original(*_: Any) -> str:
        return "answered"

    config = None if default is None else SimpleNamespace(default=default)
    monkeypatch.setattr(switch, "gate_config", lambda _: config)
    manager = SimpleNamespace(server_args=None)
    serving = SimpleNamespace(create_error_response=str, tokenizer_manager=manager)
    raw = SimpleNamespace(json=parsed, headers={"content-type": kind})
    found = asyncio.run(switch.openai_request(original, serving, SimpleNamespace(), raw))
    assert found.startswith(answer)


def test_a_backend_of_the_frontend_language_sends_the_switch():
    from sglang.lang.ir import SglSamplingParams

    from margingate.frontend import Endpoint

    backend = Endpoint.__new__(Endpoint)
    backend.deterministic = False
    params = SglSamplingParams(temperature=0)
    switched = backend._switched(params)
    assert switched.to_srt_kwargs() == {**params.to_srt_kwargs(), "deterministic": False}
    assert "deterministic" not in params.to_srt_kwargs()
    assert switched.max_new_tokens == params.max_new_tokens


# Answers


def chat_answer() -> Any:
    from sglang.srt.entrypoints.openai import protocol

    message = protocol.ChatMessage(role="assistant", content="Rhône")
    choices = [
        protocol.ChatCompletionResponseChoice(index=i, message=message, finish_reason="stop")
        for i in range(2)
    ]
    usage = protocol.UsageInfo()
    metadata = {"weight_version": "default"}
    return protocol.ChatCompletionResponse(
        id="1", model="m", choices=choices, usage=usage, metadata=metadata
    )


def outputs(*records: Any) -> list[dict[str, Any]]:
    return [{"meta_info": {} if record is None else {"gate": record}} for record in records]


def test_a_chat_completion_carries_a_record_a_choice(answers):
    from openai.types.chat import ChatCompletion

    result = chat_answer()
    body = answers.chat(result, None, None, outputs(GATED, GATED), 0).model_dump(mode="json")
    assert body.pop("system_fingerprint") == GATED["fingerprint"]
    assert body["metadata"].pop("gate") == [GATED, GATED]
    assert body == result.model_dump(mode="json"), "and changes nothing else"
    parsed = ChatCompletion.model_validate(
        answers.chat(result, None, None, outputs(GATED, OTHER), 0).model_dump(mode="json")
    )
    assert parsed.system_fingerprint is None
    assert parsed.model_extra["metadata"]["gate"] == [GATED, OTHER]


def test_errors_and_answers_without_a_record_are_left_alone(answers):
    assert answers.chat(chat_answer(), None, None, outputs(GATED, None), 0) is None
    assert answers.chat("an error", None, None, outputs(GATED, GATED), 0) is None


def event(index: int, finish: str | None, text: str = "é") -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]}, ensure_ascii=False)}\n\n"


USAGE = 'data: {"id":"x","choices":[],"usage":{}}\n\n'


def test_a_stream_carries_the_record_where_its_choice_finishes(answers):
    """The stream asks the manager itself; both are wrapped, as in a server."""
    sent = [(0, None), (1, None), (1, GATED), (0, OTHER)]
    closed = []

    async def generate(_manager: Any, _obj: Any, _request: Any) -> AsyncIterator[Any]:
        try:
            for index, record in sent:
                yield {"index": index, **outputs(record)[0]}
        finally:
            closed.append("manager")

    async def chunks(_serving: Any, adapted: Any, _request: Any, _raw: Any) -> AsyncIterator[str]:
        async for content in answers.generate_request(generate, None, adapted):
            yield event(content["index"], None)
        for index in (0, 1):
            yield event(index, "stop")
        yield USAGE
        yield "data: [DONE]\n\n"

    async def collect() -> list[str]:
        adapted = SimpleNamespace()
        return [chunk async for chunk in answers.stream(chunks, None, adapted, None, None)]

    received = asyncio.run(collect())
    assert received[:4] == [event(index, None) for index, _ in sent]
    assert received[6:] == [USAGE, "data: [DONE]\n\n"]
    for chunk, index, record in ((received[4], 0, OTHER), (received[5], 1, GATED)):
        body = json.loads(chunk.removeprefix("data: "))
        assert body.pop("metadata") == {"gate": [record]}
        assert body.pop("system_fingerprint") == record.get("fingerprint")
        assert body == json.loads(event(index, "stop").removeprefix("data: "))
        assert chunk.endswith("\n\n") and "é" in chunk
    assert closed == ["manager"]


def test_a_stream_that_is_given_up_is_closed_at_once(answers):
    closed = []

    async def chunks(*_args: Any) -> AsyncIterator[str]:
        try:
            yield event(0, None)
            yield event(0, "stop")
        finally:
            closed.append("stream")

    async def first() -> None:
        stream = answers.stream(chunks, None, SimpleNamespace(), None, None)
        await anext(stream)
        await stream.aclose()
        assert closed == ["stream"]

    asyncio.run(first())


def test_who_does_not_stream_pays_nothing(answers):
    produced = object()
    assert answers.generate_request(lambda *args: produced, None, SimpleNamespace()) is produced


# meta_info


def test_the_record_in_meta_info_is_an_object_and_other_info_stays_a_list():
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager

    from margingate.runtime.client import meta_info

    manager = TokenizerManager.__new__(TokenizerManager)
    state = ReqState([], False, asyncio.Event(), None, None)
    original = TokenizerManager.update_request_meta_info

    def output(**info: list[Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        meta_info.update_request_meta_info(original, manager, told, state, info, 1, None)
        return told

    assert output(gate=[[GATED], [None]], other=[[], [1]]) == {"other": [1]}
    assert output(other=[[], [2]]) == {"other": [1, 2]}
    assert output(gate=[[None], [GATED]], other=[[], [3]]) == {"other": [1, 2, 3], "gate": GATED}
    assert list(state.customized_info_accumulated) == ["other"], "which SGLang cuts and repeats"
