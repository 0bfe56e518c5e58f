"""What is replaced on one object or module of SGLang's: a row each, beside the hooks.

docs/hooks.md lists them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from margingate.config import GateError
from margingate.runtime.compat.release import SGLANG_VERSION


@dataclass(frozen=True)
class InstancePatch:
    """An attribute that the gate replaces on an object or a module of a gated server."""

    owner: str  # dotted path of the class or module, below sglang.srt
    name: str
    why: str
    remove_when: str
    process: str = "scheduler"  # which replaces it; "startup" is every process
    kind: str = "instance"  # or "module": its owner is one, and `name` a function's in it
    ends: str = "process"  # what an exception of ours in it ends


_TRITON = "layers.attention.triton_backend.TritonAttnBackend"
_FLASHINFER = "layers.attention.flashinfer_backend.FlashInferAttnBackend"
_KERNELS = "SGLang's Triton kernels give a row the same bits in any forward"
_SPLIT = "SGLang lets plugins fix the split of decode attention"

ON_TRITON = (
    InstancePatch(_TRITON, "decode_attention_fwd", "the gate's decode kernel", _KERNELS),
    InstancePatch(_TRITON, "extend_attention_fwd", "the gate's prefill kernel", _KERNELS),
    InstancePatch(_TRITON, "forward_decode", "notes the layer for the kernel", _KERNELS),
    InstancePatch(_TRITON, "forward_extend", "notes the batch for the kernel", _KERNELS),
    InstancePatch(_TRITON, "get_num_kv_splits", "a split by the length alone, or none", _SPLIT),
    InstancePatch(_TRITON, "max_kv_splits", "room for that split, and no more", _SPLIT),
)
_TWO_POOLS = "SGLang's lists of a window have its first key, and the kernels are SGLang's"
ON_TWO_POOLS = (
    InstancePatch(_TRITON, "sliding_window_size", "lists of what the kernels read", _TWO_POOLS),
    InstancePatch(_TRITON, "init_forward_metadata", "looks up slots for a prefill", _TWO_POOLS),
)
ON_FLASHINFER = (
    InstancePatch(_FLASHINFER, "decode_use_tensor_cores", "one kernel for all steps", _SPLIT),
    InstancePatch(_FLASHINFER, "decode_split_tile_size", "a fixed split without graphs", _SPLIT),
    InstancePatch(_FLASHINFER, "disable_cuda_graph_kv_split", "no split in graphs", _SPLIT),
)
ON_ENGINE = (
    InstancePatch(
        "entrypoints.engine.Engine",
        "server_args_class",
        "Engine(deterministic_gate=True) attaches the validated settings",
        "SGLang lets plugins declare arguments",
        "startup",
    ),
)
ON_REQUEST = InstancePatch(
    "managers.schedule_batch.Req",
    "update_finish_state",
    "withholds the end of a request with pending rows, as the result of such a row is processed",
    "SGLang offers plugins a callback here",
    ends="request",
)
ON_LOGPROBS = InstancePatch(
    "layers.logprob_processor.InputLogprobProcessor",
    "enable_fast_input_logprobs",
    "a prompt's log-probs have the bits of log_softmax, whoever else wants the likeliest tokens",
    "SGLang computes them by one kernel",
)
ON_DUAL_GEMM = InstancePatch(
    "layers.dual_gemm.DualGemm",
    "mode",
    "off where a row's bits differ from those of the MLP's layers at other row counts",
    "SGLang's linear layers are batch-invariant at this cost",
)
_PLANNED = "SGLang's mixtures of experts are batch-invariant at this cost"
ON_EXPERTS = InstancePatch(
    "layers.moe.fused_moe_triton.layer.FusedMoE",
    "run_moe_core",
    "keeps experts within row counts at which neighbours do not matter",
    _PLANNED,
)
ON_ROUTERS = InstancePatch(
    "layers.moe.topk.TopK",
    "forward",
    "hands scores on to experts in MXFP4, whose rows a choice by expert does not tell apart",
    _PLANNED,
)
ON_GATES = (
    InstancePatch(
        "models.glm4_moe.Glm4MoeGate",
        "forward",
        "keeps a router's linear layer within one class of row counts",
        _PLANNED,
    ),
    InstancePatch(
        "models.qwen2_moe.Qwen2MoeSparseMoeBlock",
        "shared_expert_gate",
        "what multiplies by it is kept within one class of row counts",
        _PLANNED,
    ),
)
ON_FORWARD = InstancePatch(
    "models.llama.LlamaForCausalLM",
    "forward",
    "of any model with layers by Marlin, or with a class of their own in prefills, and of its "
    "layers without the head: notes whether it is a prefill",
    "a prefill by SGLang's layers gives a row the same bits in any forward",
)
ON_QUANTIZED = tuple(
    InstancePatch(
        f"layers.quantization.{method}",
        "apply",
        "keeps a quantized layer within one class of row counts",
        "SGLang's quantized layers are batch-invariant at this cost",
    )
    for method in (
        "fp8.Fp8LinearMethod",
        "w8a8_fp8.W8A8Fp8LinearMethod",
        "compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod",
        "awq.awq.AWQLinearMethod",
        "gptq.gptq.GPTQMarlinLinearMethod",
    )
)
ON_MARLIN_LAYERS = InstancePatch(
    "layers.quantization.marlin_utils",
    "gptq_marlin_gemm",
    "products of 17 to 64 rows in the tile of fewer, so that all have the same bits",
    "SGLang's Marlin has one tile for up to 64 rows",
    kind="module",
)
ON_MARLIN_EXPERTS = InstancePatch(
    "layers.moe.fused_moe_triton.fused_marlin_moe",
    "moe_wna16_marlin_gemm",
    "while experts in AWQ and GPTQ are called: no atomic adds, which SGLang asks for",
    "SGLang's Marlin kernels use no atomic adds",
    kind="module",
)
ON_SHARED_GATES = InstancePatch(
    "models.qwen2_moe",
    "fused_gate_sigmoid_mul_add",
    "keeps the kernel that reads a shared expert's gate within one class of row counts",
    _PLANNED,
    kind="module",
)
INSTANCE_PATCHES = (
    *(*ON_TRITON, *ON_TWO_POOLS, *ON_FLASHINFER, ON_REQUEST, ON_LOGPROBS, ON_DUAL_GEMM),
    *(ON_EXPERTS, ON_ROUTERS, *ON_GATES, ON_FORWARD, *ON_QUANTIZED, *ON_ENGINE),
    *(ON_MARLIN_LAYERS, ON_MARLIN_EXPERTS, ON_SHARED_GATES),
)


def on_quantized(method: Any) -> InstancePatch:
    """What is replaced on the method of a quantized layer, under the name of its own class."""
    owner = f"{type(method).__module__}.{type(method).__qualname__}"
    return replace(ON_QUANTIZED[0], owner=owner.removeprefix("sglang.srt."))


def in_module(patch: InstancePatch) -> Any:
    """What the name of a patch of kind `module` means now."""
    return getattr(_module_of(patch), patch.name)


def replace_in_module(patch: InstancePatch, function: Any) -> None:
    """Have it mean this, in the whole process."""
    setattr(_module_of(patch), patch.name, function)


@contextmanager
def replaced_in_module(patch: InstancePatch, function: Any) -> Iterator[None]:
    """As `replace_in_module`, meanwhile."""
    before = in_module(patch)
    replace_in_module(patch, function)
    try:
        yield
    finally:
        replace_in_module(patch, before)


def _module_of(patch: InstancePatch) -> Any:
    return import_module("sglang.srt." + patch.owner)


def check_instance(found: Any, patch: InstancePatch) -> None:
    """Raises GateError where the object has nothing of that name to replace."""
    if not hasattr(found, patch.name):
        raise GateError(
            f"--deterministic-gate needs {patch.owner}.{patch.name}, which SGLang {SGLANG_VERSION} "
            f"has and this installation does not: reinstall sglang=={SGLANG_VERSION}."
        )
