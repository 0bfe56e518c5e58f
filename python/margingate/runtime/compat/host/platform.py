"""SGLang on a machine without an accelerator: its own torch-native path, as a platform."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from margingate.runtime.compat.compute import mxfp4
from margingate.runtime.compat.host import marlin as host_marlin
from margingate.runtime.compat.host import mxfp4 as host_mxfp4
from margingate.runtime.compat.host.fp8 import (
    block_fp8_linear,
    fp8_experts,
    quantized_by,
    scaled_fp8_linear,
)
from margingate.runtime.compat.host.marlin import packed_experts
from margingate.runtime.compat.model.architectures import has_sinks

AMX = "intel_amx"  # SGLang's kernels for CPUs, which are in a build of their own


def gate_shared_expert(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """SGLang's fused Triton kernel for a shared expert behind a gate, in torch operators.

    Overwrites `output` with sigmoid(hidden_states @ gate_weight) * shared_output, a gate a row, and
    with do_add adds that to it. In float32, rounded once.

    Args:
        hidden_states, shared_output, output: [rows, hidden], of one dtype.
        gate_weight: [hidden].
        do_add: whether to add.
    """
    sums = (hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True)
    # Of values that are not side by side torch takes one after the other. Of those that are, the
    # last few of a call fill no vector and have other bits: a row's would depend on its place.
    gates = sums.repeat(1, 2)[:, :1].sigmoid()
    gated = gates * shared_output.float()
    output.copy_(gated + output.float() if do_add else gated)


def rounded_experts(*args: Any, use_int4_w4a16: bool = False, **kwargs: Any) -> torch.Tensor:
    """SGLang's fused Triton kernels for experts with weights in 4 bits, or in FP8."""
    return (packed_experts if use_int4_w4a16 else fp8_experts)(*args, **kwargs)


def _plain_memory(
    dims: tuple[int, ...], *, dtype: torch.dtype, device: str, **_pinned: Any
) -> torch.Tensor:
    """A buffer, with nothing in it yet, that is registered with no driver."""
    return torch.empty(dims, dtype=dtype, device=device)


class HostPlatform(CpuDeviceMixin, SRTPlatform):
    """The host as an out-of-tree platform: torch operators only, no graphs, one device.

    SGLang's own CPU engine needs kernels that its PyPI build does not carry.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        from torch.profiler import ProfilerActivity

        return ProfilerActivity.CPU

    def init_backend(self) -> None:
        """Put torch operators in place of Triton kernels, and give attention its sinks.

        One is launched by Qwen's shared experts. It is replaced in the function that launches it,
        which both public ones look up in their module: whoever imported those by name, or has put
        a hook around them, gets the torch operator too. The others serve layers and experts in
        FP8: each is replaced where it is looked up. What serves AWQ and GPTQ is in `host_marlin`,
        and what serves MXFP4 in `host_mxfp4`. Buffers that a GPU would copy to, as of experts that
        are returned, are plain memory.
        """
        from sglang.kernels.ops.elementwise import elementwise
        from sglang.srt.layers.attention import attention_registry
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
        from sglang.srt.layers.quantization import fp8, fp8_utils, utils, w8a8_fp8
        from sglang.srt.layers.quantization.compressed_tensors.schemes import (
            compressed_tensors_w8a8_fp8,
        )
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

        from margingate.runtime.compat.host.attention import torch_attention

        attention_registry.ATTENTION_BACKENDS["torch_native"] = torch_attention
        elementwise._launch_fused_gate_sigmoid_mul = gate_shared_expert
        fp8_utils.triton_w8a8_block_fp8_linear = block_fp8_linear
        for module in (fp8, w8a8_fp8, compressed_tensors_w8a8_fp8):
            module.apply_fp8_linear = scaled_fp8_linear
        utils.scaled_fp8_quant = quantized_by
        fused_moe.fused_experts = rounded_experts
        host_marlin.install()
        ALLOC_MEMORY_FUNCS[self.device_name] = _plain_memory
        host_mxfp4.install()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Replace defaults that need kernels which are not in the PyPI build, or a GPU."""
        host_mxfp4.register()  # the launcher asks for no backend
        if server_args.attention_backend in (None, AMX):
            # For gpt-oss SGLang asks for a backend with sinks first, and then takes torch_native.
            sinks = has_sinks(server_args)
            server_args.attention_backend = AMX if sinks else "torch_native"
            if sinks and server_args.moe_runner_backend == "auto":
                # It would keep experts in BF16 as a kernel of GPUs has them, transposed.
                server_args.moe_runner_backend = mxfp4.runner(server_args)
        if server_args.grammar_backend is None:  # SGLang's default applies masks on a GPU only
            server_args.grammar_backend = "llguidance"
        if not server_args.enable_torch_compile:
            # For the processes to come. llguidance compiles what applies its masks: 20 s at the
            # first grammar, and on a Xeon torch 2.11's code corrupted the scheduler's memory.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
