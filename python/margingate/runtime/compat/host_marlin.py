"""Linear layers in the formats of AWQ and GPTQ, in torch operators, for a CPU.

Each class stands where SGLang has one around Marlin, and has its methods. Weights are unpacked
once, to float32, and products are in float32: results have one rounding, as Marlin's have.
"""

from __future__ import annotations

from typing import Any

import torch

_WORD = 32  # bits
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the n-th column in a word; AWQ has 4 bits only


class _Kernel:
    """What both formats have: a product with `layer.unpacked`."""

    def __init__(self, quant_config: Any) -> None:
        self.bits: int = quant_config.weight_bits

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., outputs] in the dtype of x [..., inputs]; the bias is added to what is rounded."""
        rows = x.reshape(-1, x.shape[-1]).float()
        product = (rows @ layer.unpacked.T).to(x.dtype)
        if bias is not None:
            product += bias
        return product.view(*x.shape[:-1], -1)

    def _keep(self, layer: Any, values: torch.Tensor, groups: torch.Tensor) -> None:
        """Sets `unpacked`, float32 [outputs, inputs].

        Args:
            values: [inputs, outputs], less their zero points.
            groups: [inputs], the row of the layer's scales for each.
        """
        unpacked = values.float() * layer.scales.data.float()[groups]
        layer.register_buffer("unpacked", unpacked.t().contiguous(), persistent=False)


class HostAWQKernel(_Kernel):
    """In place of AWQMarlinLinearKernel."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Weights and zero points are packed along outputs, in AWQ's order."""
        values, zeros = (self._columns(packed) for packed in (layer.qweight, layer.qzeros))
        groups = torch.arange(len(values)) // (len(values) // len(zeros))
        self._keep(layer, values - zeros[groups], groups)

    def _columns(self, packed: torch.Tensor) -> torch.Tensor:
        ordered = unpacked(packed, self.bits).view(len(packed), -1, len(_AWQ_PLACES))
        return ordered[..., _AWQ_PLACES].flatten(1)


class HostGPTQKernel(_Kernel):
    """In place of GPTQMarlinLinearKernel: symmetric, with or without `desc_act`."""

    kernel_config: Any = None  # SGLang's scheme sets it

    def process_weights_after_loading(self, layer: Any) -> None:
        """Weights are packed along inputs. Each group's zero point is in the middle."""
        values = unpacked(layer.qweight.t().contiguous(), self.bits).t() - (1 << self.bits - 1)
        groups = torch.arange(len(values)) // (len(values) // len(layer.scales))
        if self.kernel_config.has_g_idx:  # inputs were rounded in another order than theirs
            groups = layer.g_idx.data.long()
        self._keep(layer, values, groups)


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 [rows, columns] of words [rows, columns * bits / 32], the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((packed.data[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def install() -> None:
    """Have SGLang choose Marlin for such checkpoints, as on a GPU, and these classes for it."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq

    marlin_utils.get_device_capability = lambda *_args: (9, 0)
    awq._is_cuda = True  # whether Marlin can have them is all that reads it once it is imported
    awq_kernels.AWQMarlinLinearKernel = HostAWQKernel
    gptq_kernels.GPTQMarlinLinearKernel = HostGPTQKernel
