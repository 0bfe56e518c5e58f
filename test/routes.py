"""One question on each route of a server: what a client reads, streamed or not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import requests


@dataclass(frozen=True)
class Said:
    text: str
    end: str  # why it ended, in the words of the route
    gate: dict[str, Any]  # the record


Body = dict[str, Any]
Read = Callable[[Any], Said]


@dataclass(frozen=True)
class Route:
    path: str
    body: Callable[[str, int], Body]  # of a prompt, and tokens at most
    whole: Read  # of the one answer
    streamed: Read  # of the events
    regex: bool = False  # whether its requests may have one
    sampling: str = ""  # what its sampling parameters are in

    def post(self, url: str, prompt: str, tokens: int, stream: bool, **more: Any) -> Any:
        """The reply. `more`: parameters of sampling, or of the gate."""
        body = self.body(prompt, tokens) | {"stream": stream}
        if "model" in body:
            body["model"] = served_model(url)
        if self.sampling:
            body[self.sampling] |= more
        else:
            body |= more
        return requests.post(url + self.path, json=body, timeout=300)

    def ask(self, url: str, prompt: str, tokens: int, stream: bool, **more: Any) -> Said:
        reply = self.post(url, prompt, tokens, stream, **more)
        assert reply.status_code == 200, reply.text
        return self.streamed(events(reply)) if stream else self.whole(reply.json())


@functools.cache
def served_model(url: str) -> str:
    """The name that the server goes by; `/v1/responses` knows no other."""
    found: str = requests.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    return found


def events(reply: requests.Response) -> list[dict[str, Any]]:
    """The JSON objects of a stream: lines of their own, or data of events."""
    found = [line.removeprefix(b"data: ") for line in reply.content.split(b"\n")]
    return [json.loads(line) for line in found if line.startswith(b"{")]


def _greedy(**more: Any) -> Body:
    return {"model": "m", "temperature": 0, **more}


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _one(found: Iterable[Any]) -> Any:
    (only,) = found
    return only


def _generated(output: Any) -> Said:
    meta = output["meta_info"]
    return Said(output["text"], meta["finish_reason"]["type"], meta["gate"])


def _generated_stream(outputs: Any) -> Said:
    texts = [output["text"] for output in outputs]
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:])), texts
    return _generated(outputs[-1])


def _choice(text: Callable[[Any], str | None]) -> tuple[Read, Read]:
    """Of OpenAI's two routes, whole and streamed, by what a choice's text is."""

    def streamed(chunks: Any) -> Said:
        choices = [chunk["choices"][0] for chunk in chunks]
        end = _one(chunk for chunk in chunks if "gate" in (chunk.get("metadata") or {}))
        reason = end["choices"][0]["finish_reason"]
        said = "".join(text(choice) or "" for choice in choices)
        return Said(said, reason, end["metadata"]["gate"][0])

    return lambda answer: streamed([answer]), streamed


def _message(answer: Any) -> Said:
    text = "".join(block["text"] for block in answer["content"])
    return Said(text, answer["stop_reason"], answer["metadata"]["gate"])


def _message_stream(found: Any) -> Said:
    deltas = [x["delta"]["text"] for x in found if x["type"] == "content_block_delta"]
    end = _one(x for x in found if x["type"] == "message_delta")
    return Said("".join(deltas), end["delta"]["stop_reason"], end["metadata"]["gate"])


def _response(answer: Any) -> Said:
    text = "".join(part["text"] for item in answer["output"] for part in item["content"])
    return Said(text, answer["status"], json.loads(answer["metadata"]["gate"]))


def _response_stream(found: Any) -> Said:
    deltas = [x["delta"] for x in found if x["type"] == "response.output_text.delta"]
    end = _response(found[-1]["response"])
    assert "".join(deltas) == end.text
    return end


def _lines(text: Callable[[Any], str]) -> tuple[Read, Read]:
    """Of Ollama's two routes, whole and streamed, by what a line's text is."""

    def streamed(lines: Any) -> Said:
        end = _one(line for line in lines if line["done"])
        return Said("".join(map(text, lines)), end["done_reason"], end["gate"])

    return lambda answer: streamed([answer]), streamed


def _ollama(tokens: int) -> Body:
    return {"model": "m", "options": {"temperature": 0, "num_predict": tokens}}


ROUTES = {
    route.path: route
    for route in (
        Route(
            "/generate",
            lambda prompt, tokens: {
                "text": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": tokens},
            },
            _generated,
            _generated_stream,
            regex=True,
            sampling="sampling_params",
        ),
        Route(
            "/v1/completions",
            lambda prompt, tokens: _greedy(prompt=prompt, max_tokens=tokens),
            *_choice(lambda choice: choice["text"]),
            regex=True,
        ),
        Route(
            "/v1/chat/completions",
            lambda prompt, tokens: _greedy(messages=_messages(prompt), max_tokens=tokens),
            *_choice(lambda choice: choice.get("delta", choice.get("message")).get("content")),
            regex=True,
        ),
        Route(
            "/v1/messages",
            lambda prompt, tokens: _greedy(messages=_messages(prompt), max_tokens=tokens),
            _message,
            _message_stream,
        ),
        Route(
            "/v1/responses",
            # SGLang makes two fewer of it.
            lambda prompt, tokens: _greedy(input=prompt, max_output_tokens=tokens + 2),
            _response,
            _response_stream,
        ),
        Route(
            "/api/generate",
            lambda prompt, tokens: _ollama(tokens) | {"prompt": prompt},
            *_lines(lambda line: line["response"]),
        ),
        Route(
            "/api/chat",
            lambda prompt, tokens: _ollama(tokens) | {"messages": _messages(prompt)},
            *_lines(lambda line: line["message"]["content"]),
        ),
    )
}
PLAIN = ("/generate", "/v1/completions", "/api/generate")
CHATS = [path for path in ROUTES if path not in PLAIN]  # those with a chat template
