"""SGLang's kernel for the gate of a shared expert, which reads the gate's weight and not the layer.

It multiplies rows by the gate, and adds the shared expert's rows, as much as that says, to those of
the experts. It is called by the name that the module of Qwen's blocks has for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from margingate.runtime.compat.instance_patches import (
    ON_SHARED_GATES,
    in_module,
    replace_in_module,
    replaced_in_module,
)

# hidden [n, h], weight [h], shared expert's rows [n, h], experts' rows [n, h], which it adds to
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def kernel() -> Kernel:
    """What is called now."""
    found: Kernel = in_module(ON_SHARED_GATES)
    return found


def replace_kernel(function: Kernel) -> None:
    """Have this called in its place, in all models of the process."""
    replace_in_module(ON_SHARED_GATES, function)


def replaced(function: Kernel) -> AbstractContextManager[None]:
    """As `replace_kernel`, meanwhile."""
    return replaced_in_module(ON_SHARED_GATES, function)


def gates(model: Any) -> dict[int, Any]:
    """The gates that the kernel may be given, by the address of their weights."""
    found = (getattr(module, "shared_expert_gate", None) for module in model.modules())
    return {gate.weight.data_ptr(): gate for gate in found if isinstance(gate, torch.nn.Linear)}
