"""Which attributes of SGLang's objects `runtime/` names, by the names that it has for them.

A value has no class in the source. But the gate calls a request `req` and a batch `batch` wherever
it has one; so a name stands for a class, in all files or in some.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

RUNTIME = Path(__file__).parents[1] / "python" / "margingate" / "runtime"

_ARGS = "server_args.ServerArgs"
_BATCH = "managers.schedule_batch.ScheduleBatch"
_CHOSEN = "layers.moe.topk.StandardTopKOutput"
_CONTEXT = "entrypoints.context.SimpleContext"
_EMBEDS = "managers.embed_types.PositionalEmbeds"
_EXPERTS = "state_capturer.routed_experts.RoutedExpertsCapturer"
_FP8 = "layers.quantization.fp8.Fp8LinearMethod"
_FORWARD = "model_executor.forward_batch_info.ForwardBatch"
_GENERATE = "managers.io_struct.GenerateReqInput"
_GRAPHS = "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_GROUP = "distributed.parallel_state.GroupCoordinator"
_IMAGE = "managers.schedule_batch.MultimodalDataItem"
_IMAGES = "managers.schedule_batch.MultimodalInputs"
_INFO = "sampling.sampling_batch_info.SamplingBatchInfo"
_LAYER = "layers.radix_attention.RadixAttention"
_LOGITS = "layers.logits_processor.LogitsProcessor"
_LOGPROB = "managers.schedule_batch.ReqLogprob"
_MANAGER = "managers.tokenizer_manager.TokenizerManager"
_MATCH = "mem_cache.base_prefix_cache.MatchPrefixParams"
_MODEL = "configs.model_config.ModelConfig"
_NODE = "mem_cache.radix_cache.TreeNode"
_OUTPUT = "layers.logits_processor.LogitsProcessorOutput"
_PROMPTS = "layers.logprob_processor.InputLogprobProcessor"
_TOKENIZED = "managers.io_struct.TokenizedGenerateReqInput"
_PARAMS = "sampling.sampling_params.SamplingParams"
_POOL = "mem_cache.memory_pool.MHATokenToKVPool"
_PROFILER = "managers.scheduler_components.profiler_manager.SchedulerProfilerManager"
_REQ = "managers.schedule_batch.Req"
_RESULT = "managers.utils.GenerationBatchResult"
_RESULTS = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_ROWS = "mem_cache.memory_pool.ReqToTokenPool"
_RUNNER = "model_executor.model_runner.ModelRunner"
_SCHEDULER = "managers.scheduler.Scheduler"
_TRITON = "layers.attention.triton_backend.TritonAttnBackend"
_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

_BOTH = "mem_cache.allocator.swa.SWATokenToKVPoolAllocator"
_SPLIT = "mem_cache.swa_memory_pool.SWAKVPool"
_WINDOWS = "mem_cache.unified_radix_cache.UnifiedRadixCache"

# A variable, or the last attribute of a path; `[]` behind it: an item of it.
NAMES = {
    "req": _REQ,
    "reqs[]": _REQ,
    "chunked_req": _REQ,
    "capturer": _EXPERTS,
    "_capturer()": _EXPERTS,
    "device_cache": "state_capturer.base.BaseDeviceCache",
    "kv": "managers.schedule_batch.ReqKvInfo",
    "multimodal_inputs": _IMAGES,
    "logprob": _LOGPROB,
    "time_stats": "observability.req_time_stats.SchedulerReqTimeStats",
    "batch": _BATCH,
    "running_batch": _BATCH,
    "last_batch": _BATCH,
    "running": _BATCH,
    "scheduler": _SCHEDULER,
    "_scheduler": _SCHEDULER,
    "tp_worker": "managers.tp_worker.TpModelWorker",
    "runner": _RUNNER,
    "model_runner": _RUNNER,
    "model_config": _MODEL,
    "server_args": _ARGS,
    "args": _ARGS,
    "view()": _ARGS,
    "forward_batch": _FORWARD,
    "beside": _FORWARD,
    "forward_mode": "model_executor.forward_batch_info.ForwardMode",
    "sampling_info": _INFO,
    "sampling_params": _PARAMS,
    "params": _PARAMS,
    "result": _RESULT,
    "logits_output": _OUTPUT,
    "req_to_token_pool": _ROWS,
    "token_to_kv_pool": _POOL,
    "pool": _POOL,
    "_pool": _POOL,
    "token_to_kv_pool_allocator": "mem_cache.allocator.token.TokenToKVPoolAllocator",
    "allocator": "mem_cache.allocator.token.TokenToKVPoolAllocator",
    "tree_cache": "mem_cache.radix_cache.RadixCache",
    "tree": "mem_cache.radix_cache.RadixCache",
    "root_node": _NODE,
    "node": _NODE,
    "match": "mem_cache.base_prefix_cache.MatchResult",
    "adder": "managers.schedule_policy.PrefillAdder",
    "decode_cuda_graph_runner": _GRAPHS,
    "graphs": _GRAPHS,
    "_graphs": _GRAPHS,
    "attn_backend": _TRITON,
    "layers[]": _LAYER,
    "_layer": _LAYER,
    "future_map": "managers.overlap_utils.FutureMap",
    "relay": "managers.overlap_utils.FutureMap",
    "translator": "mem_cache.kv_index_translator.KVIndexTranslator",
    "weight_updater": _UPDATER,
    "channels": "managers.scheduler_components.ipc_channels.SchedulerIpcChannels",
    "metrics_collector": "observability.metrics_collector.SchedulerMetricsCollector",
    "metrics_reporter": "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter",
    "output_streamer": "managers.scheduler_components.output_streamer.SchedulerOutputStreamer",
    "accumulator": "managers.scheduler_components.output_streamer._GenerationStreamAccumulator",
    "grammar": "constrained.base_grammar_backend.BaseGrammarObject",
    "grammar_manager": "constrained.grammar_manager.GrammarManager",
    "topk": "layers.moe.topk.TopK",
    "topk_config": "layers.moe.topk.TopKConfig",
    "statuses[]": "managers.detokenizer_manager.DecodeStatus",
    "status": "managers.detokenizer_manager.DecodeStatus",
    "recv_obj": "managers.io_struct.BatchTokenIDOutput",
    "recv_req": "managers.io_struct.AbortReq",
    "cuda_graph_config": "model_executor.cuda_graph_config.CudaGraphConfig",
    "init_result": "entrypoints.engine.SchedulerInitResult",
    "get_context()": "runtime_context.RuntimeContext",
}

# Where a name stands for another class, or "" for none of SGLang's.
IN_FILES = {
    "client/embeddings.py": {"obj": _GENERATE, "overrides": _EMBEDS},
    "attention/fixed_split.py": {"backend": _TRITON},
    "attention/invariant_attention.py": {
        "batch": _FORWARD,
        "backend": _TRITON,
        "_backend": _TRITON,
        "layer": _LAYER,
        "metadata": "layers.attention.triton_backend.ForwardMetadata",
    },
    "attention/layer_rules.py": {"backend": _TRITON, "layer": _LAYER},
    "attention/window_lists.py": {"batch": _FORWARD, "backend": _TRITON, "_backend": _TRITON},
    "attention/verify_backend.py": {"backend": _TRITON},
    "client/choices.py": {"manager": _MANAGER, "tokenized": _TOKENIZED},
    "client/detokenizer.py": {"manager": "managers.detokenizer_manager.DetokenizerManager"},
    "client/frontend.py": {"params": ""},
    "client/managers.py": {"manager": _MANAGER},
    "client/ollama_answers.py": {"params": "", "obj": _GENERATE},
    "client/openai_answers.py": {"result": ""},
    "client/parameter_types.py": {"params": "", "obj": _GENERATE, "manager": _MANAGER},
    "client/responses_answers.py": {"context": _CONTEXT},
    "client/switch.py": {"params": "", "obj": _GENERATE},
    "compat/compute/quantization.py": {"model": _MODEL, "method": _FP8},
    "compat/compute/forward.py": {"batch": _FORWARD, "other": _FORWARD},
    "compat/kv/routed_experts.py": {"_output": "state_capturer.base.TopkCaptureOutput"},
    "compat/model/images.py": {"item": _IMAGE, "inputs": _IMAGES, "made": _IMAGES},
    "compat/arguments/settings.py": {"context": "runtime_context.RuntimeContext"},
    "compat/v0_5_22.py": {"item": _IMAGE},
    "compat/kv/tree.py": {"params": _MATCH, "both": _BOTH, "windows": _WINDOWS},
    "compat/kv/window_pool.py": {"pool": _SPLIT, "allocator": _BOTH},
    "start/pools.py": {"pool": _SPLIT, "token_to_kv_pool": _SPLIT, "tree": _WINDOWS},
    "observe/study.py": {"processor": _LOGITS},
    "probe/planning/all_reduce.py": {"group": _GROUP},
    "probe/checks/check_images.py": {"image": _IMAGE},
    "probe/measuring/attention_operator.py": {
        "batch": _FORWARD,
        "layer": _LAYER,
        "backend": _TRITON,
    },
    "probe/operators/observed_calls.py": {"chosen": _CHOSEN},
    "probe/operators/operator.py": {"processor": _LOGITS},
    "probe/operators/routed.py": {"chosen": _CHOSEN},
    "sampling/logprobs.py": {"processor": _PROMPTS},
    "sampling/penalties.py": {"batch": _FORWARD},
    "sampling/router_margins.py": {"module": "layers.moe.topk.TopK"},
    "sampling/sampler.py": {"batch": _FORWARD, "info": _INFO},
    "sampling/seeds.py": {"info": _INFO, "other": _INFO},
    "schedule/profiling.py": {"manager": _PROFILER},
    "start/refused_models.py": {"model": _MODEL},
    "start/refused_settings.py": {"a": _ARGS},
    "verify/rollback.py": {"kept": _LOGPROB, "counter": _RESULTS},
    "verify/verifier.py": {"batch": _FORWARD, "output": _OUTPUT},
}

# Attributes of others that go by these names, and the gate's own.
OURS = {
    _REQ: {"gate"},
    _TRITON: {
        *("decode_split_tile_size", "decode_use_tensor_cores", "disable_cuda_graph_kv_split"),
        "margingate",  # the first three are FlashInfer's, and in compat/instance_patches.py
    },
    _MODEL: {"named_modules"},
    _POOL: {"req_to_token", "submit", "translate_loc_from_full_to_swa"},  # the last: of two pools
    _FORWARD: {"reqs"},
    _RESULT: {
        "internal_state",
        "logprobs",
        "reshape",
        "success",
        "token",
        "token_ids_logprobs_val",
    },
    "mem_cache.radix_cache.RadixCache": {
        *("accounted", "accounted_windows", "free_slots", "hit_held", "release", "room", "share"),
        "slots",
    },
}


def attributes() -> dict[str, dict[str, list[str]]]:
    """By class, below sglang.srt: its attributes that the gate names, and where."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(RUNTIME.rglob("*.py")):
        place = str(path.relative_to(RUNTIME))
        names = NAMES | IN_FILES.get(place, {})
        for held, attribute, line in _named(ast.parse(path.read_text())):
            kind = names.get(held)
            if kind and attribute not in OURS.get(kind, ()):
                found[kind][attribute].append(f"{place}:{line}")
    return found


def _named(module: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(what holds it, attribute, line), of `getattr` and its kin, too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield _name(node.value), node.attr, node.lineno
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            held, name = node.args[:2]
            by_text = _name(node.func) in ("getattr", "setattr", "hasattr")
            if by_text and isinstance(name, ast.Constant):
                yield _name(held), str(name.value), node.lineno


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return _name(node.value) + "[]"
    return _name(node.func) + "()" if isinstance(node, ast.Call) else ""
