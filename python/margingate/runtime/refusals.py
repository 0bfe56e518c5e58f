"""What the gate cannot serve yet: settings of the server, its model, and single requests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from margingate.config import GateConfig, GateError


@dataclass(frozen=True)
class Refusal:
    """A server setting that cannot be combined with the gate."""

    applies: Callable[[Any], bool]
    option: str
    because: str
    instead: str


def _on(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name))


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name) or 1) > 1


def _prefill_graphs(args: Any) -> bool:
    """Whether prefill graphs are of a kind that the gate was not tried with."""
    chosen = getattr(args.cuda_graph_config, "prefill", None)  # of resolved arguments
    backend = getattr(chosen, "backend", args.cuda_graph_backend_prefill)
    return backend in ("tc_piecewise", "full")


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
    Refusal(_on("enable_dp_attention"), "--enable-dp-attention", "ranks batch apart", _DROP),
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
    Refusal(_on("elastic_ep_backend"), "--elastic-ep-backend", "ranks come and go", _DROP),
    Refusal(
        lambda a: a.smg_grpc_mode or a.grpc_mode,
        "--smg-grpc-mode",
        "its launcher does not ask the schedulers whether they have their gate",
        _DROP,
    ),
    Refusal(_on("torchao_config"), "--torchao-config", "quantized models are not served", _DROP),
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
        "compiled or whole prefill graphs pass the layers by that it keeps canonical",
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
)

_ENVIRONMENT = (
    "SGLANG_RUST_SERVER",
    "SGLANG_ENABLE_UNIFIED_RADIX_TREE",
    "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
)


def refuse_server(args: Any) -> None:
    """Check resolved server arguments. Raises GateError with one sentence."""
    for refusal in SERVER_REFUSALS:
        if refusal.applies(args):
            raise GateError(
                f"--deterministic-gate does not work with {refusal.option}, because "
                f"{refusal.because}: {refusal.instead}."
            )
    for name in _ENVIRONMENT:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y"):
            raise GateError(
                f"--deterministic-gate does not work with {name}={os.environ[name]}, which "
                "replaces parts that it patches: unset it."
            )


def refuse_chunks(args: Any, config: GateConfig) -> None:
    """The prefill grid must fit into what one prefill forward may hold. Raises GateError."""
    size, chunk = args.chunked_prefill_size, config.prefill_chunk
    if size is not None and size > 0 and chunk is not None and chunk > size:
        raise GateError(
            f"--gate-prefill-chunk is {chunk}, but --chunked-prefill-size lets a forward hold "
            f"only {size} tokens: lower the first or raise the second."
        )


def refuse_audit(args: Any, config: GateConfig) -> None:
    """Ranks would have to agree on when an audit gives way. Raises GateError."""
    if config.audit_rate > 0 and args.tp_size > 1:
        raise GateError(
            f"--gate-audit-rate is {config.audit_rate}, but --tp-size is {args.tp_size}, and "
            "replays run on one rank: drop the first, or use --tp-size 1."
        )


def refuse_simulation(args: Any, config: GateConfig) -> None:
    """Simulated verdicts on real weights would be wrong answers. Raises GateError."""
    if config.simulates and args.load_format != "dummy":
        raise GateError(
            "--gate-simulate-trigger-rate and --gate-simulate-flip-rate make verdicts up, which "
            "is for benchmarks: drop them, or serve made-up weights with --load-format dummy."
        )


# An instance of each with a K/V split that depends on the length alone is what verifies.
INVARIANT_ATTENTION = ("torch_native", "triton", "flashinfer")


def refuse_fast_path(args: Any, config: GateConfig) -> None:
    """What a fast path needs of device and attention backend. Raises GateError.

    Only for arguments that SGLang has resolved: before that no backend has a name.
    """
    if config.policy == "observe":
        return
    for backend in args.get_attention_backends():
        if backend not in INVARIANT_ATTENTION:
            raise GateError(
                f"--deterministic-gate does not work with --attention-backend {backend}, whose "
                "decode depends on the batch: use triton or flashinfer."
            )


def refuse_model(model: Any, *, observes: bool = False) -> None:
    """Check SGLang's ModelConfig. Raises GateError naming what the model has.

    Args:
        observes: margins are only looked at, as a study of a model with windows does.
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config

    text = model.hf_text_config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    found = [getattr(text, name, None) or 0 for name in names]
    experts = max(max(n) if isinstance(n, list | tuple) else n for n in found)
    kinds = (
        (not model.is_generation, "does not generate text"),
        (model.attention_arch.name != "MHA", "uses latent attention (MLA)"),
        (
            model.is_hybrid_swa or (not observes and _has_windows(text)),
            "mixes full and sliding-window attention",
        ),
        (model.is_encoder_decoder, "is an encoder-decoder"),
        (model.is_multimodal, "is multimodal"),
        (mambaish_config(model) is not None, "keeps recurrent state (Mamba or linear attention)"),
        (experts > 1, f"is a mixture of {experts} experts, whose kernels are not validated yet"),
        (model.quantization is not None, f"is quantized ({model.quantization})"),
    )
    for applies, what in kinds:
        if applies:
            raise GateError(
                f"--deterministic-gate does not serve this model yet, because it {what}: serve it "
                "without the flag."
            )


def _has_windows(text: Any) -> bool:
    """Whether some layers see a window only; SGLang does not call all such models hybrid."""
    return "sliding_attention" in (getattr(text, "layer_types", None) or ())
