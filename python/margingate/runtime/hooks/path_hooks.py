"""The patches of each `--gate-fast-path`: rows of the table in scheduler_table.py.

Those of the invariant path are FATAL: they run at start, or see shapes of tensors and nothing of a
request, and half of a layer on another kernel is no canonical row for anybody.
"""

from __future__ import annotations

from margingate.runtime.attention import invariant_attention
from margingate.runtime.hooks import handlers
from margingate.runtime.hooks.registry import AROUND, BEFORE, Hook
from margingate.runtime.probe import all_reduce, execute, startup
from margingate.runtime.request.guard import Policy

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
        "distributed.parallel_state.GroupCoordinator.all_reduce",
        AROUND,
        all_reduce.all_reduce,
        "self input_",
        "keeps the sums of tensor-parallel ranks within one class of row counts",
        "SGLang's all-reduce adds in one order at every size",
    ),
)

# Applied, besides, where it is not.
STOCK_HOOKS = (
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
