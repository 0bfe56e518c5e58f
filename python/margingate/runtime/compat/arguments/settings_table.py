"""Every field of SGLang's ServerArgs: in the fingerprint, refused or without effect, and why.

A name is in one place only; a test holds the table against ServerArgs. A field that is not here was
looked at by nobody: `unseen` names it, and the start is refused where it is not at its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from margingate.runtime.compat.release import absent, of_release

_Group = Mapping[str, str]  # reason -> names, separated by spaces

# The probe is measured anew where one of these differs, and the fingerprint is another.
ARITHMETIC: _Group = {
    "which kernels run experts": "disable_shared_experts_fusion enforce_shared_experts_fusion",
    "the type of weights and columns": "dtype quantization kv_cache_dtype enable_fp32_lm_head",
    "which matmul runs": "enable_tf32_matmul bf16_gemm_backend fp8_gemm_runner_backend",
    "the code of the model": "model_impl json_model_override_args",
    "how attention cuts and sums": "triton_attention_reduce_in_fp32 triton_attention_num_kv_splits "
    "triton_attention_split_tile_size",
    "which all-reduce runs": "nnodes disable_custom_all_reduce enable_p2p_check",
    "which kernels a measurement of times picks": "disable_flashinfer_autotune "
    "flashinfer_autotune_skip_ops",
}

# In the fingerprint alone.
COUNTED: _Group = {
    "which forwards replay graphs": "disable_cuda_graph disable_prefill_cuda_graph "
    "disable_decode_cuda_graph cuda_graph_backend_prefill cuda_graph_backend_decode "
    "cuda_graph_bs_prefill cuda_graph_max_seq_len_prefill disable_cuda_graph_padding "
    "debug_cuda_graph",
    "how a prompt becomes token ids": "tokenizer_mode tokenizer_backend skip_tokenizer_init "
    "trust_remote_code model_config_parser enable_dynamic_batch_tokenizer "
    "enable_tokenizer_batch_encode chat_template hf_chat_template_name completion_template "
    "default_chat_template_kwargs trust_request_chat_template decrypted_config_file",
    "what a request is taken to ask for": "context_length sampling_defaults "
    "preferred_sampling_params allow_auto_truncate enable_strict_thinking tool_server enable_mis "
    "enable_response_store",
    "which tokens a grammar allows": "grammar_backend constrained_json_whitespace_pattern "
    "constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt",
    "how an answer is read or written": "reasoning_parser tool_call_parser "
    "disable_tokenizer_batch_decode",
    "how a token is drawn": "sampling_backend",
    "how an image becomes patches, and these an embedding": "mm_process_config "
    "disable_fast_image_processor image_processor_backend mm_attention_backend "
    "mm_enable_dp_encoder",
    "of parts that the gate does not serve; counted, since nobody measured that it has no effect "
    "on the others": "flashinfer_mxfp4_moe_precision "
    "disable_chunked_prefix_cache flashinfer_mla_disable_ragged enable_scattered_sconv "
    "fp4_gemm_runner_backend enable_multimodal language_only language_model_only "
    "enable_precise_embedding_interpolation",
}

# In the fingerprint by another part than `arguments`.
ELSEWHERE: _Group = {
    "`files`: what is in the folder": "model_path tokenizer_path revision",
    "`weights`: as they lie in memory, however they came there": "load_format "
    "model_loader_extra_config custom_weight_loader weight_cache_mode modelexpress_config "
    "modelopt_checkpoint_restore_path",
    "`machine`": "device tp_size attention_backend prefill_attention_backend "
    "decode_attention_backend",
    "`plan`: the rows of a verify pass and of its graph; others are canonical or verified": ""
    "cuda_graph_config cuda_graph_max_bs_decode cuda_graph_bs_decode cuda_graph_max_bs_prefill",
}

# By refused_settings.py where they are not what the gate was measured with.
REFUSED: _Group = {
    "draft tokens": "speculative_algorithm decoupled_spec_role",
    "requests spread over ranks or processes": "pp_size enable_dp_attention dcp_size "
    "attn_cp_size moe_dp_size dwdp_size moe_dense_tp_size enable_dp_lm_head enable_prefill_cp "
    "enable_cp_decode_attn_tp attn_dp_size enable_tp_lm_head_all_to_all enable_dense_mlp_attn_tp "
    "enable_attn_tp_input_scattered disaggregation_mode elastic_ep_backend use_ray "
    "tokenizer_worker_num smg_grpc_mode grpc_mode encoder_only",
    "experts spread over ranks, or run in other ways": "moe_a2a_backend ep_size enable_eplb "
    "ep_num_redundant_experts init_expert_location enable_single_batch_overlap "
    "enable_paged_experts moe_runner_backend",
    "sums that go around the hook on all-reduce, or run in another way than measured": ""
    "enable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend "
    "enable_aiter_allreduce_fusion enable_fused_moe_sum_all_reduce enable_symm_mem enable_mscclpp "
    "enable_torch_symm_mem enable_nccl_nvls enable_quant_communications boundary_reduction "
    "enable_layernorm_sp",
    "batches made or run in other ways": "enable_two_batch_overlap enable_pdmux enable_mixed_chunk "
    "dllm_algorithm enable_torch_compile",
    "columns kept in other ways": "enable_hierarchical_cache enable_lmcache enable_flexkv "
    "enable_hisparse enable_unified_memory enable_page_major_kv_layout strip_thinking_cache "
    "kv_canary page_size enable_streaming_session enable_session_radix_cache "
    "prefill_only_disable_kv_cache radix_cache_backend quantization_param_path "
    "enable_kv_cache_sharding enable_unified_cache_external_linker",
    "weights kept in other ways": "enable_lora modelopt_quant quantize_and_serve "
    "rl_quant_profile cpu_offload_gb offload_group_size kt_weight_path "
    "startup_weight_load_mode",
    "other kernels than those measured": "enable_fused_qk_norm_rope forward_hooks "
    "debug_tensor_dump_output_folder debug_tensor_dump_input_file msprobe_dump_config "
    "enable_lean_attention enable_amd_monokernel enable_nvidia_megakernel",
    "what a rollback cannot undo": "enable_return_indexer_topk enable_return_hidden_states "
    "return_hidden_states_mode enable_return_aux_hidden_states",
    "draws that are not the gate's": "enable_watermark",
    "embeddings that others made, or of what a client says": "trust_mm_content_hashes "
    "enable_mm_global_cache",
    "nothing to gate": "is_embedding enable_deterministic_inference rl_on_policy_target",
}

# Neither counted nor refused.
NO_EFFECT: _Group = {
    "when a forward runs and what shares it, which the gate makes answers independent of": ""
    "mem_fraction_static max_queued_requests max_total_tokens "
    "chunked_prefill_size enable_dynamic_chunking max_prefill_tokens prefill_max_requests "
    "schedule_policy enable_priority_scheduling disable_priority_preemption default_priority_value "
    "abort_on_priority_when_disabled schedule_low_priority_values_first retraction_policy "
    "priority_scheduling_preemption_threshold schedule_conservativeness radix_eviction_policy "
    "disable_radix_cache disable_overlap_schedule scheduler_recv_interval enable_prefill_delayer "
    "prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark "
    "prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets "
    "prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms min_free_slots_delay "
    "load_balance_method num_reserved_decode_tokens prefill_decode_interval "
    "prefill_decode_interval_min_bs radix_eviction_policy_config "
    "_radix_eviction_policy_explicitly_set",
    "when a forward runs; where it lowers --gate-rows, the plan says so": "max_running_requests",
    "which replica serves; all have one fingerprint, or there is no start": "dp_size",
    "the gate sets it where there is to be one K/V pool": "disable_hybrid_swa_memory",
    "SGLang reads it for draft models alone, or nowhere": "num_continuous_decode_steps",
    "where processes run and find each other": "nccl_port dist_timeout dist_init_addr node_rank "
    "base_gpu_id gpu_id_step numa_node host port fastapi_root_path grpc_port sidecar sidecar_args "
    "enable_http2 ssl_keyfile ssl_certfile ssl_ca_certs ssl_keyfile_password enable_ssl_refresh "
    "pre_warm_nccl detokenizer_worker_num engine_info_bootstrap_port gc_threshold sleep_on_idle "
    "enable_dp_attention_local_control_broadcast grpc_worker_threads grpc_response_timeout_secs "
    "http2_max_concurrent_streams http2_initial_connection_window_size "
    "enable_http_worker_reuseport",
    "who may ask, and what names are given": "api_key admin_api_key served_model_name "
    "weight_version file_storage_path",
    "how an answer is cut into chunks, and what is said beside it": "stream_interval "
    "batch_notify_size stream_response_default_include_usage incremental_streaming_output "
    "enable_cache_report return_input_ids return_output_ids enable_return_routed_experts",
    "logs, metrics and traces": "log_level log_level_http log_requests log_requests_level "
    "log_requests_format log_requests_target uvicorn_access_log_exclude_prefixes crash_dump_folder "
    "show_time_cost enable_metrics smg_http_sidecar_port enable_mfu_metrics "
    "enable_metrics_for_all_schedulers load_snapshot_publish_interval extra_metric_labels "
    "tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels "
    "bucket_time_to_first_token bucket_inter_token_latency bucket_e2e_request_latency "
    "prompt_tokens_buckets generation_tokens_buckets gc_warning_threshold_secs decode_log_interval "
    "enable_request_time_stats_logging kv_events_config enable_forward_pass_metrics "
    "forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace trace_modules "
    "otlp_traces_endpoint export_metrics_to_file export_metrics_to_file_dir stat_loggers "
    "enable_layerwise_nvtx_marker enable_profile_cuda_graph debug_tensor_dump_layers "
    "expert_distribution_recorder_mode expert_distribution_recorder_buffer_size "
    "expert_balancedness_report_mode otlp_service_name load_publish_endpoint",
    "start, warm-up, watching and the end of processes": "watchdog_timeout soft_watchdog_timeout "
    "custom_sigquit_handler skip_server_warmup warmups enable_cudagraph_gc enable_memory_saver "
    "checkpoint_engine_wait_weights_before_ready disable_outlines_disk_cache gated_launch_port",
    "how weights are fetched; the fingerprint reads them in memory": "weight_loader_disable_mmap "
    "weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads download_dir "
    "weight_loader_drop_cache_after_load remote_instance_weight_loader_seed_instance_ip "
    "remote_instance_weight_loader_seed_instance_service_port model_checksum "
    "remote_instance_weight_loader_send_weights_group_ports delete_ckpt_after_loading "
    "remote_instance_weight_loader_backend weight_cache_socket weight_cache_timeout "
    "remote_instance_weight_loader_start_seed_via_transfer_engine enable_weights_cpu_backup "
    "modelopt_checkpoint_save_path modelopt_export_path",
    "the gate draws with the seed of the request": "random_seed",
    "what a request may ask for, and such requests are refused or not gated": ""
    "enable_custom_logit_processor sampling_mask_max_tokens",
    "the gate sets it where SGLang would choose a fused all-reduce by itself": ""
    "enforce_disable_flashinfer_allreduce_fusion",
    "of --speculative-algorithm, which is refused": "speculative_draft_model_path "
    "speculative_draft_model_revision speculative_draft_load_format speculative_num_steps "
    "speculative_eagle_topk speculative_num_draft_tokens speculative_dflash_block_size "
    "speculative_dspark_block_size speculative_dspark_sps_table_path "
    "speculative_dspark_confidence_sts_path speculative_accept_threshold_single "
    "speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_acc "
    "speculative_use_rejection_sampling speculative_token_map speculative_attention_mode "
    "speculative_draft_attention_backend speculative_draft_window_size speculative_adaptive "
    "speculative_moe_runner_backend speculative_moe_a2a_backend speculative_adaptive_config "
    "speculative_draft_model_quantization enable_multi_layer_eagle uno_lora_path "
    "decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank "
    "spec_trace_dir speculative_ngram_min_bfs_breadth speculative_ngram_max_bfs_breadth "
    "speculative_ngram_match_type speculative_ngram_max_trie_depth speculative_ngram_capacity "
    "speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget "
    "speculative_ngram_external_corpus_max_tokens enable_draft_weights_cpu_backup "
    "decrypted_draft_config_file speculative_dsa_topk_backend speculative_draft_kv_cache_dtype "
    "speculative_enable_w4a4_mxfp4_megamoe _speculative_draft_quantization_explicitly_set "
    "speculative_domino_candidate_pool_size speculative_boundary_reduction "
    "speculative_use_block_verification speculative_draft_sink_size",
    "of --enable-lora, which is refused": "enable_lora_overlap_loading max_lora_rank "
    "lora_target_modules lora_paths max_loaded_loras max_loras_per_batch lora_eviction_policy "
    "lora_backend max_lora_chunk_size experts_shared_outer_loras lora_use_virtual_experts "
    "lora_strict_loading lora_drain_wait_threshold",
    "of --pp-size, --dcp-size and context parallelism, which are refused": ""
    "pp_max_micro_batch_size pp_async_batch_depth dcp_comm_backend dcp_replicate_q_proj "
    "cp_strategy enable_dsa_cache_layer_split enable_cp_tp_group_sharing "
    "disable_attn_tp_gather",
    "of --disaggregation-mode and --encoder-only, which are refused": ""
    "disaggregation_transfer_backend disaggregation_bootstrap_port disaggregation_ib_device "
    "disaggregation_decode_enable_radix_cache disaggregation_decode_enable_offload_kvcache "
    "disaggregation_decode_extra_slots disaggregation_decode_polling_interval "
    "optimistic_prefill_attempts encoder_transfer_backend encoder_urls encoder_bootstrap_port "
    "encoder_register_urls enable_adaptive_dispatch_to_encoder "
    "disaggregation_decode_retraction_backup disaggregation_enable_kv_checksum "
    "enable_pd_role_switch disaggregation_decode_host_receive_threshold "
    "disaggregation_decode_allocation_policy",
    "of caches that are refused": "hicache_ratio hicache_size hicache_write_policy "
    "hicache_io_backend hicache_mem_layout hicache_storage_backend hisparse_config "
    "hicache_storage_prefetch_policy hicache_storage_backend_extra_config lmcache_config_file "
    "flexkv_config_file kv_canary_real_data kv_canary_sweep_interval hicache_host_memory_mode "
    "hicache_storage_prefetch_retry_poll_interval hicache_storage_prefetch_retry_max_attempts "
    "hicache_host_memory_fraction unified_cache_external_linker_backend "
    "unified_cache_external_linker_config enable_linker_mla_dedup",
    "of another option that is refused": "disable_aiter_allreduce_fusion_in_prefill "
    "disable_aiter_allreduce_fusion_in_decode enable_megamoe_for_layernorm_sp watermark_config "
    "watermark_key watermark_key_b watermark_context_window watermark_mixing_probability "
    "watermark_max_probability watermark_default_enabled watermark_enforce_all "
    "aux_hidden_state_capture return_aux_hidden_state_layer_ids prefill_kv_cache_dequant_dtype "
    "tbo_token_distribution_threshold dllm_algorithm_config "
    "dllm_fdfo pdmux_config_path sm_group_num torch_compile_max_bs "
    "enable_torch_compile_debug_mode offload_num_in_group offload_prefetch_step offload_mode "
    "kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts "
    "kt_max_deferred_experts_per_token enable_elastic_expert_backup mooncake_ib_device "
    "ep_join_mode ep_join_rank_offset "
    "elastic_ep_initial_size max_ep_size elastic_ep_scale_timeout",
    "of experts spread over ranks, which are refused": "deepep_mode fuseep_mode "
    "deepep_dispatcher_output_dtype ep_dispatch_algorithm "
    "eplb_algorithm eplb_rebalance_num_iterations "
    "eplb_rebalance_layers_per_chunk eplb_min_rebalancing_utilization_threshold deepep_config "
    "enable_waterfill disable_flashinfer_cutlass_moe_fp4_allgather enable_shared_experts_attn_tp "
    "shared_experts_tp_size enable_w4a4_mxfp4_megamoe deepep_v2_mode flashinfer_a2a_dispatch_type "
    "paged_experts_num_resident",
    "of attention with a state, a window or an index, models with which are refused": ""
    "swa_full_tokens_ratio dsa_prefill_backend dsa_decode_backend "
    "dsa_paged_mqa_logits_backend dsa_topk_backend mamba_backend enable_deepseek_v4_fp4_indexer "
    "max_mamba_cache_size mamba_ssm_dtype mamba_max_states_per_path mamba_cache_philox_rounds "
    "enable_mamba_cache_stochastic_rounding mamba_full_memory_ratio mamba_radix_cache_strategy "
    "uses_mamba_radix_cache mamba_track_interval enable_int8_mamba_checkpoint "
    "int8_mamba_ckpt_size linear_attn_backend linear_attn_decode_backend "
    "linear_attn_prefill_backend linear_attn_verify_backend enable_linear_replayssm "
    "linear_replayssm_cache_len enable_linear_replayssm_spec dsv4_prefill_backend "
    "dsv4_attn_backend cuda_graph_prefill_max_context _swa_full_tokens_ratio_explicitly_set "
    "swa_prefix_tails enable_encoder_swa_bounded_replay enable_decoder_swa_bounded_replay "
    "qsa_indexer_dtype dsa_triton_union enable_dsa_fused_indexer ple_offload_embedding "
    "ple_offload_backend ple_offload_dir c128_page_size",
    "how media travel, and which are refused": "enable_broadcast_mm_inputs_process "
    "mm_processor_worker_num mm_io_worker_num limit_mm_data_per_request mm_feature_transport "
    "allowed_media_domains media_url_max_file_size_mb mm_preprocess_cache_size_mb",
    "of sound, requests with which are not gated": "asr_max_buffer_seconds "
    "asr_max_concurrent_sessions",
    "of encoders that are servers of their own, and of options that are refused": ""
    "enable_prefix_mm_cache mm_global_cache_backend",
    "of MLX, on whose devices no attention backend is served": "mlx_enable_sampling",
    "of --enable-dynamic-batch-tokenizer, which is counted": "dynamic_batch_tokenizer_batch_size "
    "dynamic_batch_tokenizer_batch_timeout",
}

GROUPS = {
    "arithmetic": ARITHMETIC,
    "counted": COUNTED,
    "elsewhere": ELSEWHERE,
    "refused": REFUSED,
    "no effect": NO_EFFECT,
}


# Fields that this release has not, and that the newest has not: for each why it may have any value.
ABSENT = absent("ServerArgs")
GONE: Mapping[str, str] = of_release("GONE", {})


def names(*groups: _Group) -> tuple[str, ...]:
    """The fields in these groups that this release has, in the order of the table."""
    listed = " ".join(each for group in groups for each in group.values()).split()
    return tuple(name for name in listed if name not in ABSENT)


def rows(groups: Mapping[str, _Group]) -> Iterator[tuple[str, str, str]]:
    """(field, group, reason) of every field that this release has."""
    for kind, group in groups.items():
        for reason, listed in group.items():
            yield from ((name, kind, reason) for name in listed.split() if name not in ABSENT)


def values(args: Any, chosen: Iterable[str]) -> dict[str, Any]:
    """These fields by name, builtins and texts only; None where `args` has no such field."""
    return {name: _plain(getattr(args, name, None)) for name in chosen}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def defaults(kind: Any) -> dict[str, Any]:
    """Each field of ServerArgs with its default; a field that must be given is absent."""
    found = {}
    for field in msgspec.structs.fields(kind):
        if field.default is not msgspec.NODEFAULT:
            found[field.name] = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            found[field.name] = field.default_factory()
    return found


def unseen(args: Any, known: frozenset[str] | None = None, kind: Any = None) -> list[str]:
    """Fields of a class of arguments that are not in the table and not at their default.

    Args:
        args: ServerArgs, or a view of them.
        known: the fields that are in the table; None: those of the table.
        kind: of `args`, which a view does not say; None: SGLang's ServerArgs.
    """
    from sglang.srt.server_args import ServerArgs

    kind, known = kind or ServerArgs, KNOWN if known is None else known
    defaulted = defaults(kind)
    new = [name for name in kind.__struct_fields__ if name not in known]
    return [n for n in new if n not in defaulted or getattr(args, n) != defaulted[n]]


KNOWN = frozenset(names(*GROUPS.values())) | GONE.keys()
