"""Linear layers and experts in the formats of AWQ and GPTQ, in torch operators, for a CPU.

Each class stands where SGLang has one around Marlin, and has its methods. Weights are unpacked
once, to float32, and products are in float32: results have one rounding, as Marlin's have.
"""

from __future__ import annotations

from typing import Any

import torch

from margingate.runtime.compat.host.experts import run_experts

_WORD = 32  # bits
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the n-th column in a word; AWQ has 4 bits only
_OF_EXPERTS = ("w13", "w2")  # weights, as FusedMoE begins their names


class _Kernel:
    """What layers of both formats have: a product with `layer.unpacked`, [outputs, inputs]."""

    def __init__(self, quant_config: Any) -> None:
        self.bits: int = quant_config.weight_bits

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., outputs] in the dtype of x [..., inputs]; the bias is added to what is rounded."""
        product = _product(x.reshape(-1, x.shape[-1]), layer.unpacked)
        if bias is not None:
            product += bias
        return product.view(*x.shape[:-1], -1)


class HostAWQKernel(_Kernel):
    """In place of AWQMarlinLinearKernel."""

    def process_weights_after_loading(self, layer: Any) -> None:
        _keep(layer, "unpacked", awq_weight(layer.qweight, layer.qzeros, layer.scales))


class HostGPTQKernel(_Kernel):
    """In place of GPTQMarlinLinearKernel: symmetric, with or without `desc_act`."""

    kernel_config: Any = None  # SGLang's scheme sets it

    def process_weights_after_loading(self, layer: Any) -> None:
        groups = layer.g_idx if self.kernel_config.has_g_idx else None
        _keep(layer, "unpacked", gptq_weight(layer.qweight, layer.scales, self.bits, groups))


class _ExpertsKernel:
    """What experts of both formats have: products with `layer.unpacked_w13` and `_w2`."""

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config
        self.runner: Any = None  # SGLang's MoeRunner, which is asked for its name only

    def process_weights_after_loading(self, layer: Any) -> None:
        """Sets the buffers, float32 [experts, outputs, inputs]."""
        for name in _OF_EXPERTS:
            count = len(getattr(layer, f"{name}_qweight"))
            made = [self._weight(layer, name, expert) for expert in range(count)]
            _keep(layer, f"unpacked_{name}", torch.stack(made))

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """SGLang's StandardCombineInput, of rows in scales' dtype, as Marlin wants them."""
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

        hidden, config = dispatch_output.hidden_states, layer.moe_runner_config
        assert hidden.dtype == layer.w13_scales.dtype, "Marlin takes rows in the scales' dtype"

        def product(name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
            return _product(rows, getattr(layer, f"unpacked_{name}")[expert])

        return StandardCombineInput(
            run_experts(hidden, dispatch_output.topk_output, config, product)
        )

    def _weight(self, layer: Any, name: str, expert: int) -> torch.Tensor:
        raise NotImplementedError


class HostAWQExpertsKernel(_ExpertsKernel):
    """In place of AWQMoEKernel."""

    def _weight(self, layer: Any, name: str, expert: int) -> torch.Tensor:
        parts = (getattr(layer, f"{name}_{part}") for part in ("qweight", "qzeros", "scales"))
        return awq_weight(*(part[expert] for part in parts))


class HostGPTQExpertsKernel(_ExpertsKernel):
    """In place of GPTQMarlinMoEKernel: symmetric, with or without `desc_act`."""

    is_k_full = True  # SGLang's scheme sets it

    def create_moe_runner(self, _layer: Any, moe_runner_config: Any) -> None:
        from sglang.srt.layers.moe import MoeRunner, MoeRunnerBackend

        self.runner = MoeRunner(MoeRunnerBackend.MARLIN, moe_runner_config)

    def _weight(self, layer: Any, name: str, expert: int) -> torch.Tensor:
        packed, scales, groups = (
            getattr(layer, f"{name}_{part}")[expert] for part in ("qweight", "scales", "g_idx")
        )
        ordered = groups if self.quant_config.desc_act else None
        return gptq_weight(packed, scales, self.quant_config.weight_bits, ordered)


def packed_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    *,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    w1_zp: torch.Tensor | None = None,
    **_unused: Any,
) -> torch.Tensor:
    """What SGLang's fused Triton kernel for symmetric experts in 4 bits computes.

    Args:
        w1, w2: uint8 [experts, outputs, inputs / 2], the earlier input in the lower bits.
        w1_scale, w2_scale: [experts, outputs, groups].
    """
    assert w1_zp is None, "zero points are not written for a host"
    weights, scales = {"w13": w1, "w2": w2}, {"w13": w1_scale, "w2": w2_scale}

    def product(name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        packed, by_group = weights[name][expert], scales[name][expert]
        values = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float() - 8
        size = values.shape[1] // by_group.shape[1]
        return _product(rows, values * by_group.float().repeat_interleave(size, 1))

    return run_experts(hidden_states, topk_output, moe_runner_config, product)


def awq_weight(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 [outputs, inputs].

    Args:
        packed, zeros: [inputs or groups, outputs / 8] in AWQ's order.
        scales: [groups, outputs].
    """
    values, zeros = (
        unpacked(part, 4).view(len(part), -1, len(_AWQ_PLACES))[..., _AWQ_PLACES].flatten(1)
        for part in (packed, zeros)
    )
    groups = torch.arange(len(values)) // (len(values) // len(zeros))
    return _scaled(values - zeros[groups], scales, groups)


def gptq_weight(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, groups: torch.Tensor | None
) -> torch.Tensor:
    """Float32 [outputs, inputs], with each group's zero point in the middle.

    Args:
        packed: [inputs * bits / 32, outputs].
        scales: [groups, outputs].
        groups: [inputs], where inputs were rounded in another order than theirs.
    """
    values = unpacked(packed.t().contiguous(), bits).t() - (1 << bits - 1)
    own = torch.arange(len(values)) // (len(values) // len(scales))
    return _scaled(values, scales, own if groups is None else groups.data.long())


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 [rows, columns] of words [rows, columns * bits / 32], the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((packed.data[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def _scaled(values: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Float32 [outputs, inputs] of values [inputs, outputs]; `groups` are rows of the scales."""
    return (values.float() * scales.data.float()[groups]).t().contiguous()


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (rows.float() @ weight.T).to(rows.dtype)


def _keep(layer: Any, name: str, weight: torch.Tensor) -> None:
    layer.register_buffer(name, weight, persistent=False)


def install() -> None:
    """Have SGLang choose Marlin for such checkpoints, as on a GPU, and these classes for it."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq

    marlin_utils.get_device_capability = lambda *_args: (9, 0)
    awq._is_cuda = True  # whether Marlin can have them is all that reads it once it is imported
    awq_kernels.AWQMarlinLinearKernel = HostAWQKernel
    awq_kernels.AWQMoEKernel = HostAWQExpertsKernel
    gptq_kernels.GPTQMarlinLinearKernel = HostGPTQKernel
    gptq_kernels.GPTQMarlinMoEKernel = HostGPTQExpertsKernel
