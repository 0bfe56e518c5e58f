"""What SGLang 0.5.22 has in another way than 0.5.23. Goes when 0.5.22 is served no more."""

from __future__ import annotations

from typing import Any

# By class: fields that the tables have and this release has not.
ABSENT = {
    "ServerArgs": frozenset(
        {
            *("prefill_decode_interval_min_bs", "enable_return_aux_hidden_states"),
            *("aux_hidden_state_capture", "return_aux_hidden_state_layer_ids"),
            *("enable_nvidia_megakernel", "enable_amd_monokernel", "enable_http_worker_reuseport"),
            *("enable_paged_experts", "paged_experts_num_resident"),
            *("unified_cache_external_linker_config", "enable_megamoe_for_layernorm_sp"),
        }
    ),
    "GenerateReqInput": frozenset({"mm_processor_kwargs"}),
    "TokenizedGenerateReqInput": frozenset({"lora_name"}),
}

# Fields that are gone in the newest, each with why it may have any value.
GONE = {"speculative_skip_dp_mlp_sync": "of --speculative-algorithm, which is refused"}

# The first is written alone, which does nothing here: this release counts reasoning from the first
# token on, whether or not the model opens it. For the second `shared_slots` has another name.
# Images are named by functions below.
ABSENT_ATTRIBUTES = frozenset(
    {
        "managers.schedule_batch.Req._think_start_match_len",
        "layers.moe.topk.TopKConfig.num_shared_topk_slots",
        "managers.schedule_batch.MultimodalDataItem.padding_sequence",
        "managers.schedule_batch.MultimodalDataItem.set_identity",
    }
)

# Experts go to Marlin by one of torch's operators here, which no hook can wrap.
MARLIN_EXPERTS = False

# Hooks' targets whose parameters differ.
PARAMETERS = {
    "layers.logits_processor.LogitsProcessor._compute_lm_head": ""
    "self hidden_states lm_head embedding_bias",
    "entrypoints.openai.serving_responses.OpenAIServingResponses.responses_full_generator": ""
    "self request sampling_params result_generator context model_name tokenizer request_metadata "
    "created_time require_reasoning output_items",
    "entrypoints.openai.serving_responses.OpenAIServingResponses."
    "responses_stream_generator_non_harmony": ""
    "self request sampling_params result_generator model_name tokenizer request_metadata "
    "created_time require_reasoning",
}


def forward_context(context: Any, *, forward_batch: Any) -> Any:
    """SGLang's context manager, which has no part for the batch: layers cannot ask for it."""
    from sglang.srt.model_executor import forward_context

    del forward_batch
    return forward_context.forward_context(context)


def is_confidential() -> bool:
    """Never: this release has nothing for that mode, and copies results as on any GPU."""
    return False


def shared_slots(asked: Any) -> int:
    """Of a router's choices, those that are shared experts."""
    return int(asked.num_fused_shared_experts)


def adopt_identity(item: Any, identity: bytes) -> None:
    """As the newest does: this release keeps 30 bits of an image, and two may have the same."""
    from sglang.srt.managers.schedule_batch import MM_PAD_SHIFT_VALUE

    item.hash = int.from_bytes(identity[:8], "big")
    item.pad_value = MM_PAD_SHIFT_VALUE + (int.from_bytes(identity[8:16], "big") >> 2)


def padding_sequence(item: Any, length: int) -> list[int]:
    """What stands in the prompt for tokens of an image: one number for all."""
    return [item.pad_value] * length
