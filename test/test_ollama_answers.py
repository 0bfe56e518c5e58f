"""Ollama's and Anthropic's answers: SGLang's own handlers over a made-up manager."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from margingate.runtime.client import switch

RECORD = {"gated": True, "fingerprint": "0123456789abcdef"}


class Manager:
    """Answers with these texts, one output each; the last one finishes."""

    served_model_name = "m"

    def __init__(self, *texts: str, refusal: str = "") -> None:
        self.texts, self.refusal, self.asked = texts, refusal, []  # type: ignore[var-annotated]
        self.tokenizer = SimpleNamespace(apply_chat_template=self.template)

    def template(self, _messages: Any, *, return_dict: bool = True, **_options: Any) -> Any:
        return {"input_ids": [1, 2]} if return_dict else [1, 2]

    async def generate_request(self, obj: Any, _request: Any) -> AsyncIterator[Any]:
        switch.take_noted(obj, _request)
        self.asked.append(obj)
        if self.refusal:
            raise ValueError(self.refusal)
        for i, _ in enumerate(self.texts):
            last = i == len(self.texts) - 1
            meta = {"finish_reason": {"type": "length"} if last else None, "gate": RECORD}
            yield {"text": "".join(self.texts[: i + 1]), "meta_info": meta}


def http(body: dict[str, Any]) -> Any:
    """A request as FastAPI has it: SGLang's class, without a field for it, drops the switch."""

    async def parsed() -> dict[str, Any]:
        return body

    return SimpleNamespace(state=SimpleNamespace(), json=parsed)


def ask(manager: Manager, route: str, **body: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status and the lines of an answer, by SGLang's handler with our hooks around it."""
    from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest
    from sglang.srt.entrypoints.ollama.serving import OllamaServing

    from margingate.runtime.client import ollama_answers

    class Serving(OllamaServing):
        def _convert_options_to_sampling_params(self, options: Any = None) -> Any:
            result = super()._convert_options_to_sampling_params(options)
            return ollama_answers.options(result, self, options)

    async def run() -> tuple[int, list[dict[str, Any]]]:
        serving = Serving(manager)
        ollama_answers.init(None, serving, manager)
        raw = http(body.pop("body", {}))
        chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        if route == "chat":
            request: Any = OllamaChatRequest(**chat, **body)
            original: Any = OllamaServing.handle_chat
        else:
            request = OllamaGenerateRequest(model="m", prompt="x", **body)
            original = OllamaServing.handle_generate
        answer = await ollama_answers.handle(original, serving, request, raw)
        if hasattr(answer, "body_iterator"):
            data = b"".join([line async for line in answer.body_iterator])
        else:
            data = answer.body
        return answer.status_code, [json.loads(line) for line in data.splitlines()]

    return asyncio.run(run())


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(x["message"]["content"] if "message" in x else x["response"] for x in lines)


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize("texts", [("\n",), ("今日", "は😀"), ("a", "", '"done":true')])
def test_a_stream_has_all_text_and_ends_with_the_record(route, texts):
    # Not streamed, SGLang yields once.
    for stream, manager in ((True, Manager(*texts)), (False, Manager("".join(texts)))):
        status, lines = ask(manager, route, stream=stream)
        assert (status, text_of(lines)) == (200, "".join(texts))
        assert (lines[-1]["done"], lines[-1]["done_reason"]) == (True, "length")
        assert lines[-1]["gate"] == RECORD
        assert not any("gate" in line for line in lines[:-1])


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize("stream", [True, False])
def test_refusals_are_http_400(route, stream):
    status, lines = ask(Manager(refusal="Too long."), route, stream=stream)
    assert (status, lines) == (400, [{"error": "Too long."}])


def test_options_in_the_terms_of_sglang():
    manager = Manager("a")
    ask(manager, "generate", stream=False, options={"seed": 7, "num_predict": -1})
    assert manager.asked[0].sampling_params == {"sampling_seed": 7, "max_new_tokens": None}
    ask(manager, "chat", stream=False)
    assert manager.asked[1].input_ids == [1, 2]


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", ["body", "options"])
def test_the_switch_beside_the_parameters_or_among_the_options(route, stream, place):
    manager = Manager("a")
    status, _ = ask(manager, route, stream=stream, **{place: {"deterministic": False}})
    assert status == 200 and manager.asked[0].sampling_params["deterministic"] is False
    status, lines = ask(manager, route, stream=stream, body={"deterministic": "no"})
    assert (status, "is 'no': give true or false." in lines[0]["error"]) == (400, True)


def test_the_switch_beside_the_parameters_of_anthropic():
    from margingate.runtime.client import anthropic_answers

    async def original(_serving: Any, _request: Any, raw: Any) -> Any:
        obj = SimpleNamespace(sampling_params={"top_k": 1})
        switch.take_noted(obj, raw)
        return obj.sampling_params

    def said(value: Any) -> Any:
        serving = SimpleNamespace(_error_response=lambda **error: error)
        raw = http({"deterministic": value})
        return asyncio.run(anthropic_answers.handle(original, serving, None, raw))

    assert said(None) == {"top_k": 1}
    assert said(False) == {"top_k": 1, "deterministic": False}
    assert said(1)["status_code"] == 400 and "is 1: give true" in said(1)["message"]


def test_anthropic_names_the_stop_sequence_and_carries_the_record():
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesResponse

    from margingate.runtime.client import anthropic_answers

    plain = AnthropicMessagesResponse(content=[], model="m", stop_reason="end_turn")

    def said(matched: Any) -> dict[str, Any]:
        choices = [SimpleNamespace(matched_stop=matched)]
        answer = SimpleNamespace(choices=choices, metadata={"gate": [RECORD]})
        dumped: dict[str, Any] = anthropic_answers.message(plain, None, answer).model_dump()
        return dumped

    assert said(2)["stop_reason"] == "end_turn"
    assert said("END")["stop_reason"] == "stop_sequence"
    assert said("END")["stop_sequence"] == "END"
    assert said("END")["metadata"] == {"gate": RECORD}


def test_the_last_delta_of_an_anthropic_stream():
    from margingate.runtime.client import anthropic_answers, openai_answers

    adapted = SimpleNamespace()
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    frames = [f"event: message_delta\ndata: {json.dumps(delta)}\n\n", "event: message_stop\n\n"]

    async def original(*_args: Any) -> AsyncIterator[str]:
        setattr(adapted, openai_answers._RECORDS, {0: RECORD})
        setattr(adapted, openai_answers._MATCHED, {0: "END"})
        for frame in frames:
            yield frame

    async def run() -> list[str]:
        return [x async for x in anthropic_answers.stream(original, None, adapted, 1, 2, 3)]

    first, second = asyncio.run(run())
    body = json.loads(first.split("data: ")[1])
    assert body["metadata"] == {"gate": RECORD}
    assert body["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert second == frames[1]
