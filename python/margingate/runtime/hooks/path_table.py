"""The patches of each `--gate-fast-path`: rows of the table in scheduler_table.py.

Those of the invariant path are FATAL: they run at start, or see shapes of tensors and nothing of a
request, and half of a layer on another kernel is no canonical row for anybody.
"""

from __future__ import annotations

from typing import Any

from margingate.runtime.attention import invariant_attention
from margingate.runtime.compat.arguments.server_args import gate_config
from margingate.runtime.compat.compute import head_norms, marlin, quantization
from margingate.runtime.hooks import handlers, registry
from margingate.runtime.hooks.registry import AFTER, AROUND, BEFORE, Hook
from margingate.runtime.probe import startup
from margingate.runtime.probe.operators import expert_tiles
from margingate.runtime.probe.planning import all_reduce, execute
from margingate.runtime.request.guard import Policy
from margingate.runtime.sampling import router_margins

_MARLIN_EXPERTS = Hook(
    "layers.moe.fused_moe_triton.fused_marlin_moe.fused_marlin_moe",
    AROUND,
    marlin.multiply_in_order,
    "hidden_states w1 w2 w1_scale w2_scale gating_output topk_weights topk_ids ...",
    "experts in AWQ and GPTQ add their partial sums in one order",
    "SGLang's Marlin kernels use no atomic adds",
)

# Applied, besides, where --gate-fast-path is invariant.
INVARIANT_HOOKS = (
    Hook(
        "model_executor.model_runner.ModelRunner.init_cuda_graphs",
        BEFORE,
        startup.before_graphs,
        "self capture_decode_cuda_graph",
        "probes the linear layers and fixes attention's split before graphs are captured",
        "SGLang offers plugins a callback here",
    ),
    Hook(
        "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        AROUND,
        invariant_attention.can_run_graph,
        "self forward_batch",
        "a step whose rows see more keys than the gate's attention has room for takes no graph",
        "SGLang's Triton kernels give a row the same bits in any forward",
    ),
    Hook(
        "layers.quantization.unquant.UnquantizedLinearMethod.apply",
        AROUND,
        execute.apply_linear,
        "self layer x bias",
        "keeps a linear layer within one class of row counts",
        "SGLang's linear layers are batch-invariant at this cost",
    ),
    Hook(
        "layers.logits_processor.LogitsProcessor._compute_lm_head",
        AROUND,
        execute.compute_lm_head,
        "self hidden_states lm_head embedding_bias out",
        "keeps lm_head within one class of row counts",
        "SGLang's linear layers are batch-invariant at this cost",
    ),
    Hook(
        "layers.layernorm.Gemma3RMSNorm.forward_cuda",
        AROUND,
        head_norms.forward_rows,
        "self x residual",
        "norms of heads run by a kernel whose rows do not depend on how many there are",
        "SGLang gives Gemma 3's norms of heads to its kernel for rows",
    ),
    Hook(
        "layers.layernorm._fp8_static_input_scale",
        AROUND,
        quantization.no_scale_for_norms,
        "linear",
        "layers in FP8 round their inputs themselves, as they are measured; no norm does for them",
        "SGLang lets a norm's rounding be switched off",
    ),
    Hook(
        "layers.moe.moe_runner.triton_utils.fused_moe.try_get_optimal_moe_config",
        AROUND,
        expert_tiles.tuned_tiles,
        "w1_shape w2_shape top_k dtype M is_marlin block_shape per_channel_quant "
        "return_down_config",
        "gives experts in FP8 large tiles at all row counts, whose rows have the same bits",
        "SGLang's FP8 experts are batch-invariant at this cost",
    ),
    *([_MARLIN_EXPERTS] if marlin.experts_are_served() else []),
    Hook(
        "distributed.parallel_state.GroupCoordinator.all_reduce",
        AROUND,
        all_reduce.all_reduce,
        "self input_",
        "keeps the sums of tensor-parallel ranks within one class of row counts",
        "SGLang's all-reduce adds in one order at every size",
    ),
)

# Applied, besides, where it is not and the model routes tokens to experts.
ROUTER_HOOKS = (
    Hook(
        router_margins.TARGET,
        BEFORE,
        router_margins.before_topk,
        "self args backend kwargs",
        "how near each layer's router came to other experts, next to a row's margin",
        "SGLang hands router margins to plugins",
    ),
)


def after_load(_result: Any, runner: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER ModelRunner.load_model: look at the margins of the model's routers, if it has any.

    Raises:
        GateError: they say too little of this model for the settings of its server.
    """
    config = None if runner.is_draft_worker else gate_config(runner.server_args)
    if config is not None and router_margins.watch(runner.model, config, runner.device):
        registry.install(ROUTER_HOOKS)


# Applied, besides, where --gate-fast-path is not invariant.
STOCK_HOOKS = (
    Hook(
        "model_executor.model_runner.ModelRunner.load_model",
        AFTER,
        after_load,
        "self",
        "finds the routers of a mixture of experts, whose near-ties must not go unseen",
        "SGLang offers plugins a callback here",
    ),
    Hook(
        "model_executor.model_runner.ModelRunner._forward_raw",
        AROUND,
        handlers.forward,
        "self forward_batch pp_proxy_tensors reinit_attn_backend split_forward_count",
        "a verify pass shares the forward of a decode step",
        "SGLang lets plugins add rows to a decode forward",
        Policy.FORWARD,
    ),
)
