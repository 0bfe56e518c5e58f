"""SGLang's kernel for the gate of a shared expert, which reads the gate's weight and not the layer.

It multiplies rows by the gate, and adds the shared expert's rows, as much as that says, to those of
the experts. It is called by the name that the module of Qwen's blocks has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# hidden [n, h], weight [h], shared expert's rows [n, h], experts' rows [n, h], which it adds to
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
_NAME = "fused_gate_sigmoid_mul_add"


def _holder() -> Any:
    from sglang.srt.models import qwen2_moe

    return qwen2_moe


def kernel() -> Kernel:
    """What is called now."""
    found: Kernel = getattr(_holder(), _NAME)
    return found


def replace_kernel(function: Kernel) -> None:
    """Have this called in its place, in all models of the process."""
    setattr(_holder(), _NAME, function)


@contextmanager
def replaced(function: Kernel) -> Iterator[None]:
    """As `replace_kernel`, meanwhile."""
    before = kernel()
    replace_kernel(function)
    try:
        yield
    finally:
        replace_kernel(before)


def gates(model: Any) -> dict[int, Any]:
    """The gates that the kernel may be given, by the address of their weights."""
    found = (getattr(module, "shared_expert_gate", None) for module in model.modules())
    return {gate.weight.data_ptr(): gate for gate in found if isinstance(gate, torch.nn.Linear)}
