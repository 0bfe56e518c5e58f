"""Ollama's routes: the last tokens of a stream, options that ended in HTTP 500, the gate's record.

`gate` and a true `done_reason` are in the last line of a stream, or in the one answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from margingate.runtime.client import switch
from margingate.runtime.request.record import INFO_KEY, SWITCH

_META = "margingate_meta"  # on a request's state: `meta_info` of its last output


class _Delegate:
    """Everything of `inner` but what a subclass changes."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Tokenizer(_Delegate):
    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """Ids, which SGLang 0.5.22 takes for granted, and not a mapping that holds them."""
        return self._inner.apply_chat_template(messages, **{**options, "return_dict": False})


class _Manager(_Delegate):
    @property
    def tokenizer(self) -> Any:
        return _Tokenizer(self._inner.tokenizer)

    async def generate_request(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        """SGLang's route drops the text of a finishing output, so that goes first on its own."""
        async with aclosing(self._inner.generate_request(obj, request)) as outputs:
            async for output in outputs:
                meta = output["meta_info"]
                setattr(request.state, _META, meta)
                if obj.stream and (reason := meta.get("finish_reason")):
                    _raise_refusal(reason)
                    yield {**output, "meta_info": {**meta, "finish_reason": None}}
                yield output


def _raise_refusal(reason: dict[str, Any]) -> None:
    """ValueError where the scheduler refused the request, as SGLang raises without a stream."""
    if reason["type"] == "abort" and reason.get("status_code") == 400:
        raise ValueError(reason.get("message") or "The request was refused.")


def init(_result: Any, serving: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER OllamaServing.__init__."""
    serving.tokenizer_manager = _Manager(serving.tokenizer_manager)


def options(result: dict[str, Any], _serving: Any, given: Any = None) -> dict[str, Any]:
    """AFTER OllamaServing._convert_options_to_sampling_params: SGLang's names and values.

    A negative `num_predict` (-1: no bound, -2: to the end of the context) is no bound in both.
    `deterministic` may be among the options, which is where Ollama's clients let one add.
    """
    params = dict(result)
    if "seed" in params:
        params["sampling_seed"] = params.pop("seed")
    tokens = params.get("max_new_tokens")
    if isinstance(tokens, int) and tokens < 0:
        params["max_new_tokens"] = None
    if given and SWITCH in given:
        params[SWITCH] = given[SWITCH]
    return params


async def handle(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND OllamaServing.handle_chat and handle_generate: refusals are HTTP 400."""
    try:
        if sentence := await switch.note(raw_request):
            raise ValueError(sentence)
        answer = await original(serving, request, raw_request)
        if not isinstance(answer, StreamingResponse):
            return JSONResponse(answer.model_dump() | _end(raw_request))
        lines = answer.body_iterator
        first = await anext(aiter(lines), None)
    except ValueError as error:
        return JSONResponse({"error": str(error)}, status_code=400)
    answer.body_iterator = _lines(first, lines, raw_request)
    return answer


async def _lines(first: Any, rest: Any, raw_request: Any) -> AsyncIterator[Any]:
    if first is None:
        return
    yield _with_end(first, raw_request)
    async with aclosing(rest):
        async for line in rest:
            yield _with_end(line, raw_request)


def _with_end(line: bytes, raw_request: Any) -> bytes:
    """The line; where it is the last, with how the answer ended."""
    if b'"done":true' not in line:  # within a text the quotes are escaped
        return line
    body = json.loads(line) | _end(raw_request)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _end(raw_request: Any) -> dict[str, Any]:
    """`done_reason`, as Ollama names it, and the record; empty where nothing was generated."""
    meta = getattr(raw_request.state, _META, None)
    if meta is None:
        return {}
    end: dict[str, Any] = {"done_reason": (meta.get("finish_reason") or {}).get("type", "stop")}
    if record := meta.get(INFO_KEY):
        end[INFO_KEY] = dict(record)
    return end
