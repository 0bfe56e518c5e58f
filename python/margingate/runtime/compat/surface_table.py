"""Attributes of SGLang's objects that the gate reads or writes, by class below sglang.srt.

`test/surface_scan.py` finds them in the source, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping

SURFACE: Mapping[str, str] = {
    "configs.model_config.ModelConfig": ""
    "attention_arch context_len has_attention_sinks hf_config hf_text_config hidden_size "
    "is_encoder_decoder is_generation is_hybrid_swa is_hybrid_swa_compress "
    "is_image_understandable_model is_multimodal model_is_mrope "
    "model_path quantization vocab_size",
    "constrained.base_grammar_backend.BaseGrammarObject": ""
    "accept_token allocate_vocab_mask apply_vocab_mask fill_vocab_mask finished is_terminated "
    "move_vocab_mask",
    "constrained.grammar_manager.GrammarManager": "grammar_queue",
    "distributed.parallel_state.GroupCoordinator": "all_reduce rank_in_group world_size",
    "entrypoints.context.SimpleContext": "last_output",
    "entrypoints.engine.SchedulerInitResult": "scheduler_infos",
    "layers.attention.triton_backend.ForwardMetadata": "kv_indices kv_indptr",
    "layers.attention.triton_backend.TritonAttnBackend": ""
    "dcp_size decode_attention_fwd device extend_attention_fwd forward_decode "
    "forward_extend forward_metadata get_num_kv_splits init_forward_metadata max_context_len "
    "max_kv_splits sliding_window_size use_mla",
    "layers.logits_processor.LogitsProcessor": ""
    "_compute_lm_head final_logit_softcapping logit_scale",
    "layers.logits_processor.LogitsProcessorOutput": "next_token_logits",
    "layers.logprob_processor.InputLogprobProcessor": "enable_fast_input_logprobs vocab_size",
    "layers.moe.topk.StandardTopKOutput": "router_logits topk_ids topk_weights",
    "layers.moe.topk.TopK": "layer_id topk_config",
    "layers.moe.topk.TopKConfig": ""
    "apply_routed_scaling_factor_on_output correction_bias custom_routing_function "
    "num_expert_group num_shared_topk_slots output_format renormalize routed_scaling_factor "
    "scoring_func top_k topk_group use_grouped_topk",
    "layers.quantization.fp8.Fp8LinearMethod": ""
    "use_marlin use_mxfp8 w8a8_block_fp8_linear weight_block_size",
    "layers.radix_attention.RadixAttention": ""
    "attn_type is_cross_attention k_scale k_scale_float layer_id logit_cap logit_capping_method "
    "qk_head_dim sliding_window_size tp_k_head_num tp_q_head_num tp_v_head_num v_head_dim "
    "v_scale_float xai_temperature_len",
    "managers.detokenizer_manager.DecodeStatus": "sent_offset",
    "managers.detokenizer_manager.DetokenizerManager": "decode_status",
    "managers.embed_types.PositionalEmbeds": "embeds",
    "managers.io_struct.AbortReq": "abort_all rid",
    "managers.io_struct.BatchTokenIDOutput": "rids",
    "managers.io_struct.GenerateReqInput": ""
    "custom_labels input_embeds input_ids mm_hashes multi_item_delimiter_indices "
    "positional_embed_overrides rid sampling_params "
    "session_params stream text token_indices_to_pool top_logprobs_num",
    "managers.io_struct.TokenizedGenerateReqInput": "rid sampling_params",
    "managers.overlap_utils.FutureMap": "output_tokens_buf",
    "managers.schedule_batch.MultimodalDataItem": ""
    "feature format hash is_image modality model_specific_data offsets pad_value padding_sequence "
    "precomputed_embeddings set_identity set_pad_value",
    "managers.schedule_batch.MultimodalInputs": ""
    "mm_items mrope_position_delta mrope_positions release_features",
    "managers.schedule_batch.Req": ""
    "_is_reasoning_over _think_end_match_len _think_start_match_len "
    "custom_logit_processor customized_info decode_batch_idx eos_token_ids extend_end "
    "extra_key finished finished_len finished_output finished_reason "
    "full_untruncated_fill_ids grammar inflight_middle_chunks input_embeds "
    "is_prefill_only is_retracted kv last_node logprob logprob_start_len lora_id "
    "multi_item_delimiter_indices multimodal_inputs origin_input_ids output_ids "
    "output_ids_through_stop "
    "positional_embed_overrides prefix_len reasoning_tokens retraction_count return_hidden_states "
    "return_logprob return_routed_experts return_sampling_mask rid routed_experts "
    "routed_experts_start_len sampling_params send_token_offset "
    "session set_finish_with_abort stream time_stats to_finish token_indices_to_pool "
    "tokenizer update_finish_state vocab_size weight_version_events",
    "managers.schedule_batch.ReqKvInfo": ""
    "cache_protected_len get_evicted_seqlen holds_kv "
    "kv_allocated_len kv_committed_len req_pool_idx",
    "managers.schedule_batch.ReqLogprob": ""
    "output_token_ids_logprobs_val output_token_logprobs_idx output_token_logprobs_val "
    "output_top_logprobs_idx output_top_logprobs_val token_ids_logprob top_logprobs_num",
    "managers.schedule_batch.ScheduleBatch": ""
    "batch_is_full batch_size filter_batch forward_mode is_empty is_prefill_only merge_batch "
    "multimodal_inputs prepare_for_extend release_req reqs return_logprob seq_lens_sum "
    "token_ids_logprobs",
    "managers.schedule_policy.PrefillAdder": ""
    "can_run_list chunked_req_limit cur_rem_tokens is_hybrid_swa "
    "memory_budget rem_chunk_tokens rem_total_tokens running_batch tree_cache",
    "managers.scheduler.Scheduler": ""
    "_add_request_to_queue _build_hisparse_decode_batch _engine_paused batch_result_processor "
    "chunked_req enable_overlap forward_ct future_map grammar_manager ipc_channels is_fully_idle "
    "last_batch max_req_len metrics_collector metrics_reporter model_config "
    "output_streamer process_batch_result req_to_token_pool result_queue running_batch "
    "server_args spec_algorithm token_to_kv_pool_allocator tp_cpu_group tp_worker "
    "tree_cache waiting_queue weight_updater",
    "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor": ""
    "_maybe_update_reasoning_tokens",
    "managers.scheduler_components.ipc_channels.SchedulerIpcChannels": ""
    "recv_from_rpc recv_from_tokenizer",
    "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter": ""
    "current_scheduler_metrics_enabled",
    "managers.scheduler_components.output_streamer.SchedulerOutputStreamer": "stream_output",
    "managers.scheduler_components.profiler_manager.SchedulerProfilerManager": ""
    "profile_by_stage profile_in_progress profiler_start_forward_ct profiler_target_forward_ct "
    "rpd_profiler torch_profiler",
    "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": ""
    "_session offload_tags",
    "managers.tokenizer_manager.TokenizerManager": ""
    "metrics_collector model_config rid_to_state sampling_params_class server_args",
    "managers.tp_worker.TpModelWorker": "forward_batch_generation model_runner",
    "managers.utils.GenerationBatchResult": ""
    "can_run_cuda_graph copy_done logits_output next_token_ids",
    "mem_cache.allocator.token.TokenToKVPoolAllocator": ""
    "alloc available_size free_group free_pages free_segment get_kvcache release_pages "
    "size",
    "mem_cache.allocator.swa.SWATokenToKVPoolAllocator": ""
    "full_attn_allocator full_available_size get_kvcache size_full size_swa swa_attn_allocator "
    "swa_available_size swa_free_group swa_page_ids_group",
    "mem_cache.swa_memory_pool.SWAKVPool": ""
    "full_kv_pool full_to_swa_index_mapping layers_mapping size size_swa swa_kv_pool "
    "translate_loc_from_full_to_swa",
    "mem_cache.unified_radix_cache.UnifiedRadixCache": ""
    "all_values_flatten lock sliding_window_size swa_evictable_size swa_protected_size unlock",
    "mem_cache.base_prefix_cache.MatchPrefixParams": "key req",
    "mem_cache.base_prefix_cache.MatchResult": "device_prefix_len",
    "mem_cache.kv_index_translator.KVIndexTranslator": "own_plan",
    "mem_cache.memory_pool.MHATokenToKVPool": ""
    "get_key_buffer get_kv_buffer get_value_buffer layer_num set_kv_buffer size start_layer "
    "store_dtype",
    "mem_cache.memory_pool.ReqToTokenPool": "available_size req_to_token size write",
    "mem_cache.radix_cache.RadixCache": ""
    "evict evictable_size protected_size req_to_token_pool root_node",
    "mem_cache.radix_cache.TreeNode": "children value",
    "model_executor.cuda_graph_config.CudaGraphConfig": "decode prefill",
    "model_executor.forward_batch_info.ForwardBatch": ""
    "batch_size extend_prefix_lens extend_seq_lens extend_seq_lens_cpu "
    "forward_mode input_ids mrope_positions "
    "out_cache_loc positions req_pool_indices return_logprob sampling_info seq_lens seq_lens_cpu "
    "seq_lens_sum",
    "model_executor.forward_batch_info.ForwardMode": "is_decode is_extend",
    "model_executor.model_runner.ModelRunner": ""
    "attn_backend decode_cuda_graph_runner device dtype graph_shared_output "
    "init_new_workspace is_draft_worker kv_cache_dtype kv_index_translator model "
    "model_config req_to_token_pool server_args shared_read_done_event token_to_kv_pool",
    "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner": ""
    "attn_backend backend bs can_run_graph capture_bs disable_padding execute max_bs",
    "observability.metrics_collector.SchedulerMetricsCollector": "labels",
    "observability.req_time_stats.SchedulerReqTimeStats": "set_completion_time",
    "runtime_context.RuntimeContext": "config_bag config_leaf server_args",
    "sampling.sampling_batch_info.SamplingBatchInfo": ""
    "is_all_greedy min_ps return_sampling_masks sampling_seed temperatures top_ks top_ps",
    "sampling.sampling_params.SamplingParams": ""
    "custom_params frequency_penalty logit_bias max_new_tokens min_new_tokens min_p n "
    "presence_penalty repetition_penalty sampling_seed stop_token_ids temperature top_k top_p",
    "state_capturer.base.BaseDeviceCache": "buffer",
    "state_capturer.base.TopkCaptureOutput": "finalize map_device_tensors",
    "state_capturer.routed_experts.RoutedExpertsCapturer": ""
    "device_cache get_topk host_cache topk_size",
    "server_args.ServerArgs": ""
    "_resolution_finished attention_backend boundary_reduction chat_template chunked_prefill_size "
    "cpu_offload_gb cuda_graph_backend_prefill cuda_graph_config "
    "decode_attention_backend debug_tensor_dump_output_folder "
    "decoupled_spec_role device disable_hybrid_swa_memory disable_radix_cache "
    "disaggregation_mode dp_size enable_flashinfer_allreduce_fusion "
    "enable_fp32_lm_head enable_return_hidden_states enable_return_routed_experts "
    "enable_torch_compile expert_distribution_recorder_mode "
    "flashinfer_allreduce_fusion_backend grammar_backend grpc_mode init_expert_location "
    "kv_cache_dtype kv_canary load_format max_prefill_tokens max_running_requests model_path "
    "moe_a2a_backend moe_runner_backend nnodes node_rank offload_group_size page_size "
    "prefill_attention_backend preferred_sampling_params radix_cache_backend "
    "random_seed radix_eviction_policy return_hidden_states_mode revision "
    "smg_grpc_mode startup_weight_load_mode swa_full_tokens_ratio tokenizer_path tp_size "
    "weight_cache_mode",
}
