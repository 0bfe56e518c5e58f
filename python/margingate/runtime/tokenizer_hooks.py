"""Rows of the ledger of patches that concern clients: what they may send, what comes back."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from margingate.runtime import openai_answers, stream, switch, wellformed
from margingate.runtime.hooks import Hook

AFTER, AROUND, BEFORE = HookType.AFTER, HookType.AROUND, HookType.BEFORE
_MANAGER = "managers.tokenizer_manager.TokenizerManager."
_CHAT = "entrypoints.openai.serving_chat.OpenAIServingChat."
_COMPLETION = "entrypoints.openai.serving_completions.OpenAIServingCompletion."
_SWITCH = "SGLang lets plugins declare sampling parameters"
_RECORD = "SGLang puts customized info into OpenAI's answers"

# Applied in the launching process of a gated server.
TOKENIZER_HOOKS = (
    Hook(
        _MANAGER + "_handle_batch_output",
        AROUND,
        stream.handle_batch_output,
        "self recv_obj",
        'meta_info["gate"] is a record per request, not a list per token',
        "customized info can be per request",
    ),
    Hook(
        _MANAGER + "_validate_one_request",
        BEFORE,
        wellformed.validate_one_request,
        "self obj input_ids",
        "HTTP 400 for sampling parameters of a type that would end the scheduler",
        "SGLang checks types",
    ),
    Hook(
        _MANAGER + "_create_tokenized_object",
        BEFORE,
        switch.tokenized_object,
        "self obj input_text input_ids input_embeds mm_inputs token_type_ids",
        "`deterministic` among the sampling parameters",
        _SWITCH,
    ),
    Hook(
        "entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        AROUND,
        switch.openai_request,
        "self request raw_request",
        "`deterministic` beside OpenAI's parameters",
        _SWITCH,
    ),
    Hook(
        _CHAT + "_build_chat_response",
        AFTER,
        openai_answers.chat,
        "self request ret created",
        "the gate's record in chat completions",
        _RECORD,
    ),
    Hook(
        _COMPLETION + "_build_completion_response",
        AFTER,
        openai_answers.completion,
        "self request ret created",
        "the gate's record in completions",
        _RECORD,
    ),
    Hook(
        _CHAT + "_generate_chat_stream",
        AROUND,
        openai_answers.stream,
        "self adapted_request request raw_request",
        "the gate's record in the last chunk of a chat completion",
        _RECORD,
    ),
    Hook(
        _COMPLETION + "_generate_completion_stream",
        AROUND,
        openai_answers.stream,
        "self adapted_request request raw_request",
        "the gate's record in the last chunk of a completion",
        _RECORD,
    ),
    Hook(
        _MANAGER + "generate_request",
        AROUND,
        openai_answers.generate_request,
        "self obj request",
        "notes the record for the stream that is to carry it",
        _RECORD,
    ),
)
