"""Parameters of another type than SGLang takes them to have: HTTP 400.

SGLang checks many ranges, and types of the bodies of `/generate` alone. What gets past its
tokenizer ends the scheduler, and with it the requests of all others: `max_new_tokens` 1.5 did, and
a `logit_bias` that is a list. `benchmark/robustness/bad_requests.py` has more of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sized
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np

from margingate.runtime.client import embeddings, sessions
from margingate.runtime.client.kinds import TEXT, Kind, is_text, type_error
from margingate.runtime.client.stop_expressions import LIMIT, UNBOUNDED, is_served
from margingate.runtime.compat.arguments import request_table
from margingate.runtime.request.record import SWITCH

MOST_COPIES = 128  # of a request, each a request of its own; ask for more in several
DEEPEST = 100  # lists and objects in each other; pickle, on the way to the scheduler, fails at 480
_FLOAT32 = float(np.finfo(np.float32).max)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral)  # NumPy's too


def _int32(value: Any) -> bool:
    """SGLang makes a tensor of it."""
    return _whole(value) and -(1 << 31) <= value < 1 << 31


def _int64(value: Any) -> bool:
    return _whole(value) and -(1 << 63) <= value < 1 << 63


def _copies(value: Any) -> bool:
    return _whole(value) and value <= MOST_COPIES


def _number(value: Any) -> bool:
    """Finite in float32, which SGLang's tensors have."""
    real = isinstance(value, Real)
    return real and bool(abs(value) <= _FLOAT32)


def _one(value: Any) -> bool:
    return _whole(value) and value == 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _texts(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list | tuple) and all(map(is_text, value)))


def _ids(value: Any) -> bool:
    """SGLang leaves out what is None."""
    if not isinstance(value, list | tuple | set | frozenset):
        return False
    return all(each is None or _whole(each) for each in value)


def _biases(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        (_whole(token) or (is_text(token) and token.strip().isdecimal())) and _number(bias)
        for token, bias in value.items()
    )


def _object(value: Any) -> bool:
    """SGLang takes whatever is empty for none."""
    return isinstance(value, dict) or not value


def _processor(value: Any) -> bool:
    """A class that SGLang's scheduler can begin to read; what is in it is the client's affair."""
    try:
        return is_text(value) and bool(bytes.fromhex(json.loads(value)["callable"]))
    except (ValueError, TypeError, KeyError):
        return False


def _expressions(value: Any) -> bool:
    each = [value] if isinstance(value, str) else value
    return _texts(value) and all(map(is_served, each))


_INT32: Kind = (_int32, f"a whole number below {1 << 31}")
_INT64: Kind = (_int64, f"a whole number below {1 << 63}")
_COPIES: Kind = (_copies, f"a whole number, at most {MOST_COPIES}")
_NUMBER: Kind = (_number, "a number that is finite in float32")
_FLAG: Kind = (_flag, "true or false")

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("max_new_tokens", "stream_interval", "sampling_seed"), _INT64),
    **dict.fromkeys(("min_new_tokens", "top_k"), _INT32),
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"), TEXT),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), _FLAG),
    "ebnf_full_assistant": _FLAG,
    "n": _COPIES,
    "beam_width": (_one, "1, since a server with the deterministic gate searches no beams"),
    "stop": (_texts, "a text or a list of texts"),
    "stop_regex": (
        _expressions,
        f"a regular expression or a list of them, with fewer than {LIMIT} steps at one place: "
        f"repeats multiply where they may share characters, and one without a bound counts "
        f"{UNBOUNDED}, and without a group that captures in a possessive repeat",
    ),
    "stop_token_ids": (_ids, "a list of token ids"),
    "logit_bias": (_biases, "an object with a finite number for each token id"),
    "custom_params": (_object, "an object"),
}

_PARAMS: Kind = (lambda value: isinstance(value, Mapping), "an object, or one for each prompt")

# Of the request itself, where SGLang takes a list of several prompts' values. A list for a single
# prompt passes its checks, and ends its scheduler. So do ids and keys that are no texts: it checks
# the types of /generate's bodies, and none of an Engine's arguments or of /vertex_generate.
_SINGLE: dict[str, Kind] = {
    **dict.fromkeys(("rid", "lora_id", "lora_path", "extra_key", "cache_salt"), TEXT),
    **dict.fromkeys(("routing_key", "session_id", "http_worker_ipc"), TEXT),
    **dict.fromkeys(("priority", "routed_dp_rank", "routed_experts_start_len"), _INT64),
    **dict.fromkeys(("return_logprob", "return_sampling_mask"), _FLAG),
    **dict.fromkeys(("logprob_start_len", "bootstrap_port", "bootstrap_room"), _INT64),
    **dict.fromkeys(("sampling_logprobs_mode", "bootstrap_host", "bootstrap_pair_key"), TEXT),
    "custom_logit_processor": (_processor, "what its class's to_str() says"),
    "custom_labels": _KINDS["custom_params"],
    "received_time": _NUMBER,
    "decode_tp_size": _INT64,
    "return_hidden_states": (lambda value: _flag(value) or is_text(value), "true, false or a mode"),
}

# `is_normalized` and SGLang's other notes pass all its checks by.
_ASKED = request_table.SAMPLED - request_table.NOTES


def refusal(params: Mapping[str, Any]) -> str:
    """The sentence for the first sampling parameter of another type; empty where there is none.

    Args:
        params: as a client gave them. None counts as absent, and what is not named above is left
            to SGLang.
    """
    for name, value in params.items():
        if (kind := _KINDS.get(name)) and (sentence := type_error(name, value, kind)):
            return sentence
    return ""


def single_type_error(obj: Any) -> str:
    """The sentence for the first field of another type in one prompt's request, or an empty one."""
    sentences = (type_error(name, getattr(obj, name, None), kind) for name, kind in _SINGLE.items())
    return next(filter(None, sentences), "")


def positions_error(obj: Any) -> str:
    """The sentence for logits at places that a client names, gated or not, or an empty one.

    In a chunk or behind a cached prefix a forward has fewer rows, and SGLang's scheduler ends.
    """
    if getattr(obj, "token_indices_to_pool", None) is None:
        return ""
    return (
        "token_indices_to_pool (of /v1/score: score_extraction_token_id) is not served with the "
        "deterministic gate, since it may name rows that a forward has not: drop it."
    )


def delimiters_error(obj: Any, input_ids: Sized | None) -> str:
    """The sentence for places of delimiters that a prompt has not, gated or not, or an empty one.

    With --enable-mis SGLang reads rows there, and its scheduler ends where there are none.
    """
    given, last = getattr(obj, "multi_item_delimiter_indices", None), len(input_ids or ()) - 1

    def ascend(places: Any) -> bool:
        if not isinstance(places, list | tuple) or not places:
            return False
        return all(_whole(each) and low < each <= last for low, each in pairwise((-1, *places)))

    what = f"places in the prompt in ascending order, from 0 to {last}"
    return type_error("multi_item_delimiter_indices", given, (ascend, what))


def too_deep(custom: Any) -> str:
    """The sentence for `custom_params` that cannot be sent to the scheduler, or an empty one.

    SGLang answers HTTP 500 as it pickles them.
    """
    level = [custom]
    for _ in range(DEEPEST + 1):
        level = [each for value in level for each in _within(value)]
        if not level:
            return ""
    return f"custom_params has lists or objects in each other more than {DEEPEST} deep: flatten it."


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def unknown(params: Mapping[str, Any], fields: Collection[str]) -> str:
    """The sentence for the first name that a client has no business with, or an empty one.

    Args:
        fields: of SGLang's class of sampling parameters.
    """
    for name in params:
        if name != SWITCH and (name not in fields or name not in _ASKED):
            return f"{name!r} is not a sampling parameter: drop it, or check its spelling."
    return ""


def out_of_range(top_logprobs: Any, vocabulary: int) -> str:
    """The sentence for a number of top log-probs that the model has not, or an empty one."""
    if top_logprobs is None or (_whole(top_logprobs) and 0 <= top_logprobs <= vocabulary):
        return ""
    return f"top_logprobs_num is {top_logprobs!r}: give a whole number from 0 to {vocabulary}."


def named_media(obj: Any) -> str:
    """The sentence for hashes of images that a client gives, gated or not, or an empty one.

    An image would be found by them, and its embedding and columns by others whose image it is not.
    """
    if not getattr(obj, "mm_hashes", None):
        return ""
    return "mm_hashes name images, which the deterministic gate names itself: drop them."


def unknown_label(labels: Any, collector: Any) -> str:
    """The sentence for the first label that the server's metrics have not, or an empty one.

    SGLang looks for it as it sends the answer, and its launcher ends.

    Args:
        collector: SGLang's, of the launcher's metrics; None: it keeps none.
    """
    if not labels or collector is None:
        return ""
    name = next((name for name in labels if name not in collector.labels), None)
    if name is None:
        return ""
    return (
        f"custom_labels has {name!r}, which is no label of this server's metrics: drop it, or "
        "start the server with --tokenizer-metrics-allowed-custom-labels."
    )


def no_tokens(input_ids: Sized | None) -> str:
    """The sentence for a prompt that its tokenizer makes nothing of, or an empty one.

    SGLang refuses an empty list of token ids itself. A forward over no rows ends its scheduler.

    Args:
        input_ids: of the prompt; None where it comes as embeddings.
    """
    if input_ids is None or len(input_ids):
        return ""
    return "the prompt has no tokens: send a text that is not empty, or token ids."


def validate_one_request(manager: Any, obj: Any, input_ids: Sized | None) -> None:
    """BEFORE TokenizerManager._validate_one_request. Raises ValueError: HTTP 400."""
    params = obj.sampling_params or {}
    session = getattr(obj, "session_params", None)
    if not isinstance(params, Mapping):
        raise ValueError("sampling_params is a list, but there is one prompt: give an object.")
    sentence = (
        unknown(params, manager.sampling_params_class.__struct_fields__)
        or too_deep(params.get("custom_params"))
        or refusal(params)
        or single_type_error(obj)
        or positions_error(obj)
        or delimiters_error(obj, input_ids)
        or out_of_range(getattr(obj, "top_logprobs_num", None), manager.model_config.vocab_size)
        or request_table.unseen(obj)
        or named_media(obj)
        or unknown_label(
            getattr(obj, "custom_labels", None), getattr(manager, "metrics_collector", None)
        )
        or embeddings.refusal(obj, manager.model_config.hidden_size)
        or sessions.refusal(session)
        or ("" if sessions.has_tokens(session) else no_tokens(input_ids))
    )
    if sentence:
        raise ValueError(sentence)


def list_error(obj: Any) -> str:
    """The sentence for lists that are not one for each prompt, of whatever route; or an empty one.

    SGLang fails over them with HTTP 500.
    """
    params, text = getattr(obj, "sampling_params", None), getattr(obj, "text", None)
    ids = getattr(obj, "input_ids", None)
    prompts = _prompts(text, ids)
    if isinstance(params, list) and len(params) < len(prompts):
        return (
            f"sampling_params is a list of {len(params)}, but there are {len(prompts)} prompts: "
            "give an object, or one for each prompt."
        )
    for each in params if isinstance(params, list) else [params]:
        if sentence := type_error("sampling_params", each, _PARAMS):
            return sentence
    if isinstance(getattr(obj, "rid", None), list) and _is_single(params, text, ids):
        return "rid is a list, but there is one prompt: give one id."
    return ""


def _is_single(params: Any, text: Any, ids: Any) -> bool:
    """Whether there is one prompt and one answer; copies of a request have ids each."""
    flat = isinstance(ids, list) and bool(ids) and _whole(ids[0])
    copies = isinstance(params, Mapping) and params.get("n", 1) != 1
    return (isinstance(text, str) or (text is None and flat)) and not copies


def _prompts(text: Any, ids: Any) -> Sized:
    """Of a list of prompts, as SGLang tells it from one; empty of one prompt."""
    if text is not None:
        return text if isinstance(text, list) else ()
    return ids if isinstance(ids, list) and ids and isinstance(ids[0], list) else ()


def body_error(body: Any) -> str | None:
    """What is wrong with a body of /generate where SGLang would fail before it looks: HTTP 500."""
    if not isinstance(body, dict):
        return None
    params = body.get("sampling_params")
    if params == []:
        return "sampling_params is an empty list: give an object, or one for each prompt."
    each = params if isinstance(params, list) else [params]
    if any(isinstance(one, dict) and "n" in one and one["n"] is None for one in each):
        return "n is null: give a whole number from 1 on, or leave it out for one answer."
    if embeddings.is_empty(body.get("input_embeds")):
        return "input_embeds is empty: give numbers for each token of the prompt."
    return None
