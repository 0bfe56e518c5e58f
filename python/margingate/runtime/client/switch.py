"""The per-request switch, written as any other sampling parameter.

`deterministic` goes into `custom_params`, which SGLang carries to the scheduler; a server without
the gate knows neither and says so. Requests of Anthropic's, Ollama's and the responses routes have
no `custom_params`: there it is read from the body and waits on the HTTP request for the manager.
"""

from __future__ import annotations

import json
from typing import Any

from margingate.runtime.client import parameter_types
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.request.record import SWITCH, not_a_switch, not_an_object

_NOTED = "margingate_deterministic"  # on an HTTP request's state


def _with_switch(custom: Any, value: Any) -> dict[str, Any]:
    """`custom_params` with the switch; the plain parameter wins. Raises ValueError: HTTP 400."""
    if sentence := not_a_switch(value):
        raise ValueError(sentence)
    if sentence := not_an_object(custom or {}):
        raise ValueError(sentence)
    return {**(custom or {}), SWITCH: value}


def tokenized_object(_manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE TokenizerManager._create_tokenized_object: `deterministic` in sampling_params.

    Replaces the dict, which requests of a batch share and which the caller may use again.
    """
    params = obj.sampling_params
    if SWITCH not in params:
        return
    rest = _without_switch(params)
    if params[SWITCH] is not None:  # as with SGLang's own parameters
        rest["custom_params"] = _with_switch(rest.get("custom_params"), params[SWITCH])
    obj.sampling_params = rest


def contract_error(original: Any, body: Any) -> str | None:
    """AROUND http_server.generate_contract_error: SGLang's schema of /generate has no switch.

    Returns its sentence about the rest of the body, or ours, or None. The body stays as it is.
    """
    if isinstance(body, dict) and "sampling_params" in body:
        body = {**body, "sampling_params": _without_switch(body["sampling_params"])}
    sentence: str | None = original(body)
    return sentence or parameter_types.body_error(body)


def _without_switch(params: Any) -> Any:
    """Sampling parameters, or a list of them for a batch; what is neither stays as it is."""
    if isinstance(params, list):
        return [_without_switch(each) for each in params]
    if not isinstance(params, dict):
        return params
    return {name: value for name, value in params.items() if name != SWITCH}


async def openai_request(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """AROUND OpenAIServingBase.handle_request: `deterministic` beside OpenAI's parameters.

    SGLang drops what it does not know, so it is read from the body, which is parsed already. On
    routes without `custom_params`, as /v1/score, it may say what --gate-default does.
    """
    if not hasattr(raw_request, "json"):  # gRPC's
        return await original(serving, request, raw_request)
    takes = hasattr(request, "custom_params")
    value = (await raw_request.json()).get(SWITCH) if takes or _is_json(raw_request) else None
    if value is not None:
        try:
            if takes:
                request.custom_params = _with_switch(request.custom_params, value)
            else:
                _hold_to_default(serving.tokenizer_manager, value)
        except ValueError as error:
            return serving.create_error_response(str(error))
    return await original(serving, request, raw_request)


def _is_json(raw_request: Any) -> bool:
    """Not a form, as sound comes in."""
    return "json" in raw_request.headers.get("content-type", "").lower()


def _hold_to_default(manager: Any, value: Any) -> None:
    """Raises ValueError: HTTP 400."""
    if sentence := not_a_switch(value):
        raise ValueError(sentence)
    config = gate_config(manager.server_args)
    if config is not None and value != (config.default == "on"):
        raise ValueError(
            f"{SWITCH} is {json.dumps(value)}, but requests of this route are as --gate-default "
            f"{config.default} says: drop it, or ask /generate with max_new_tokens 0."
        )


async def note(raw_request: Any) -> str:
    """Keep what an HTTP request's body says; returns the sentence that refuses it, or nothing.

    For routes whose requests have no `custom_params`. Mutates the request's state.
    """
    value = (await raw_request.json()).get(SWITCH)
    if value is None:
        return ""
    setattr(raw_request.state, _NOTED, value)
    return not_a_switch(value)


def take_noted(obj: Any, raw_request: Any) -> None:
    """Give the manager's request `obj` what was kept, as a sampling parameter."""
    value = getattr(getattr(raw_request, "state", None), _NOTED, None)
    if value is not None:
        obj.sampling_params = {**obj.sampling_params, SWITCH: value}
