"""Rows of the ledger of patches that concern clients: what they may send, what comes back."""

from __future__ import annotations

from margingate.runtime.client import (
    anthropic_answers,
    choices,
    control,
    detokenizer,
    meta_info,
    ollama_answers,
    openai_answers,
    parameter_types,
    replica_counters,
    responses_answers,
    switch,
)
from margingate.runtime.client.managers import around_gated, before_gated
from margingate.runtime.hooks import firing
from margingate.runtime.hooks.registry import AFTER, AROUND, BEFORE, Hook
from margingate.runtime.request.guard import Policy

_MANAGER = "managers.tokenizer_manager.TokenizerManager."
_CHAT = "entrypoints.openai.serving_chat.OpenAIServingChat."
_COMPLETION = "entrypoints.openai.serving_completions.OpenAIServingCompletion."
_ANTHROPIC = "entrypoints.anthropic.serving.AnthropicServing."
_RESPONSES = "entrypoints.openai.serving_responses.OpenAIServingResponses."
_OLLAMA = "entrypoints.ollama.serving.OllamaServing."
_SWITCH = "SGLang lets plugins declare sampling parameters"
_CHOICES = "SGLang gives each choice a seed"
_RECORD = "SGLang puts customized info into OpenAI's answers"

# Applied in the launching process of a gated server.
TOKENIZER_HOOKS = (
    Hook(
        _MANAGER + "update_request_meta_info",
        AROUND,
        around_gated(meta_info.update_request_meta_info),
        "self meta_info state customized_info index finish_reason",
        'meta_info["gate"] is a record per request, not a list per token',
        "customized info can be an object per request, sent with the last output",
        Policy.OBSERVE,
    ),
    Hook(
        _MANAGER + "get_internal_state",
        AROUND,
        around_gated(replica_counters.internal_states),
        "self",
        "`/server_info` lists data-parallel replicas in order, with sums of their counters",
        "SGLang says which replica a state is of",
        Policy.CLIENT,
    ),
    Hook(
        _MANAGER + "_validate_one_request",
        BEFORE,
        before_gated(parameter_types.validate_one_request),
        "self obj input_ids",
        "HTTP 400 for sampling parameters of a type that would end the scheduler",
        "SGLang checks types",
        Policy.CLIENT,
    ),
    Hook(
        _MANAGER + "_create_tokenized_object",
        BEFORE,
        before_gated(switch.tokenized_object),
        "self obj input_text input_ids input_embeds mm_inputs token_type_ids",
        "`deterministic` among the sampling parameters",
        _SWITCH,
        Policy.CLIENT,
    ),
    Hook(
        _MANAGER + "_tokenize_one_request",
        AROUND,
        around_gated(choices.tokenize_one_request),
        "self obj",
        "choices of a request with `n` above 1 are counted",
        _CHOICES,
        Policy.CLIENT,
    ),
    Hook(
        _MANAGER + "_send_one_request",
        AROUND,
        around_gated(choices.send_one_request),
        "self tokenized_obj",
        "each choice of a request with a seed is drawn with a seed of its own",
        _CHOICES,
        Policy.CLIENT,
    ),
    Hook(
        "managers.communicator.FanOutCommunicator.__call__",
        AROUND,
        control.answers,
        "self obj",
        "HTTP 400 for what a scheduler refuses of an operator's requests",
        "SGLang's answer has a message",
        Policy.CLIENT,
    ),
    *(
        Hook(
            _MANAGER + name,
            AROUND,
            around_gated(control.checked),
            parameters,
            "words that SGLang does not know, which gRPC and an Engine pass on, end no scheduler",
            "SGLang checks them wherever they come from",
            Policy.CLIENT,
        )
        for name, parameters in (
            ("pause_generation", "self obj"),
            ("open_session", "self obj request"),
        )
    ),
    Hook(
        _MANAGER + "_wait_for_model_update_from_disk",
        AROUND,
        around_gated(control.update_from_disk),
        "self obj",
        "an update that comes while the last request ends is sent again",
        "SGLang drops a request from its batch before it sends the answer",
        Policy.CLIENT,
    ),
    Hook(
        "entrypoints.http_server.generate_contract_error",
        AROUND,
        switch.contract_error,
        "body",
        "`deterministic` among the sampling parameters of /generate is no unknown field",
        _SWITCH,
        Policy.CLIENT,
    ),
    Hook(
        "entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        AROUND,
        switch.openai_request,
        "self request raw_request",
        "`deterministic` beside OpenAI's parameters",
        _SWITCH,
        Policy.CLIENT,
    ),
    Hook(
        _CHAT + "_build_chat_response",
        AFTER,
        openai_answers.chat,
        "self request ret created",
        "the gate's record in chat completions",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _COMPLETION + "_build_completion_response",
        AFTER,
        openai_answers.completion,
        "self request ret created",
        "the gate's record in completions",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _CHAT + "_generate_chat_stream",
        AROUND,
        openai_answers.stream,
        "self adapted_request request raw_request",
        "the gate's record in the last chunk of a chat completion",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _COMPLETION + "_generate_completion_stream",
        AROUND,
        openai_answers.stream,
        "self adapted_request request raw_request",
        "the gate's record in the last chunk of a completion",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _MANAGER + "generate_request",
        AROUND,
        around_gated(firing.generate_request),
        "self obj request",
        "notes the record for the stream that is to carry it; the switch of the three routes below",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _RESPONSES + "create_responses",
        AROUND,
        responses_answers.create,
        "self request raw_request",
        "`deterministic` beside the parameters of /v1/responses",
        _SWITCH,
        Policy.CLIENT,
    ),
    Hook(
        _RESPONSES + "responses_full_generator",
        AROUND,
        responses_answers.answer,
        "self request sampling_params result_generator context model_name tokenizer "
        "request_metadata created_time require_reasoning output_items tool_adapter",
        "the gate's record in responses",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _RESPONSES + "responses_stream_generator_non_harmony",
        AROUND,
        responses_answers.stream,
        "self request sampling_params result_generator model_name tokenizer request_metadata "
        "created_time require_reasoning tool_adapter",
        "the gate's record in the last event of a response",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        "entrypoints.context.HarmonyContext._record_finish_reason",
        AFTER,
        responses_answers.harmony_output,
        "self meta_info",
        "the gate's record in responses of gpt-oss, whose contexts keep no output",
        _RECORD,
        Policy.CLIENT,
    ),
    Hook(
        _ANTHROPIC + "handle_messages",
        AROUND,
        anthropic_answers.handle,
        "self request raw_request",
        "`deterministic` beside Anthropic's parameters",
        _SWITCH,
        Policy.CLIENT,
    ),
    Hook(
        _ANTHROPIC + "_convert_response",
        AFTER,
        anthropic_answers.message,
        "self response",
        "the gate's record, and the stop sequence, in Anthropic's messages",
        "SGLang names stop sequences there, and puts customized info into the answers",
        Policy.CLIENT,
    ),
    Hook(
        _ANTHROPIC + "_generate_anthropic_stream",
        AROUND,
        anthropic_answers.stream,
        "self adapted_request processed_request anthropic_request raw_request",
        "the same in the last delta of a stream",
        "SGLang names stop sequences there, and puts customized info into the answers",
        Policy.CLIENT,
    ),
    Hook(
        _OLLAMA + "__init__",
        AFTER,
        ollama_answers.init,
        "self tokenizer_manager",
        "text of the last output of a stream; chat templates give ids",
        "a stream on Ollama's routes has all text, and /api/chat answers",
    ),
    Hook(
        _OLLAMA + "_convert_options_to_sampling_params",
        AFTER,
        ollama_answers.options,
        "self options",
        "`seed` and a negative `num_predict` in SGLang's terms",
        "SGLang serves both",
        Policy.CLIENT,
    ),
    *(
        Hook(
            _OLLAMA + name,
            AROUND,
            ollama_answers.handle,
            "self request raw_request",
            "HTTP 400 for what is refused; the switch, the gate's record and `done_reason`",
            "SGLang does it, and puts customized info into the answers",
            Policy.CLIENT,
        )
        for name in ("handle_chat", "handle_generate")
    ),
)

# Applied in the detokenizers of a gated server.
DETOKENIZER_HOOKS = (
    Hook(
        "managers.detokenizer_manager.DetokenizerManager._decode_batch_token_id_output",
        AROUND,
        detokenizer.decode,
        "self recv_obj",
        "text of several tokens at once that ends within a character is not sent twice",
        "SGLang's `sent_offset` never goes back",
        Policy.OBSERVE,
    ),
)
