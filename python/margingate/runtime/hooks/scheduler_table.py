"""Every patch of a gated scheduler, a row each.

A row without a policy is FATAL: no request's content can make it raise, and what followed could not
be trusted. `adjusted_merge_batch` and `adjusted_filter_batch` move rows that another hook made,
and a seed at another's row would be a wrong answer. `is_fully_idle` counts two lists; without it
SGLang would flush slots that held requests own. `get_init_info` runs at start. The weight updates
are an operator's; a fingerprint that missed one would be wrong from then on. `_get_logits` keeps
what `--gate-study` reads, in a forward whose requests it does not see. An image that was encoded
with others would stay in SGLang's cache; the two hooks on towers see shapes of tensors alone.
"""

from __future__ import annotations

from margingate.runtime.compat.compute import marlin
from margingate.runtime.compat.model import images
from margingate.runtime.hooks import handlers
from margingate.runtime.hooks.admin_table import ADMIN_HOOKS
from margingate.runtime.hooks.path_table import INVARIANT_HOOKS, ROUTER_HOOKS, STOCK_HOOKS
from margingate.runtime.hooks.registry import AFTER, AROUND, BEFORE, Hook
from margingate.runtime.observe import study
from margingate.runtime.request import forward_record
from margingate.runtime.request.guard import Policy
from margingate.runtime.sampling import logprobs, sampler, seeds
from margingate.runtime.schedule import prefill_admission

_SCHEDULER = "managers.scheduler.Scheduler."
_SAMPLING = "sampling.sampling_batch_info.SamplingBatchInfo."
_OPTIONS = "SGLang lets plugins declare arguments"
_CALLBACK = "SGLang offers plugins a callback here"

# Applied in the schedulers of a gated server.
RUNTIME_HOOKS = (
    Hook(
        "managers.schedule_batch.Req.__init__",
        AFTER,
        handlers.request_init,
        None,
        "per-request switch, refusals and radix namespace",
        _CALLBACK,
        Policy.REQUEST,
    ),
    Hook(
        _SCHEDULER + "_add_request_to_queue",
        BEFORE,
        handlers.add_request,
        "self req is_retracted",
        "HTTP 400 for what the gate cannot serve, and for ids outside the vocabulary",
        "SGLang checks input ids itself and lets plugins refuse a request",
        Policy.REQUEST,
    ),
    Hook(
        "managers.schedule_policy.PrefillAdder.add_one_req",
        AROUND,
        handlers.add_one_req,
        "self req has_chunked_req truncation_align_size",
        "a gated prompt is prefilled alone, on the grid, where its bits depend on company",
        "prefill is batch-invariant",
        Policy.REQUEST,
        prefill_admission.refuse_failed,
    ),
    Hook(
        "managers.schedule_policy.PrefillAdder.add_chunked_req",
        AROUND,
        handlers.add_chunked_req,
        "self req",
        "a gated chunk is never shrunk, where its bits depend on that",
        "prefill is batch-invariant",
        Policy.REQUEST,
    ),
    Hook(
        "layers.sampler.Sampler._preprocess_logits",
        AFTER,
        handlers.after_preprocess,
        "self logits sampling_info",
        "tokens and margins from the final logits; SGLang need not rank a greedy batch's again",
        "the sampler returns margins",
        Policy.FORWARD,
    ),
    Hook(
        "layers.quantization.marlin_utils.should_use_atomic_add_reduce",
        AFTER,
        marlin.without_atomic_adds,
        "m n k device dtype",
        "layers in AWQ and GPTQ add their partial sums in one order",
        "SGLang's Marlin kernels use no atomic adds",
    ),
    Hook(
        "managers.mm_schedule._batch_encode_per_image_misses",
        AROUND,
        images.encode_alone,
        "data_embedding_func per_image_requests device",
        "each image has a forward of the tower to itself",
        "SGLang encodes images one by one",
    ),
    Hook(
        "layers.attention.vision.apply_rotary_pos_emb",
        AROUND,
        images.rotate,
        "q k cos sin unsqueeze_dim",
        "what torch.compile makes of the tower's rotation depends on the images before",
        "SGLang does not compile it",
    ),
    Hook(
        "model_executor.model_runner.ModelRunner.sample",
        AROUND,
        handlers.sample,
        "self logits_output forward_batch",
        "the result carries margins; ties go to the lowest id; draws with a seed are the gate's",
        "the sampler returns margins",
        Policy.FORWARD,
        sampler.sample_unseeded,
    ),
    Hook(
        "layers.logprob_processor.OutputLogprobProcessor.compute_logprobs",
        AROUND,
        handlers.compute_logprobs,
        "self logprobs top_logprobs_nums token_ids_logprobs batch_next_token_ids",
        "log-probs have the same bits whether or not the batch samples; given tokens' by request",
        "SGLang computes them in one way",
        Policy.FORWARD,
        handlers.logprobs_failed,
    ),
    Hook(
        "layers.logprob_processor.InputLogprobProcessor.forward",
        AROUND,
        logprobs.of_a_prompt,
        "self pruned_states sample_indices input_logprob_indices token_to_seq_idx lm_head "
        "get_logits_fn logits_metadata skip_chunking_for_dp_attn",
        "a prompt's log-probs are summed from the same place in memory in any row",
        "torch's log_softmax does not depend on where a row begins",
        Policy.FORWARD,
    ),
    Hook(
        "layers.logprob_processor.get_top_logprobs_raw",
        AROUND,
        logprobs.rank,
        "logprobs top_logprobs_nums stage extend_logprob_pruned_lens_cpu no_copy_to_cpu",
        "a row's most likely tokens do not depend on how many others want; lowest id among equals",
        "SGLang ranks equals in one order, whatever k",
        Policy.FORWARD,
    ),
    Hook(
        "layers.logprob_processor.get_top_logprobs_chunk",
        AROUND,
        logprobs.rank,
        "logprobs top_k_nums pruned_lens top_logprobs_val top_logprobs_idx split_pruned_len "
        "log_normalizer precomputed_topk copy_to_pinned_cpu",
        "the same for the tokens of a prompt",
        "SGLang ranks equals in one order, whatever k",
        Policy.FORWARD,
    ),
    Hook(
        "mem_cache.memory_pool.ReqToTokenPool.free",
        BEFORE,
        handlers.before_free,
        "self req",
        "K/V columns of a finished request are digested for an audit, or compared by --gate-study",
        _CALLBACK,
        Policy.OBSERVE,
    ),
    Hook(
        _SAMPLING + "adjusted_from_schedule_batch",
        AFTER,
        seeds.from_schedule_batch,
        "self batch vocab_size",
        "the seeds of gated requests that sample",
        _CALLBACK,
        Policy.BATCH,
    ),
    Hook(
        _SAMPLING + "adjusted_merge_batch",
        AFTER,
        seeds.merge_batch,
        "self other",
        "a batch with seeds joins one without",
        _CALLBACK,
    ),
    Hook(
        _SAMPLING + "adjusted_filter_batch",
        AFTER,
        seeds.filter_batch,
        "self keep_indices keep_indices_device",
        "a batch without seeds does no work for them",
        _CALLBACK,
    ),
    Hook(
        "managers.utils.GenerationBatchResult.copy_to_cpu",
        BEFORE,
        forward_record.before_copy,
        "self return_logprob return_hidden_states",
        "with overlap, margins come to the CPU with the token ids, behind the same event",
        "the sampler returns margins",
        Policy.FORWARD,
    ),
    Hook(
        _SCHEDULER + "process_batch_result",
        AROUND,
        handlers.process_batch_result,
        "self batch result",
        "margins in, verification after the commit, settled tokens out",
        _CALLBACK,
        Policy.BATCH,
        handlers.process_failed,
    ),
    Hook(
        _SCHEDULER + "get_next_batch_to_run",
        AROUND,
        handlers.get_next_batch_to_run,
        "self running_batch last_batch",
        "stopped requests leave the batch while their rows are pending",
        _CALLBACK,
        Policy.BATCH,
        handlers.next_batch_failed,
    ),
    Hook(
        "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        AROUND,
        handlers.stream_output,
        "self reqs return_logprob skip_req",
        "nothing past the settled length leaves the scheduler",
        "requests carry a number of settled tokens",
        Policy.BATCH,
        handlers.stream_failed,
    ),
    Hook(
        "managers.schedule_batch.release_req",
        AROUND,
        handlers.release_req,
        "req remaing_req_count req_to_token_pool token_to_kv_pool_allocator "
        "tree_cache hisparse_coordinator offload_kv",
        "a retracted request keeps its settled tokens; only its prompt is prefilled again",
        "retraction can replay decoded columns",
        Policy.REQUEST,
    ),
    Hook(
        _SCHEDULER + "is_fully_idle",
        AFTER,
        handlers.is_fully_idle,
        "self for_health_check ...",
        "held requests own slots",
        _CALLBACK,
    ),
    Hook(
        _SCHEDULER + "on_idle",
        AFTER,
        handlers.on_idle,
        "self",
        "forgets requests that vanished from SGLang's queues; audits",
        _CALLBACK,
        Policy.OBSERVE,
    ),
    Hook(
        _SCHEDULER + "abort_request",
        AROUND,
        handlers.abort_request,
        "self recv_req",
        "an abort ends one id, not all that begin with it; SGLang does not know held requests",
        "SGLang compares whole ids and offers plugins a callback here",
        Policy.OBSERVE,
        handlers.abort_failed,
    ),
    Hook(
        _SCHEDULER + "pause_generation",
        BEFORE,
        handlers.pause_generation,
        "self recv_req",
        "no row waits across a pause or a weight update",
        _CALLBACK,
        Policy.OPEN,
    ),
    Hook(
        _SCHEDULER + "get_internal_state",
        AFTER,
        handlers.internal_state,
        "self recv_req",
        "counters in /server_info",
        "SGLang lets plugins add to it",
        Policy.OBSERVE,
    ),
    Hook(
        _SCHEDULER + "get_init_info",
        AFTER,
        handlers.init_info,
        "self",
        "tells the launcher that the gate is up",
        "a failing plugin ends the server by itself",
    ),
    Hook(
        _SCHEDULER + "record_weight_version_change",
        BEFORE,
        handlers.weight_version_change,
        "self new_version",
        "SGLang notes versions by output, and that of a retracted request is kept apart",
        "SGLang lets plugins keep output of a retracted request",
        Policy.OBSERVE,
    ),
    *ADMIN_HOOKS,
)

# Applied, besides, with --gate-study.
STUDY_HOOKS = (
    Hook(
        "layers.logits_processor.LogitsProcessor._get_logits",
        BEFORE,
        study.keep_states,
        "self hidden_states lm_head logits_metadata embedding_bias use_logits_buffer",
        "margins of exact products need the final hidden states, within decode graphs too",
        "SGLang returns hidden states with each step at no other change",
    ),
)
SCHEDULER_HOOKS = (
    *RUNTIME_HOOKS,
    *INVARIANT_HOOKS,
    *STOCK_HOOKS,
    *ROUTER_HOOKS,
    *STUDY_HOOKS,
)
