"""Settings of SGLang that the gate cannot be combined with, a row each, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from margingate.runtime.compat.release import of_release

# Of these fields, which newer releases have, this one has none.
ABSENT: frozenset[str] = of_release("ABSENT", frozenset())


@dataclass(frozen=True)
class Refusal:
    """A server setting that cannot be combined with the gate."""

    applies: Callable[[Any], bool]
    option: str
    because: str
    instead: str


def _on(name: str) -> Callable[[Any], bool]:
    return lambda args: name not in ABSENT and bool(getattr(args, name))


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name) or 1) > 1


def _prefill_graphs(args: Any) -> bool:
    """Whether prefill graphs are of a kind that the gate was not tried with."""
    chosen = getattr(args.cuda_graph_config, "prefill", None)  # of resolved arguments
    backend = getattr(chosen, "backend", args.cuda_graph_backend_prefill)
    return backend not in (None, "breakable", "disabled")


def _other_columns(args: Any) -> bool:
    """Against the type of the model they are checked once that is known."""
    return args.kv_cache_dtype not in (
        "auto",
        "bf16",
        "bfloat16",
    )


def _fused_all_reduce(args: Any) -> bool:
    """Asked for; what SGLang switches on by itself is off by then."""
    asked = args.flashinfer_allreduce_fusion_backend is not None
    return bool(asked or args.enable_flashinfer_allreduce_fusion)


def _prefers_the_switch(args: Any) -> bool:
    """Whether the server's own sampling parameters, JSON or read already, hold the switch."""
    preferred = args.preferred_sampling_params or {}
    if isinstance(preferred, str):
        try:
            preferred = json.loads(preferred)
        except ValueError:  # SGLang says so
            return False
    return "deterministic" in preferred


_TREE = "its copies of K/V columns would go stale when a column is repaired"
_DROP = "drop the option"
_AROUND = "it sums in other kernels than the all-reduce that is measured at start"
_SCATTERED = "it sums in other collectives than the all-reduce that is measured at start"
_OUTSIDE = "all-reduce is measured outside of it, and sums in another way inside"
_APART = "ranks batch apart"
_QUANTIZED = "quantized models are not served"
_MOVED = "layers whose weights are elsewhere are run in another way than was measured"
_WHOLE = "its kernels run several layers, each of which is measured on its own"
_INSIDE = "what runs inside the model then is more than was measured"

SERVER_REFUSALS = (
    Refusal(
        _on("speculative_algorithm"),
        "--speculative-algorithm",
        "draft tokens are accepted before the gate sees their margins",
        _DROP,
    ),
    Refusal(_above_one("pp_size"), "--pp-size", "micro-batches run ahead of it", "use 1"),
    Refusal(
        lambda a: a.disaggregation_mode != "null",
        "--disaggregation-mode",
        "prefill and decode must share one canonical plan",
        "use null",
    ),
    Refusal(
        _above_one("dp_size"),
        "--dp-size",
        "its controller does not tell whether every scheduler has its gate",
        "start a server for each GPU behind a router",
    ),
    Refusal(_on("enable_dp_attention"), "--enable-dp-attention", _APART, _DROP),
    Refusal(_above_one("attn_dp_size"), "--attn-dp-size", _APART, "use 1"),
    Refusal(_on("enable_tp_lm_head_all_to_all"), "--enable-tp-lm-head-all-to-all", _APART, _DROP),
    Refusal(_on("enable_dense_mlp_attn_tp"), "--enable-dense-mlp-attn-tp", _APART, _DROP),
    Refusal(_above_one("dcp_size"), "--dcp-size", "columns are spread over ranks", "use 1"),
    Refusal(_above_one("attn_cp_size"), "--attn-cp-size", "columns are spread over ranks", "use 1"),
    Refusal(
        _on("enable_two_batch_overlap"),
        "--enable-two-batch-overlap",
        "it splits batches by their contents",
        _DROP,
    ),
    Refusal(_on("enable_pdmux"), "--enable-pdmux", "prefill and decode share kernels", _DROP),
    Refusal(
        _on("enable_mixed_chunk"),
        "--enable-mixed-chunk",
        "a prompt would share its forward with decoding requests",
        _DROP,
    ),
    Refusal(_on("dllm_algorithm"), "--dllm-algorithm", "it does not decode a token a step", _DROP),
    Refusal(_on("enable_hierarchical_cache"), "--enable-hierarchical-cache", _TREE, _DROP),
    Refusal(_on("enable_lmcache"), "--enable-lmcache", _TREE, _DROP),
    Refusal(_on("enable_flexkv"), "--enable-flexkv", _TREE, _DROP),
    Refusal(_on("enable_hisparse"), "--enable-hisparse", _TREE, _DROP),
    Refusal(_on("enable_unified_memory"), "--enable-unified-memory", "slots move", _DROP),
    Refusal(
        _on("enable_page_major_kv_layout"),
        "--enable-page-major-kv-layout",
        "columns are not addressed by slot",
        _DROP,
    ),
    Refusal(
        _on("enable_kv_cache_sharding"),
        "--enable-kv-cache-sharding",
        "columns are spread over ranks",
        _DROP,
    ),
    Refusal(
        _on("enable_unified_cache_external_linker"),
        "--enable-unified-cache-external-linker",
        _TREE,
        _DROP,
    ),
    Refusal(
        _on("strip_thinking_cache"),
        "--strip-thinking-cache",
        "it accounts for output columns in its own way",
        _DROP,
    ),
    Refusal(_on("enable_lora"), "--enable-lora", "verifier rows carry no adapter", _DROP),
    Refusal(
        lambda a: a.kv_canary not in (None, "none", "off"),
        "--kv-canary",
        "a repaired column looks like corruption to it",
        "use none",
    ),
    Refusal(
        _on("enable_return_routed_experts"),
        "--enable-return-routed-experts",
        "a rollback cannot undo it",
        _DROP,
    ),
    Refusal(
        _on("enable_return_indexer_topk"),
        "--enable-return-indexer-topk",
        "a rollback cannot undo it",
        _DROP,
    ),
    Refusal(
        lambda a: bool(a.enable_return_hidden_states or a.return_hidden_states_mode),
        "--enable-return-hidden-states",
        "a rollback cannot undo it",
        _DROP,
    ),
    Refusal(
        _on("enable_return_aux_hidden_states"),
        "--enable-return-aux-hidden-states",
        "a rollback cannot undo it",
        _DROP,
    ),
    Refusal(
        _on("enable_watermark"),
        "--enable-watermark",
        "it makes other tokens likely after the gate has measured their margin",
        _DROP,
    ),
    Refusal(_on("elastic_ep_backend"), "--elastic-ep-backend", "ranks come and go", _DROP),
    Refusal(
        lambda a: a.smg_grpc_mode or a.grpc_mode,
        "--smg-grpc-mode",
        "its launcher does not ask the schedulers whether they have their gate",
        _DROP,
    ),
    Refusal(_on("use_ray"), "--use-ray", "Ray workers do not load SGLang plugins", _DROP),
    Refusal(_on("encoder_only"), "--encoder-only", "nothing is decoded", _DROP),
    Refusal(_on("is_embedding"), "--is-embedding", "nothing is decoded", _DROP),
    Refusal(
        _on("enable_deterministic_inference"),
        "--enable-deterministic-inference",
        "it makes every step canonical, so there is nothing to gate",
        "drop one of the two",
    ),
    Refusal(
        _on("rl_on_policy_target"),
        "--rl-on-policy-target",
        "it makes every step canonical, so there is nothing to gate",
        "drop one of the two",
    ),
    Refusal(
        _on("enable_torch_compile"),
        "--enable-torch-compile",
        "compiled batch sizes use other kernels than the verifier",
        _DROP,
    ),
    Refusal(
        _prefill_graphs,
        "--cuda-graph-backend-prefill",
        "whole prefill graphs pass the layers by that it keeps canonical",
        "use breakable or disabled",
    ),
    Refusal(
        lambda a: a.page_size not in (None, 1),
        "--page-size",
        "a rollback frees single columns",
        "use 1",
    ),
    Refusal(_on("enable_streaming_session"), "--enable-streaming-session", _TREE, _DROP),
    Refusal(_on("enable_session_radix_cache"), "--enable-session-radix-cache", _TREE, _DROP),
    Refusal(
        _above_one("tokenizer_worker_num"),
        "--tokenizer-worker-num",
        "tokenizer workers do not load SGLang plugins, so the gate's counts would be lost",
        "use 1",
    ),
    Refusal(
        _on("prefill_only_disable_kv_cache"),
        "--prefill-only-disable-kv-cache",
        "the gate repairs the K/V cache",
        _DROP,
    ),
    Refusal(
        _prefers_the_switch,
        "--preferred-sampling-params",
        "each request chooses `deterministic` for itself",
        "take `deterministic` out of it",
    ),
    Refusal(
        lambda a: a.radix_cache_backend not in (None, "margingate"),
        "--radix-cache-backend",
        "the gate brings its own, which keeps columns that are not canonical out",
        _DROP,
    ),
    Refusal(
        _other_columns,
        "--kv-cache-dtype",
        "K/V columns of another type than the model's would be read back as other numbers",
        "use auto",
    ),
    Refusal(
        _on("quantization_param_path"),
        "--quantization-param-path",
        "scaled K/V columns are not validated",
        _DROP,
    ),
    Refusal(_fused_all_reduce, "--flashinfer-allreduce-fusion-backend", _AROUND, _DROP),
    Refusal(
        _on("enable_aiter_allreduce_fusion"), "--enable-aiter-allreduce-fusion", _AROUND, _DROP
    ),
    Refusal(
        _on("enable_fused_moe_sum_all_reduce"), "--enable-fused-moe-sum-all-reduce", _AROUND, _DROP
    ),
    Refusal(_on("enable_quant_communications"), "--enable-quant-communications", _AROUND, _DROP),
    Refusal(
        lambda a: a.boundary_reduction not in ("auto", "ar"),
        "--boundary-reduction",
        _SCATTERED,
        "use ar",
    ),
    Refusal(_on("enable_layernorm_sp"), "--enable-layernorm-sp", _SCATTERED, _DROP),
    Refusal(_on("enable_symm_mem"), "--enable-symm-mem", _OUTSIDE, _DROP),
    Refusal(_on("enable_torch_symm_mem"), "--enable-torch-symm-mem", _OUTSIDE, _DROP),
    Refusal(_on("enable_mscclpp"), "--enable-mscclpp", _OUTSIDE, _DROP),
    Refusal(
        _on("enable_nccl_nvls"),
        "--enable-nccl-nvls",
        "sums by NVLink multicast were never measured",
        _DROP,
    ),
    Refusal(_above_one("moe_dp_size"), "--moe-dp-size", _APART, "use 1"),
    Refusal(_above_one("dwdp_size"), "--dwdp-size", _APART, "use 1"),
    Refusal(
        _on("moe_dense_tp_size"),
        "--moe-dense-tp-size",
        "layers are then summed over other ranks than was measured",
        _DROP,
    ),
    Refusal(_on("enable_dp_lm_head"), "--enable-dp-lm-head", _APART, _DROP),
    Refusal(
        _on("enable_attn_tp_input_scattered"), "--enable-attn-tp-input-scattered", _APART, _DROP
    ),
    Refusal(
        _on("enable_prefill_cp"),
        "--enable-prefill-cp",
        "columns are spread over ranks",
        _DROP,
    ),
    Refusal(
        _on("enable_cp_decode_attn_tp"),
        "--enable-cp-decode-attn-tp",
        "columns are spread over ranks",
        _DROP,
    ),
    Refusal(
        lambda a: a.decoupled_spec_role != "null",
        "--decoupled-spec-role",
        "draft tokens are accepted before the gate sees their margins",
        "use null",
    ),
    Refusal(_on("modelopt_quant"), "--modelopt-quant", _QUANTIZED, _DROP),
    Refusal(_on("quantize_and_serve"), "--quantize-and-serve", _QUANTIZED, _DROP),
    Refusal(_on("rl_quant_profile"), "--rl-quant-profile", _QUANTIZED, _DROP),
    Refusal(lambda a: a.cpu_offload_gb > 0, "--cpu-offload-gb", _MOVED, "use 0"),
    Refusal(lambda a: a.offload_group_size > 0, "--offload-group-size", _MOVED, _DROP),
    Refusal(_on("kt_weight_path"), "--kt-weight-path", _MOVED, _DROP),
    Refusal(
        lambda a: a.startup_weight_load_mode != "serial",
        "--startup-weight-load-mode",
        "layers are measured before the weights are there",
        "use serial",
    ),
    Refusal(
        _on("enable_lean_attention"),
        "--enable-lean-attention",
        "it cuts a row's keys by what else is in the batch",
        _DROP,
    ),
    Refusal(_on("enable_amd_monokernel"), "--enable-amd-monokernel", _WHOLE, _DROP),
    Refusal(_on("enable_nvidia_megakernel"), "--enable-nvidia-megakernel", _WHOLE, _DROP),
    Refusal(
        _on("enable_fused_qk_norm_rope"),
        "--enable-fused-qk-norm-rope",
        "its kernel runs norms that are measured as layers of their own",
        _DROP,
    ),
    Refusal(_on("forward_hooks"), "--forward-hooks", _INSIDE, _DROP),
    Refusal(
        lambda a: bool(a.debug_tensor_dump_output_folder),
        "--debug-tensor-dump-output-folder",
        _INSIDE,
        _DROP,
    ),
    Refusal(_on("debug_tensor_dump_input_file"), "--debug-tensor-dump-input-file", _INSIDE, _DROP),
    Refusal(_on("msprobe_dump_config"), "--msprobe-dump-config", _INSIDE, _DROP),
)
