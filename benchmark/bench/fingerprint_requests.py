"""The requests of sameness.fingerprint_pairs, and what of an answer two servers must agree on."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "count": {"type": "integer"}},
    "required": ["name", "count"],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "What is the weather in Rome, and why? 今日は 😀"}]
LONG = " ".join(f"The number {i} comes after {i - 1}." for i in range(1, 40))
SEEDED = {"temperature": 1.0, "sampling_seed": 11, "top_p": 0.95}
TOKENS = 8
Body = dict[str, Any]


def generate(text: str, **params: Any) -> tuple[str, Body]:
    """Route and body of a request for log-probs; greedy unless `params` say otherwise."""
    params = {"temperature": 0, "max_new_tokens": TOKENS, **params}
    body = {"text": text, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 5}
    return "/generate", body


def chat(**more: Any) -> tuple[str, Body]:
    """Of OpenAI's route."""
    body: Body = {"model": "m", "messages": USER, "max_tokens": TOKENS, "temperature": 0, **more}
    return "/v1/chat/completions", body


REQUESTS: dict[str, tuple[str, Body]] = {
    "greedy": generate("Once upon a time"),
    "greedy, emoji": generate("Say it: 今日は 😀 é"),
    "greedy, long": generate(LONG),
    "its prefix again": generate(LONG + " What comes next?"),
    "seeded": generate("The city of", **SEEDED),
    "seeded, top-k": generate("The river of", **SEEDED | {"top_k": 30, "min_p": 0.01}),
    "penalties": generate("a a a a", frequency_penalty=0.5, repetition_penalty=1.2),
    "bias": generate("The", logit_bias={"28": -100, "260": 3.5}, min_new_tokens=4),
    "stop": generate("1, 2, 3,", stop=["5", ","], no_stop_trim=True, min_new_tokens=2),
    "stop expression": generate("One two", stop_regex="[a-z]{4}", skip_special_tokens=False),
    "two": generate("Two answers", n=2),
    "JSON, seeded": generate("JSON: ", json_schema=json.dumps(SCHEMA), **SEEDED),
    "JSON of any shape": generate("JSON: ", json_schema='{"type": "object"}', **SEEDED),
    "regex": generate("It is ", regex=r"(red|blue) [a-z ]{3,12}\.", **SEEDED),
    "EBNF": generate("Yes or no? ", ebnf='root ::= ("yes" | "no") " "? root?'),
    "chat": chat(logprobs=True, top_logprobs=3),
    "chat, streamed": chat(logprobs=True, stream=True),
    "chat, seeded, at the server's temperature": chat(seed=5, temperature=None),
    "chat, a tool called": chat(tools=[TOOL], tool_choice="required", max_tokens=16),
    "chat, JSON": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ),
    "completion": (
        "/v1/completions",
        {"model": "m", "prompt": "Bread is", "logprobs": 3, "temperature": 0, "max_tokens": TOKENS},
    ),
    "completion, streamed": (
        "/v1/completions",
        {"model": "m", "prompt": "Salt is", "stream": True, "temperature": 0, "max_tokens": TOKENS},
    ),
    "Anthropic": (
        "/v1/messages",
        {"model": "m", "max_tokens": TOKENS, "messages": USER, "temperature": 0},
    ),
    "Ollama": (
        "/api/chat",
        {"model": "m", "messages": USER, "stream": False}
        | {"options": {"num_predict": TOKENS, "temperature": 0}},
    ),
    "with a priority": ("/generate", generate("Urgent:")[1] | {"priority": 3}),
}
_LEFT_OUT = ("id", "created", "metadata", "system_fingerprint", "model", "usage", "gate")
_TIMES = ("_at", "_duration", "_count")  # of Ollama


def ask_all(base_url: str) -> dict[str, Body]:
    """Answers by the request's name, to each alone and then to all at once."""
    alone = {name: ask(base_url, *each) for name, each in REQUESTS.items()}
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = pool.map(lambda each: ask(base_url, *each), REQUESTS.values())
        together = {f"{name}, together": one for name, one in zip(REQUESTS, found, strict=True)}
    return alone | together


def ask(base_url: str, route: str, body: Body) -> Body:
    """`gated`, and then what must be the same; where there is no gated answer, what was said."""
    reply = requests.post(base_url + route, json=body, timeout=120)
    if reply.status_code != 200:
        return {"gated": False, "said": f"{reply.status_code} {reply.text[:300]}"}
    if body.get("stream"):
        return joined([json.loads(line) for line in _events(reply.text)])
    answer = reply.json()
    return _READ.get(route, openai)(answer)


def _events(text: str) -> list[str]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data:")]
    return [line for line in lines if line != "[DONE]"]


def native(answer: Any) -> Body:
    """Of SGLang's own route; several where `n` is above 1."""
    several = answer if isinstance(answer, list) else [answer]
    names = ("output_token_logprobs", "output_top_logprobs", "finish_reason")
    return {
        "gated": all(one["meta_info"]["gate"]["gated"] for one in several),
        "ids": [one["output_ids"] for one in several],
        "texts": [one["text"] for one in several],
        **{name: [one["meta_info"][name] for one in several] for name in names},
    }


def openai(answer: Body) -> Body:
    """Of the other routes: all but ids, times and counters."""
    records = answer.get("metadata", {}).get("gate") or answer.get("gate") or [{}]
    records = records if isinstance(records, list) else [records]
    return {"gated": all(one.get("gated", False) for one in records), "answer": _plain(answer)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if name not in _LEFT_OUT}
        return {name: _plain(each) for name, each in kept.items() if not name.endswith(_TIMES)}
    return value


def joined(chunks: list[Body]) -> Body:
    """Of a stream of OpenAI's: texts and log-probs in one, however it was cut."""
    text, log_probs, ends, gated = "", [], [], False
    for chunk in chunks:
        gated = gated or any(
            one.get("gated", False) for one in (chunk.get("metadata") or {}).get("gate") or []
        )
        for choice in chunk.get("choices", []):
            text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            log_probs += (choice.get("logprobs") or {}).get("content") or []
            ends += [choice["finish_reason"]] if choice.get("finish_reason") else []
    return {"gated": gated, "text": text, "log_probs": log_probs, "ends": ends}


_READ: dict[str, Callable[[Any], Body]] = {"/generate": native}
