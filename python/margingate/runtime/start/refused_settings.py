"""Settings of SGLang that the gate cannot be combined with, a row each, with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.release import absent


@dataclass(frozen=True)
class Refusal:
    """A server setting that cannot be combined with the gate."""

    applies: Callable[[Any], bool]
    option: str
    because: str
    instead: str

    @property
    def field(self) -> str:
        """The option's name in ServerArgs."""
        return self.option.removeprefix("--").replace("-", "_")


def _on(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name))


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


def _other_runner(args: Any) -> bool:
    """One that the experts of the named model were not measured with."""
    asked = args.moe_runner_backend
    in_mxfp4 = asked == mxfp4.RUNNER and mxfp4.is_asked(args)
    return asked not in ("auto", "triton") and not in_mxfp4


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
_QUANTIZED = "what it makes of the weights was never measured"
_MOVED = "layers whose weights are elsewhere are run in another way than was measured"
_WHOLE = "its kernels run several layers, each of which is measured on its own"
_SPREAD = "tokens go to the ranks of their experts, which was never measured"
_REPLACED = "experts move among ranks while the server runs"
_INSIDE = "what runs inside the model then is more than was measured"


def _dropped(name: str, because: str) -> Refusal:
    return Refusal(_on(name), "--" + name.replace("_", "-"), because, _DROP)


def _single(name: str, because: str) -> Refusal:
    return Refusal(_above_one(name), "--" + name.replace("_", "-"), because, "use 1")


REFUSALS = (
    _dropped(
        "speculative_algorithm", "draft tokens are accepted before the gate sees their margins"
    ),
    _single("pp_size", "micro-batches run ahead of it"),
    Refusal(
        lambda a: a.disaggregation_mode != "null",
        "--disaggregation-mode",
        "prefill and decode must share one canonical plan",
        "use null",
    ),
    _dropped("enable_dp_attention", _APART),
    _single("attn_dp_size", _APART),
    _dropped("enable_tp_lm_head_all_to_all", _APART),
    _dropped("enable_dense_mlp_attn_tp", _APART),
    _single("dcp_size", "columns are spread over ranks"),
    _single("attn_cp_size", "columns are spread over ranks"),
    _dropped("enable_two_batch_overlap", "it splits batches by their contents"),
    _dropped("enable_pdmux", "prefill and decode share kernels"),
    _dropped("enable_mixed_chunk", "a prompt would share its forward with decoding requests"),
    _dropped("dllm_algorithm", "it does not decode a token a step"),
    _dropped("enable_hierarchical_cache", _TREE),
    _dropped("enable_lmcache", _TREE),
    _dropped("enable_flexkv", _TREE),
    _dropped("enable_hisparse", _TREE),
    _dropped("enable_unified_memory", "slots move"),
    _dropped("enable_page_major_kv_layout", "columns are not addressed by slot"),
    _dropped("enable_kv_cache_sharding", "columns are spread over ranks"),
    _dropped("enable_unified_cache_external_linker", _TREE),
    _dropped("strip_thinking_cache", "it accounts for output columns in its own way"),
    _dropped("enable_lora", "verifier rows carry no adapter"),
    Refusal(
        lambda a: a.kv_canary not in (None, "none", "off"),
        "--kv-canary",
        "a repaired column looks like corruption to it",
        "use none",
    ),
    _dropped("trust_mm_content_hashes", "an image would be what a client says that it is"),
    _dropped("enable_mm_global_cache", "embeddings would be those that others encoded"),
    _dropped("enable_return_indexer_topk", "a rollback cannot undo it"),
    Refusal(
        lambda a: bool(a.enable_return_hidden_states or a.return_hidden_states_mode),
        "--enable-return-hidden-states",
        "a rollback cannot undo it",
        _DROP,
    ),
    _dropped("enable_return_aux_hidden_states", "a rollback cannot undo it"),
    _dropped(
        "enable_watermark", "it makes other tokens likely after the gate has measured their margin"
    ),
    _dropped("elastic_ep_backend", "ranks come and go"),
    Refusal(
        lambda a: a.smg_grpc_mode or a.grpc_mode,
        "--smg-grpc-mode",
        "its launcher does not ask the schedulers whether they have their gate",
        _DROP,
    ),
    _dropped("use_ray", "Ray workers do not load SGLang plugins"),
    _dropped("encoder_only", "nothing is decoded"),
    _dropped("is_embedding", "nothing is decoded"),
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
    _dropped("enable_torch_compile", "compiled batch sizes use other kernels than the verifier"),
    Refusal(
        _prefill_graphs,
        "--cuda-graph-backend-prefill",
        "compiled or whole prefill graphs pass the layers by that it keeps canonical",
        "use breakable or disabled",
    ),
    Refusal(
        lambda a: a.page_size not in (None, 1),
        "--page-size",
        "a rollback frees single columns",
        "use 1",
    ),
    _dropped("enable_streaming_session", "it needs a prefix cache that the gate's own replaces"),
    _dropped("enable_session_radix_cache", _TREE),
    _single(
        "tokenizer_worker_num",
        "tokenizer workers do not load SGLang plugins, so the gate's counts would be lost",
    ),
    _dropped("prefill_only_disable_kv_cache", "the gate repairs the K/V cache"),
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
        lambda a: a.radix_eviction_policy == "tlru" and not a.disable_radix_cache,
        "--radix-eviction-policy",
        "the gate's radix tree does not keep the lengths of conversations that T-LRU goes by",
        "use lru",
    ),
    Refusal(
        _other_columns,
        "--kv-cache-dtype",
        "K/V columns of another type than the model's would be read back as other numbers",
        "use auto",
    ),
    _dropped("quantization_param_path", "scaled K/V columns are not validated"),
    Refusal(_fused_all_reduce, "--flashinfer-allreduce-fusion-backend", _AROUND, _DROP),
    _dropped("enable_aiter_allreduce_fusion", _AROUND),
    _dropped("enable_fused_moe_sum_all_reduce", _AROUND),
    _dropped("enable_quant_communications", _AROUND),
    Refusal(
        lambda a: a.boundary_reduction not in ("auto", "ar"),
        "--boundary-reduction",
        _SCATTERED,
        "use ar",
    ),
    _dropped("enable_layernorm_sp", _SCATTERED),
    _dropped("enable_symm_mem", _OUTSIDE),
    _dropped("enable_torch_symm_mem", _OUTSIDE),
    _dropped("enable_mscclpp", _OUTSIDE),
    _dropped("enable_nccl_nvls", "sums by NVLink multicast were never measured"),
    _single("moe_dp_size", _APART),
    _single("ep_size", _SPREAD),
    Refusal(
        lambda a: a.moe_a2a_backend not in (None, "none"), "--moe-a2a-backend", _SPREAD, "use none"
    ),
    Refusal(
        _other_runner,
        "--moe-runner-backend",
        "its kernels, or the layout of their rows, are chosen after the experts were measured",
        "use triton",
    ),
    _dropped("enable_eplb", _REPLACED),
    _dropped("ep_num_redundant_experts", _REPLACED),
    Refusal(
        lambda a: a.init_expert_location != "trivial",
        "--init-expert-location",
        _REPLACED,
        "use trivial",
    ),
    _dropped("enable_single_batch_overlap", "it runs experts in another way than was measured"),
    _dropped("enable_paged_experts", _MOVED),
    _single("dwdp_size", _APART),
    _dropped("moe_dense_tp_size", "layers are then summed over other ranks than was measured"),
    _dropped("enable_dp_lm_head", _APART),
    _dropped("enable_attn_tp_input_scattered", _APART),
    _dropped("enable_prefill_cp", "columns are spread over ranks"),
    _dropped("enable_cp_decode_attn_tp", "columns are spread over ranks"),
    Refusal(
        lambda a: a.decoupled_spec_role != "null",
        "--decoupled-spec-role",
        "draft tokens are accepted before the gate sees their margins",
        "use null",
    ),
    _dropped("modelopt_quant", _QUANTIZED),
    _dropped("quantize_and_serve", _QUANTIZED),
    _dropped("rl_quant_profile", _QUANTIZED),
    Refusal(lambda a: a.cpu_offload_gb > 0, "--cpu-offload-gb", _MOVED, "use 0"),
    Refusal(lambda a: a.offload_group_size > 0, "--offload-group-size", _MOVED, _DROP),
    _dropped("kt_weight_path", _MOVED),
    Refusal(
        lambda a: a.startup_weight_load_mode != "serial",
        "--startup-weight-load-mode",
        "layers are measured before the weights are there",
        "use serial",
    ),
    _dropped("enable_lean_attention", "it cuts a row's keys by what else is in the batch"),
    _dropped("enable_amd_monokernel", _WHOLE),
    _dropped("enable_nvidia_megakernel", _WHOLE),
    _dropped(
        "enable_fused_qk_norm_rope",
        "its kernel runs norms that are measured as layers of their own",
    ),
    _dropped("forward_hooks", _INSIDE),
    Refusal(
        lambda a: bool(a.debug_tensor_dump_output_folder),
        "--debug-tensor-dump-output-folder",
        _INSIDE,
        _DROP,
    ),
    _dropped("debug_tensor_dump_input_file", _INSIDE),
    _dropped("msprobe_dump_config", _INSIDE),
)
# Those of this release's options.
SERVER_REFUSALS = tuple(each for each in REFUSALS if each.field not in absent("ServerArgs"))
