"""Every field of SGLang's requests: part of what is asked, refused, or without effect, and why.

Equal requests have equal answers; this says which fields make two requests unequal. A name is in
one place of its class only; a test holds the table against the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from margingate.runtime.compat.release import absent

_Group = Mapping[str, str]  # reason -> names, separated by spaces

_ASKED = "part of what is asked: requests that differ in it are not equal"
_BESIDE = "asks for what is said beside the answer"
_REFUSED = "refused where the request is gated"
_CARRIED = "how the request travels, who waits for it, and what is logged"
_DISAGGREGATED = "of --disaggregation-mode, which is refused"
_ROUTED = "which replica serves; all answer alike"
_MEDIA = "of video, sound and encoders apart, refused where the request is gated"
_OFF = "of options of the server that are refused"
_SCORED = "of scores, for which nothing is generated"
_NOTES = "SGLang's own notes on other fields; refused from clients"

SAMPLING: _Group = {
    _ASKED: "max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p "
    "frequency_penalty presence_penalty repetition_penalty min_new_tokens n json_schema regex ebnf "
    "structural_tag ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim "
    "logit_bias sampling_seed custom_params ebnf_full_assistant",
    _OFF: "watermark",
    "refused: a server with the gate searches no beams": "beam_width",
    "how a stream is cut into chunks": "stream_interval",
    _NOTES: "stop_strs stop_regex_strs stop_str_max_len stop_regex_max_len is_normalized",
}

_BOTH: _Group = {
    _ASKED: "input_ids sampling_params require_reasoning",
    _BESIDE: "return_logprob logprob_start_len top_logprobs_num token_ids_logprob "
    "return_flat_raw_top_logprobs return_bytes return_entropy sampling_logprobs_mode "
    "return_routed_experts routed_experts_start_len",
    _REFUSED: "input_embeds return_sampling_mask return_hidden_states custom_logit_processor "
    "positional_embed_overrides lora_id session_params",
    "refused: it names rows of a forward": "token_indices_to_pool",
    _OFF: "return_indexer_topk kv_hints",
    _CARRIED: "rid stream priority http_worker_ipc no_logs routing_key",
    "where columns are looked for, which the gate makes answers independent of": ""
    "extra_key cache_salt session_id",
    _DISAGGREGATED: "bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key "
    "decode_tp_size disagg_prefill_dp_rank",
    _ROUTED: "routed_dp_rank",
    _MEDIA: "need_wait_for_mm_inputs num_items_assigned encoder_urls",
    _SCORED: "multi_item_delimiter_indices",
}

_GENERATE: _Group = {
    "part of what is asked, in words": "text",
    "part of what is asked; SGLang makes a logit processor of it": "max_thinking_tokens",
    "asks for what is said beside the answer, in words": "return_text_in_logprobs "
    "return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 return_prompt_token_ids",
    "a name for routed_dp_rank": "data_parallel_rank",
    "of --enable-watermark, which is refused": "watermark",
    "refused where the request is gated, by the id it gets": "lora_path",
    "how a client's call is kept and timed": "log_metrics conversation_id background custom_labels "
    "external_trace_header received_time",
    "part of what is asked, of images": "image_data modalities max_dynamic_patch min_dynamic_patch "
    "image_max_dynamic_patch images_config mm_processor_kwargs",
    "compared with the images by SGLang, as the option to trust them is refused": ""
    "mm_content_hashes",
    "refused: the gate names images itself": "mm_hashes",
    _MEDIA: "video_data audio_data use_audio_in_video video_max_dynamic_patch video_config",
}

_TOKENIZED: _Group = {
    "a copy of the prompt in words, for logs": "input_text",
    "images, or media that are refused; of scores": "mm_inputs token_type_ids",
    "when it came": "time_stats",
    "of --pp-size and --enable-lora, which are refused": "pp_prefetch_ticketed lora_name",
}

TABLES: Mapping[str, tuple[_Group, ...]] = {
    "SamplingParams": (SAMPLING,),
    "GenerateReqInput": (_BOTH, _GENERATE),
    "TokenizedGenerateReqInput": (_BOTH, _TOKENIZED),
}


SAMPLED = frozenset(name for listed in SAMPLING.values() for name in listed.split())
NOTES = frozenset(SAMPLING[_NOTES].split())


def rows(name: str) -> Iterator[tuple[str, str]]:
    """(field, reason) of every field of the class of this name in this release."""
    missing = absent(name)
    for group in TABLES[name]:
        for reason, listed in group.items():
            yield from ((field, reason) for field in listed.split() if field not in missing)


@cache
def _outside(kind: Any) -> tuple[str, ...]:
    """Fields of a class that its table has not; none of a class without a table."""
    if kind.__name__ not in TABLES:
        return ()
    known = {field for field, _ in rows(kind.__name__)}
    return tuple(name for name in fields_of(kind) if name not in known)


def fields_of(kind: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass or of a msgspec struct."""
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return tuple(kind.__struct_fields__)


def unseen(request: Any) -> str:
    """The sentence for the first field that is set and that nobody has looked at, or empty."""
    kind: Any = type(request)
    for name in _outside(kind):
        if getattr(request, name) not in (None, False):
            return f"the deterministic gate does not know what {name} does: drop it."
    return ""
